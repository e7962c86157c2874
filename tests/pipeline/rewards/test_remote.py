"""A reward behind a url scores and trains as the same reward here, and says clearly what is wrong."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rats.pipeline.protocols import Reward
from rats.pipeline.rewards import remote
from rats.pipeline.rewards.open import open_reward, reward_fingerprint
from rats.pipeline.rewards.remote import RewardClient, UrlReward
from rats.schemas.errors import ConfigError, DataError, NoWorkerError, RetryLaterError
from rats.schemas.params import RewardParams
from rats.stages.serve.reward import CallableReward, RewardServer, open_callable
from rats.trainer.scoring import score
from tests.support.tiny import PROMPTS, SIZE

ADAPTERS = ("pickscore", "hpsv2", "image-reward")


@contextmanager
def running(
    reward: Reward, port: int = 0, max_batch: int = 32, queue: int = 8, token: str | None = None
) -> Iterator[RewardServer]:
    """A server of the reward in this process."""
    server = RewardServer(reward, "127.0.0.1", port, max_batch, queue, token)
    thread = threading.Thread(target=server.serve)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()


class Toy:
    """Scores by the mean of the squares; prompts may ask for trouble."""

    name, fingerprint, differentiable = "toy", "ab" * 32, True

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds, self.sizes, self.answered = seconds, [], 0
        self.free = threading.Event()
        self.free.set()

    def score(self, images_B3HW: Tensor, prompts: list[str]) -> Tensor:
        self.sizes.append(len(prompts))
        time.sleep(self.seconds)
        self.free.wait()
        if "raise" in prompts:
            raise ValueError("no word for it")
        if "full" in prompts:
            raise MemoryError("out of memory")
        if "exit" in prompts:
            raise SystemExit(3)
        factor = torch.tensor([{"nan": float("nan")}.get(prompt, 1.0) for prompt in prompts])
        self.answered += 1
        return images_B3HW.square().mean((1, 2, 3)) * factor


def pictures(count: int = 3) -> Tensor:
    return torch.rand(count, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))


def named(adapter: str, path: str) -> RewardParams:
    return RewardParams(name=f"my-{adapter}", adapter=adapter, path=path)


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_scores_gradients_and_identity_are_the_local_adapters_to_the_last_bit(adapter: str, models: Path):
    local = open_reward(named(adapter, str(models / adapter)))
    images, prompts, found = pictures().requires_grad_(), list(PROMPTS[:3]), []
    with running(local) as server:
        remote = open_reward(named("url", server.url))
        assert reward_fingerprint(named("url", server.url)) == remote.fingerprint == local.fingerprint
        assert isinstance(remote, Reward) and remote.name == "my-url" and remote.differentiable
        for reward in (local, remote):
            scores = reward.score(images, prompts)
            # powers of two: whoever multiplies by them first, the bits are the same
            weighted = (scores * torch.tensor([1.0, -0.5, 4.0])).sum()
            found.append((scores.detach(), *torch.autograd.grad(weighted, images)))
    assert torch.equal(found[0][0], found[1][0]) and found[0][0].unique().numel() == 3
    assert torch.equal(found[0][1], found[1][1]) and found[0][1].abs().max() > 0


def test_no_gradient_travels_when_none_is_needed():
    with running(Toy()) as server:
        remote = UrlReward(server.url)
        assert not remote.score(pictures(), ["a"] * 3).requires_grad
        with torch.no_grad():
            assert not remote.score(pictures().requires_grad_(), ["a"] * 3).requires_grad


def test_more_pictures_than_the_server_takes_are_split_in_order():
    reward = Toy()
    with running(reward, max_batch=2) as server:
        images = pictures(5).requires_grad_()
        scores = UrlReward(server.url).score(images, ["a"] * 5)
        (gradient,) = torch.autograd.grad(scores.sum(), images)
    assert reward.sizes == [2, 2, 1]
    torch.testing.assert_close(scores, images.square().mean((1, 2, 3)))
    torch.testing.assert_close(gradient, 2 * images.detach() / images[0].numel())


@pytest.mark.parametrize("word", ["nan", "raise"])
def test_a_picture_that_the_reward_fails_on_is_nan_and_never_zero_and_the_trainer_leaves_it_out(word: str):
    images, prompts = pictures().requires_grad_(), ["a", word, "b"]
    with running(Toy()) as server:
        remote = UrlReward(server.url)
        assert remote.score(images, prompts).isnan().tolist() == [False, True, False]
        scored = score(remote, images, prompts)
    assert scored.good_B.tolist() == [True, False, True]
    (gradient,) = torch.autograd.grad(scored.scores_B.sum(), images)
    torch.testing.assert_close(gradient[[0, 2]], 2 * images.detach()[[0, 2]] / images[0].numel())
    assert not gradient[1].any()


def test_a_function_is_given_bytes_and_has_no_gradient(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    code = "import numpy\n\ndef whites(pictures, prompts):\n    assert pictures.dtype == numpy.uint8\n"
    (tmp_path / "a_judge.py").write_text(code + "    return [int((p == 255).all(-1).sum()) for p in pictures]\n")
    reward = open_callable("a_judge:whites", "whites")
    with running(reward) as server:
        remote = UrlReward(server.url)
        assert (remote.differentiable, remote.about.pixels) == (False, "uint8")
        images = torch.zeros(2, 3, 4, 6, requires_grad=True)
        images.data[1, :, :2, :3] = 1.0
        scores = remote.score(images, ["a", "b"])
    assert scores.tolist() == [0.0, 6.0] and not scores.requires_grad
    before = reward.fingerprint
    (tmp_path / "a_judge.py").write_text(code + "    return [0.0 for p in pictures]\n")
    assert open_callable("a_judge:whites", "whites").fingerprint != before
    for wrong in ("a_judge", "a_judge:blacks", "no_such_judge:whites", ":whites"):
        with pytest.raises(ConfigError, match="MODULE:FUNCTION"):
            open_callable(wrong, "whites")


def test_bytes_are_rounded_as_a_picture_file_is():
    reward = CallableReward(lambda pictures, prompts: pictures[:, 0, 0, 0], "first", "cd" * 32)
    levels = torch.arange(256).view(-1, 1, 1, 1).expand(-1, 3, 2, 2) / 255
    assert reward.score(levels, ["a"] * 256).tolist() == list(range(256))


def test_a_server_that_comes_back_is_asked_again():
    with running(Toy()) as server:
        remote, port = UrlReward(server.url), server.server_address[1]
    back: list[Any] = []

    def later() -> None:
        time.sleep(0.3)
        back.append(running(Toy(), port))
        back[0].__enter__()

    thread = threading.Thread(target=later)
    thread.start()
    assert remote.score(pictures(), ["a"] * 3).isfinite().all()
    thread.join()
    back[0].__exit__(None, None, None)


def test_a_server_that_is_not_there_is_one_line_with_its_url_and_exit_code_75(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(remote, "FIRST_PATIENCE", 0.2)
    with running(Toy()) as server:
        url = server.url
    with pytest.raises(RetryLaterError, match=rf"{url} gives no answer .*rats serve") as raised:
        UrlReward(url)
    assert raised.value.exit_code == 75 and "\n" not in str(raised.value)


def test_a_full_server_says_later_and_the_client_waits_as_long_as_it_is_told():
    with running(Toy(seconds=0.3), queue=1) as server:
        started, clients = time.monotonic(), [UrlReward(server.url) for _ in range(2)]
        waits: list[float] = []

        def one(client: UrlReward) -> None:
            assert client.score(pictures(), ["a"] * 3).isfinite().all()
            waits.append(time.monotonic() - started)

        threads = [threading.Thread(target=one, args=(client,)) for client in clients]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
    assert waits[0] < 1.0 < waits[1]


@contextmanager
def computing(server: RewardServer) -> Iterator[None]:
    """While the server's model is at work on somebody's batch."""
    other, before = UrlReward(server.url), len(server.reward.sizes)
    server.reward.free.clear()
    asking = threading.Thread(target=lambda: other.score(pictures(2), ["a"] * 2))
    asking.start()
    try:
        while len(server.reward.sizes) == before:
            time.sleep(0.01)
        yield
    finally:
        server.reward.free.set()
        asking.join()


def test_a_server_that_stays_full_is_given_up_and_says_meanwhile_what_it_serves():
    with running(Toy(), queue=1) as server:
        remote = UrlReward(server.url)
        remote.server.patience = 0.1
        with computing(server):
            with pytest.raises(RetryLaterError, match="503 the queue is full"):
                remote.score(pictures(), ["a"] * 3)
            assert UrlReward.identify(server.url) == Toy.fingerprint


def test_a_run_that_is_to_stop_waits_for_no_server():
    with running(Toy(), queue=1) as server:
        remote = UrlReward(server.url)
        remote.server.patience, remote.server.stopping = 5.0, lambda: True
        with computing(server), pytest.raises(RetryLaterError, match=r"told to stop, .* \(503 the queue is full\)"):
            remote.score(pictures(), ["a"] * 3)


@pytest.mark.parametrize(("header", "low", "high"), [(None, 0, 0), ("2.5", 2.5, 2.5), ("soon", 0, 0), ("-1", 0, 0)])
def test_the_pause_that_a_server_asks_for(header: str | None, low: float, high: float):
    assert low <= remote._seconds(header) <= high


def test_the_pause_may_be_a_date():
    from email.utils import formatdate

    assert 58 < remote._seconds(formatdate(time.time() + 60, usegmt=True)) < 61


@pytest.mark.parametrize(("word", "said"), [("full", "MemoryError: out of memory"), ("exit", "SystemExit: 3")])
def test_a_reward_that_ends_ends_the_run_in_its_words_and_not_the_server(word: str, said: str):
    with running(Toy()) as server:
        with pytest.raises(NoWorkerError, match=f"500 {said}"):
            UrlReward(server.url).score(pictures(1), [word])
        assert UrlReward(server.url).score(pictures(1), ["a"]).isfinite().all()


def test_another_reward_under_the_same_url_is_refused():
    with running(Toy()) as server:
        remote, port = UrlReward(server.url), server.server_address[1]
    other = Toy()
    other.fingerprint = "ef" * 32
    with running(other, port), pytest.raises(DataError, match=r"serves another reward now \(efefefefefef, before abab"):
        remote.score(pictures(), ["a"] * 3)


@pytest.mark.parametrize("url", ["127.0.0.1:8765", "ftp://host", "http://", "http://me:secret@host", "models/hpsv2"])
def test_what_is_no_url_is_refused(url: str):
    with pytest.raises(ConfigError, match="write http://HOST:PORT"):
        open_reward(named("url", url))


def test_the_port_of_another_is_no_traceback():
    from rats.schemas.errors import CannotCreateError

    with running(Toy()) as server, pytest.raises(CannotCreateError, match="--port"):
        RewardServer(Toy(), "127.0.0.1", server.server_address[1], 1, 1)


def test_requests_in_the_queue_are_answered_before_the_server_ends():
    answers: list[Tensor] = []
    with running(Toy(seconds=0.3)) as server:
        remote = UrlReward(server.url)
        asking = threading.Thread(target=lambda: answers.append(remote.score(pictures(), ["a"] * 3)))
        asking.start()
        while not server.reward.sizes:
            time.sleep(0.01)
    assert server.reward.answered == 1  # here the server's process would end
    asking.join()
    assert answers[0].isfinite().all()


def test_a_path_before_the_endpoints_is_kept():
    with running(Toy()) as server, pytest.raises(ConfigError, match="refuses: 404 no /deep/identity"):
        RewardClient(f"{server.url}/deep/").call("GET", "/identity")
