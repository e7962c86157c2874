"""`rats serve` and what can be sent to it or come back: refused in words, never unpickled, never half believed."""

from __future__ import annotations

import http.client
import json
import pickle
import shutil
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save

from rats.pipeline.rewards.open import open_reward
from rats.pipeline.rewards.remote import RewardClient, UrlReward
from rats.pipeline.rewards.remote_protocol import ScoreReply, ScoreRequest, pack_reply, pack_request
from rats.schemas.errors import ConfigError, DataError, RetryLaterError
from rats.schemas.params import Params
from rats.stages.init import dvc_yaml
from rats.stages.serve import transfer
from rats.stages.serve.reward import open_served
from tests.pipeline.rewards.test_remote import Toy, named, pictures, running
from tests.support.project import command, environment, rats, settings, tree, write_project


def ask(url: str, body: bytes | None, method: str = "POST", path: str = "/score", **headers: str) -> tuple[int, str]:
    """Status and text of one raw request."""
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=10)
    connection.request(method, path, body, headers)
    response = connection.getresponse()
    text = response.read().decode(errors="replace")
    connection.close()
    return response.status, text


def client(url: str) -> UrlReward:
    """One that soon gives up."""
    remote = UrlReward(url, timeout=5.0)
    remote.server.patience = 5.0
    return remote


def question(count: int = 2, **about: object) -> bytes:
    values = {"prompts": ["a"] * count, "gradient": False} | about
    return save({"images": pictures(count)}, metadata={"rats": json.dumps(values)})


WRONG = {
    "a pickle": (pickle.dumps({"images": [1]}), "no safetensors"),
    "nothing": (b"", "no safetensors"),
    "a header without end": ((1 << 40).to_bytes(8, "little") + b"{}", "no safetensors"),
    "no document": (save({"images": pictures(1)}), "no safetensors with a JSON document"),
    "a document that is no object": (save({"images": pictures(1)}, metadata={"rats": "[1]"}), "JSON object"),
    "no pictures": (save({"others": pictures(1)}, metadata={"rats": "{}"}), "no tensor 'images'"),
    "doubles": (save({"images": pictures(1).double()}, metadata={"rats": "{}"}), "float64"),
    "grey ones": (save({"images": pictures(1)[:, :1]}, metadata={"rats": "{}"}), "(1, 1, 16, 16)"),
    "too few prompts": (question(2, prompts=["a"]), "prompts must be 2 strings"),
    "numbers for prompts": (question(1, prompts=[1]), "prompts must be 1 strings"),
    "a word for a flag": (question(1, gradient="yes"), "gradient must be true or false"),
    "too many": (question(5), "5 pictures, at most 4"),
    "a gradient of none": (question(1, gradient=True), "has no gradient"),
}


def test_a_wrong_request_is_400_and_its_reason_and_the_server_goes_on():
    reward = Toy()
    reward.differentiable = False
    with running(reward, max_batch=4) as server:
        for name, (body, reason) in WRONG.items():
            status, text = ask(server.url, body)
            assert status == 400 and reason in text, f"{name}: {status} {text}"
        assert ask(server.url, question())[0] == 200
        assert reward.sizes == [2]
        assert ask(server.url, None, "GET", "/")[0] == ask(server.url, question(), path="/other")[0] == 404
        assert ask(server.url, None, "POST", **{"Content-Length": "-3"})[0] == 400
        assert ask(server.url, None, "PUT")[0] == 405


