"""`rats serve` among strangers and slow clients: who is answered, what is refused, and what is never said."""

from __future__ import annotations

import http.client
import json
import logging
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from rats.pipeline.rewards import remote_protocol
from rats.pipeline.rewards.open import open_reward, pin_reward, reward_fingerprint
from rats.pipeline.rewards.remote import UrlReward
from rats.schemas.errors import CannotCreateError, ConfigError, DataError, NoWorkerError
from rats.schemas.params import Params, RewardParams
from rats.stages.serve import transfer
from rats.stages.serve.reward import MAX_PROMPT, RewardServer
from tests.pipeline.rewards.test_remote import Toy, computing, pictures, running
from tests.stages.serve.test_reward import IDENTITY, ask, http_reply, question, replying
from tests.support.project import command, environment, rats, settings

TOKEN = "a-token-of-24-characters"


@contextmanager
def held(server: RewardServer, count: int, sent: bytes) -> Iterator[list[socket.socket]]:
    """Clients that have sent this and then send nothing more."""
    with ExitStack() as stack:
        clients = [stack.enter_context(socket.create_connection(server.server_address, 10)) for _ in range(count)]
        for client in clients:
            client.sendall(sent)
        yield clients


def post(body: bytes, length: int | None = None) -> bytes:
    return f"POST /score HTTP/1.1\r\nHost: localhost\r\nContent-Length: {length or len(body)}\r\n\r\n".encode() + body


def until(server: RewardServer, happened: Callable[[], object]) -> None:
    """Asks the server for its identity until this has happened: it answers, whatever it is at."""
    for _ in range(20_000):
        if happened():
            return
        assert ask(server.url, None, "GET", "/identity")[0] == 200
    raise AssertionError("it never happened")


def test_clients_that_never_end_their_bodies_take_no_place_from_another():
    with running(Toy(), queue=2) as server, held(server, 5, post(b"half", 1000)):
        status, said = ask(server.url, question())
    assert status == 200, said