def test_a_body_over_the_limit_is_413_before_it_is_held(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(transfer, "MAX_BODY", 1000)
    with running(Toy()) as server:
        with pytest.raises(ConfigError, match="413 .* at most 1000: start the server with a lower --max-batch"):
            UrlReward(server.url).score(pictures(), ["a"] * 3)
        assert server.reward.sizes == []


def test_a_client_that_goes_away_leaves_its_place():
    with running(Toy(), queue=1) as server:
        with socket.create_connection(server.server_address[:2]) as half:
            half.sendall(b"POST /score HTTP/1.1\r\nContent-Length: 1000\r\n\r\nabc")
        assert client(server.url).score(pictures(), ["a"] * 3).isfinite().all()


@contextmanager
def replying(*replies: bytes) -> Iterator[str]:
    """A server that sends these bytes, one after the other to one connection each."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def run() -> None:
            for reply in replies:
                connection, _ = listening.accept()
                with connection, connection.makefile("rb") as request:
                    lines = list(iter(request.readline, b"\r\n"))
                    length = [int(line.split()[1]) for line in lines if line.startswith(b"Content-Length")]
                    request.read(sum(length))  # closed with something unread, the reply might not arrive
                    connection.sendall(reply)

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        thread.join()


def http_reply(content: bytes, length: int | None = None, status: str = "200 OK", more: str = "") -> bytes:
    head = f"HTTP/1.1 {status}\r\n{more}Content-Length: {len(content) if length is None else length}\r\n\r\n"
    return head.encode() + content


IDENTITY = json.dumps({"name": "x", "fingerprint": "ab" * 32, "differentiable": True, "max_batch": 8}).encode()
GOOD = pack_reply(ScoreReply("ab" * 32, torch.ones(1)))


def test_a_reply_that_is_cut_off_is_asked_for_again():
    broken = [http_reply(GOOD[:50], len(GOOD)), b"", http_reply(b"", status="503 Wait")]
    with replying(http_reply(IDENTITY), *broken, http_reply(GOOD)) as url:
        assert client(url).score(pictures(1), ["a"]).tolist() == [1.0]


@pytest.mark.parametrize(
    ("content", "hint"),
    [
        (pack_reply(ScoreReply("ab" * 32, torch.ones(2))), "scores must be 1 float32"),
        (save({"scores": torch.ones(1).half()}, metadata={"rats": "{}"}), "float16"),
        (pack_reply(ScoreReply("cd" * 32, torch.ones(1))), "another reward now"),
        (pickle.dumps([1.0]), "no safetensors"),
        (b"x" * (1 << 20) + b"y" * 5000, "longer than"),
    ],
)
def test_a_reply_that_is_no_answer_is_refused(content: bytes, hint: str):
    with replying(http_reply(IDENTITY), http_reply(content)) as url, pytest.raises(DataError, match=hint):
        client(url).score(pictures(1), ["a"])


def test_a_gradient_of_another_shape_is_refused():
    wrong = pack_reply(ScoreReply("ab" * 32, torch.ones(1), torch.ones(1, 3, 2, 2)))
    with replying(http_reply(IDENTITY), http_reply(wrong)) as url, pytest.raises(DataError, match="gradient must be"):
        client(url).score(pictures(1).requires_grad_(), ["a"])


@pytest.mark.parametrize("content", [b"<html>", b"{}", IDENTITY.replace(b"ab", b"zz"), IDENTITY.replace(b"8", b"0")])
def test_what_says_nothing_of_a_reward_is_no_reward_server(content: bytes):
    with replying(http_reply(content)) as url, pytest.raises(DataError, match=r"is not what a reward server says"):
        UrlReward(url)


def test_a_silent_server_is_given_up_after_the_timeout():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        server = RewardClient(f"http://127.0.0.1:{silent.getsockname()[1]}", timeout=0.1, patience=0.2)
        with pytest.raises(RetryLaterError, match="TimeoutError"):
            server.call("POST", "/score", pack_request(ScoreRequest(pictures(1), ["a"])))


def project(models: Path, folder: Path, **away: str) -> Params:
    """A project whose reward, or its url, trains without augmentation."""
    reward = {"name": "hpsv2", "adapter": "hpsv2", "path": str(models / "hpsv2")} | away
    return Params.model_validate(write_project(models, folder, train={"augment": 0.0}, rewards=[reward]))


def test_stage_score_by_a_url_writes_what_the_reward_itself_does(models: Path, tmp_path: Path):
    params = project(models, tmp_path)
    rats(tmp_path, "stage", "rollout", "--out", "local")
    for scores in tmp_path.glob("store/*/scores"):
        shutil.rmtree(scores)
    with running(open_served(params, "hpsv2")) as server:
        project(models, tmp_path, adapter="url", path=server.url)
        rats(tmp_path, "stage", "score", "--out", "remote")
    assert tree(tmp_path / "local") == tree(tmp_path / "remote")


@pytest.mark.slow
def test_stage_train_by_a_url_leaves_the_same_student(models: Path, tmp_path: Path):
    params = project(models, tmp_path)
    rats(tmp_path, "stage", "rollout", "--out", "data")
    rats(tmp_path, "stage", "train", "--shards", "data", "--out", "runs/local")
    with running(open_served(params, "hpsv2")) as server:
        project(models, tmp_path, adapter="url", path=server.url)
        rats(tmp_path, "stage", "train", "--shards", "data", "--out", "runs/remote")
    # the gradient of a mean over 2 pictures: times a power of two, so that not even the last bit differs
    assert tree(tmp_path / "runs/local/student") == tree(tmp_path / "runs/remote/student")


def test_a_url_is_no_file_for_dvc_and_no_reward_to_serve_again(models: Path, tmp_path: Path):
    away = {"name": "hpsv2", "adapter": "url", "path": "http://127.0.0.1:8765"}
    params = Params.model_validate(settings(models, tmp_path, rewards=[away]))
    stages = yaml.safe_load(dvc_yaml(params, tmp_path))["stages"]
    assert not any("rewards" in dep for dep in stages["evaluate"]["deps"])
    with pytest.raises(ConfigError, match="served at http://127.0.0.1:8765 already"):
        open_served(params, "hpsv2")
    with pytest.raises(ConfigError, match="did you mean 'hpsv2'"):
        open_served(params, "hpsv")


def test_init_takes_a_url(tmp_path: Path):
    rats(tmp_path, "init", "mine", "--reward", "url=http://127.0.0.1:8765")
    assert "path: http://127.0.0.1:8765\n" in (tmp_path / "mine" / "params.yaml").read_text()


@pytest.mark.slow
def test_the_command_prints_its_port_serves_and_ends_on_sigterm(models: Path, tmp_path: Path):
    write_project(models, tmp_path)
    line = command("serve", "hpsv2", "--port", "0", "--json")
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(line, cwd=tmp_path, env=environment(), text=True, **pipes) as process:
        assert process.stdout is not None and process.stderr is not None
        said = json.loads(process.stdout.readline())
        scores = UrlReward(said["url"]).score(pictures(), ["a red fox"] * 3)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=10) == 143 and process.stderr.read() == ""
    local = open_reward(named("hpsv2", str(models / "hpsv2")))
    assert torch.equal(scores, local.score(pictures(), ["a red fox"] * 3))