def test_of_too_many_connections_the_oldest_makes_room(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(transfer, "CONNECTIONS", 3)
    with running(Toy()) as server, held(server, 3, b"POST /sc") as clients:
        assert ask(server.url, question())[0] == 200
        assert clients[0].recv(1) == b""
        clients[1].sendall(b"ore HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\n\r\n")
        assert clients[1].recv(12) == b"HTTP/1.1 400"


def test_a_request_that_is_being_answered_makes_no_room(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(transfer, "CONNECTIONS", 2)
    with running(Toy()) as server, socket.create_connection(server.server_address, 10) as client:
        with computing(server):
            client.sendall(post(question(3)))
            until(server, lambda: len(server.asking) == 2)
            with held(server, 4, b"GET"):
                assert ask(server.url, None, "GET", "/identity")[0] == 200
        assert client.recv(12) == b"HTTP/1.1 200"


@pytest.mark.parametrize("sent", [b"", b"POST /score HTTP/1.1\r\nHo", post(b"half", 1000)])
def test_a_header_and_a_body_are_waited_for_so_long_and_no_longer(sent: bytes, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(transfer, "HEADER_SECONDS", 0.05)
    monkeypatch.setattr(transfer, "TRANSFER_SECONDS", 0.05)
    with running(Toy()) as server, held(server, 1, sent) as (client,):
        assert client.recv(1) == b""


@pytest.mark.parametrize("sent", [b"POST /score HTTP/1.1\r\nX: ", post(b"half", 1_000_000)])
def test_a_client_that_always_sends_a_little_is_given_no_more_time(sent: bytes, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(transfer, "HEADER_SECONDS", 0.2)
    monkeypatch.setattr(transfer, "TRANSFER_SECONDS", 0.2)
    monkeypatch.setattr(transfer, "SLOWEST", 1 << 40)
    with running(Toy()) as server, held(server, 1, sent) as (client,):
        client.settimeout(0.005)  # a byte every so often, far within the limit
        with pytest.raises((ConnectionResetError, BrokenPipeError)):
            for _ in range(2_000):
                client.sendall(b"x")
                with suppress(TimeoutError):
                    assert client.recv(1) == b""


LARGE = remote_protocol.ScoreRequest(torch.rand(4, 3, 512, 512), ["a"] * 4, gradient=True)
"""Its reply does not fit into the buffers between a server and a client."""


def test_who_does_not_fetch_his_reply_holds_no_place():
    with running(Toy(), queue=1) as server, held(server, 1, post(remote_protocol.pack_request(LARGE))):
        until(server, lambda: server.reward.answered and not server.asking)
        assert server.held > 1 << 20
        assert ask(server.url, question())[0] == 200


def test_who_does_not_fetch_his_reply_is_given_up(monkeypatch: pytest.MonkeyPatch):
    with running(Toy()) as server:
        server.reward.free.clear()
        with held(server, 1, post(remote_protocol.pack_request(LARGE))) as (client,):
            until(server, lambda: server.reward.sizes)
            monkeypatch.setattr(transfer, "TRANSFER_SECONDS", 0.05)
            monkeypatch.setattr(transfer, "SLOWEST", 1 << 40)
            server.reward.free.set()
            until(server, lambda: server.reward.answered and not server.held)
            reply = http.client.HTTPResponse(client)
            with pytest.raises((ConnectionResetError, http.client.IncompleteRead)):
                reply.begin()
                reply.read()


def test_what_is_held_of_all_requests_is_bounded(monkeypatch: pytest.MonkeyPatch):
    body = question(2)
    monkeypatch.setattr(transfer, "MAX_HELD", len(body) + 100)
    with running(Toy()) as server:
        with held(server, 1, post(b"x" * 200, 1000)):
            until(server, lambda: server.held == 200)
            assert ask(server.url, body) == (503, "too many requests at once")
        until(server, lambda: not server.held)
        assert ask(server.url, body)[0] == 200


def test_a_prompt_or_header_of_any_length_is_refused_before_the_model_sees_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(remote_protocol, "MAX_HEADER", 100_000)
    with running(Toy()) as server:
        longest = "x" * MAX_PROMPT
        assert ask(server.url, question(2, prompts=["a", longest]))[0] == 200
        status, said = ask(server.url, question(2, prompts=["a", longest + "x"]))
        assert (status, said) == (400, "a prompt of 10001 characters, at most 10000: shorten it")
        status, said = ask(server.url, question(2, prompts=["a", longest * 10]))
        assert status == 400 and "a header of 100" in said and "send fewer prompts" in said
        assert server.reward.sizes == [2]


def test_a_header_of_many_small_tensors_is_refused_before_they_are_parsed():
    with running(Toy()) as server:
        tensors = {f"{i}": torch.tensor([]) for i in range(10)}
        status, said = ask(server.url, save(tensors, {remote_protocol.ABOUT: '{"prompts": []}'}))
        assert (status, server.reward.sizes) == (400, []) and "11 entries in its header" in said
        about = {f"{i}": "" for i in range(11)}
        status, said = ask(server.url, save({"images": torch.ones(1, 3, 8, 8)}, about))
        assert (status, server.reward.sizes) == (400, []) and "11 entries in its header" in said


@contextmanager
def guarded(file: Path) -> Iterator[RewardServer]:
    """A server that asks for the token in the file."""
    file.write_text(TOKEN + "\n")
    with running(Toy(), token=remote_protocol.read_token(file)) as server:
        yield server


def test_a_token_is_asked_of_every_request_and_compared_as_a_whole(tmp_path: Path):
    with guarded(tmp_path / "token") as server:
        wrong = ["", TOKEN, f"Basic {TOKEN}", f"Bearer {TOKEN[:-1]}", f"Bearer {TOKEN}x", "Bearer \xff", "Bearer"]
        for value in wrong:
            for method, path, body in (("GET", "/identity", None), ("POST", "/score", question())):
                status, said = ask(server.url, body, method, path, Authorization=value)
                assert status == 401 and "token_file" in said, value
        assert server.reward.sizes == []
        assert ask(server.url, question(), Authorization=f"Bearer {TOKEN}")[0] == 200


def test_a_client_reads_its_token_from_a_file_and_the_column_is_the_same_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    caplog.set_level(logging.DEBUG)
    monkeypatch.chdir(tmp_path)
    with guarded(tmp_path / "token") as server:
        bare = RewardParams(name="ours", adapter="url", path=server.url)
        ours = bare.model_copy(update={"token_file": "token"})
        assert pin_reward(ours).token_file == str(tmp_path / "token")
        remote = open_reward(ours)
        assert reward_fingerprint(ours) == remote.fingerprint == Toy.fingerprint
        assert remote.score(pictures(), ["a"] * 3).isfinite().all()
        with pytest.raises(ConfigError, match="refuses: 401 .* token_file"):
            open_reward(bare)
        (tmp_path / "other").write_text(TOKEN[::-1])
        with pytest.raises(ConfigError, match="refuses: 401") as raised:
            open_reward(bare.model_copy(update={"token_file": "other"}))
    said = f"{raised.value} {caplog.text} {ours!r} {ours.model_dump_json()}"
    assert TOKEN not in said and TOKEN[::-1] not in said


@pytest.mark.parametrize("content", [None, "", "short", "two words that are long enough", "x" * 2000, "ü" * 20])
def test_what_is_no_token_is_refused_without_a_word_of_it(content: str | None, tmp_path: Path):
    if content is not None:
        (tmp_path / "token").write_text(content)
    with pytest.raises(ConfigError, match="token_urlsafe") as raised:
        remote_protocol.read_token(tmp_path / "token")
    assert not content or content not in str(raised.value)


def test_an_address_that_others_reach_needs_a_token():
    with pytest.raises(ConfigError, match="others can reach 0.0.0.0, .* --token-file FILE, or listen at 127.0.0.1"):
        RewardServer(Toy(), "0.0.0.0", 0, 1, 1)
    server = RewardServer(Toy(), "0.0.0.0", 0, 1, 1, TOKEN)
    server.socket.close()


@pytest.mark.parametrize("host", ["::", "0", ""])
def test_every_way_to_write_every_address_needs_a_token(host: str):
    with pytest.raises(ConfigError, match="--token-file FILE"):
        RewardServer(Toy(), host, 0, 1, 1)


@pytest.mark.parametrize("host", ["a..b", "no.such.name.invalid", "1.2.3.4.5"])
def test_an_address_that_is_none_is_refused_by_its_text(host: str):
    with pytest.raises(CannotCreateError, match="choose another --host or --port"):
        RewardServer(Toy(), host, 0, 1, 1)


def test_a_token_belongs_to_a_url(models: Path, tmp_path: Path):
    reward = {"name": "hpsv2", "adapter": "hpsv2", "path": "x", "token_file": "token"}
    with pytest.raises(ValueError, match="only a reward of adapter url has a token"):
        Params.model_validate(settings(models, tmp_path, rewards=[reward]))


def sent_twice(server: RewardServer, *hosts: str) -> int:
    """The status of a request with several Host headers."""
    lines = "".join(f"Host: {host}\r\n" for host in hosts)
    with socket.create_connection(server.server_address, 10) as client:
        client.sendall(f"GET /identity HTTP/1.1\r\n{lines}\r\n".encode())
        return int(client.recv(1000).split()[1])


def test_web_pages_are_refused_whatever_name_they_point_here():
    with running(Toy()) as server:
        port = server.server_address[1]
        for host in ("evil.example", f"evil.example:{port}", "127.0.0.1.evil.example", "localhost.evil.example"):
            status, said = ask(server.url, question(), Host=host)
            assert status == 403 and "foreign Host" in said and "--host" in said
        for origin in ("http://evil.example", f"http://127.0.0.1:{port}", "null"):
            assert ask(server.url, question(), Origin=origin)[0] == 403
        assert sent_twice(server, f"localhost:{port}", "evil.example") >= 400
        for host in (f"localhost:{port}", "LOCALHOST", "10.1.2.3:80", f"[::1]:{port}", socket.gethostname()):
            assert ask(server.url, question(), Host=host)[0] == 200, host


ESCAPES = "\x1b[2J\x1b]0;owned\x07 no\r\nsuch\x9b31mreward"


@pytest.mark.parametrize(("status", "error"), [("400 Bad", ConfigError), ("500 Bad", NoWorkerError)])
def test_escape_sequences_of_a_server_are_not_echoed(status: str, error: type[Exception]):
    reply = http_reply(ESCAPES.encode(), status=status)
    with replying(reply) as url, pytest.raises(error, match="no such 31mreward") as raised:
        UrlReward(url)
    assert str(raised.value).isprintable()


def test_escape_sequences_in_an_answer_are_not_echoed():
    other = remote_protocol.pack_reply(remote_protocol.ScoreReply(ESCAPES, torch.ones(1)))
    broken = b'{"scores":{"dtype":"\\u001b[2J","shape":[1],"data_offsets":[0,4]}}'
    for reply in (other, len(broken).to_bytes(8, "little") + broken + b"1234"):
        with replying(http_reply(IDENTITY), http_reply(reply)) as url, pytest.raises(DataError) as raised:
            UrlReward(url).score(pictures(1), ["a"])
        assert str(raised.value).isprintable()


def test_serve_refuses_before_it_loads_anything(tmp_path: Path):
    assert "token file nothing" in rats(tmp_path, "serve", "x", "--token-file", "nothing", code=2).stderr


@pytest.mark.slow
def test_a_model_that_never_ends_does_not_keep_the_server_from_ending(tmp_path: Path):
    (tmp_path / "endless.py").write_text("import time\n\ndef judge(pictures, prompts):\n    time.sleep(600)\n")
    line = command("serve", "endless", "--callable", "endless:judge", "--port", "0", "--json")
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(line, cwd=tmp_path, env=environment(), text=True, **pipes) as process:
        assert process.stdout is not None and process.stderr is not None
        url = json.loads(process.stdout.readline())["url"]
        with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2]))) as client:
            client.sendall(post(question()))
            assert ask(url, None, "GET", "/identity")[0] == 200
            process.send_signal(signal.SIGTERM)
            assert process.wait(timeout=60) == 143 and process.stderr.read() == ""
