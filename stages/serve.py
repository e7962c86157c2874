"""`rats serve`: one reward behind a url, for trainers whose environment cannot hold it. B samples."""

from __future__ import annotations

import hashlib
import importlib
import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from socketserver import ThreadingTCPServer
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rats.pipeline.protocols import Reward
from rats.pipeline.rewards.base import is_differentiable
from rats.pipeline.rewards.open import open_reward
from rats.pipeline.rewards.remote import as_sent
from rats.pipeline.rewards.remote_protocol import Answer, Question, ServedReward, pack_answer, unpack_question
from rats.schemas.errors import CannotCreateError, ConfigError, nearest, one_line
from rats.schemas.params import Params
from rats.trainer.scoring import score

log = logging.getLogger(__name__)

MAX_BODY = 1 << 29
"""Bytes of a request: 32 pictures of 1024 px as float32 are 0.4 GiB."""
CHUNK = 1 << 16
GRACE = 5.0
"""Seconds that requests have to be answered in once the server is told to end."""


def open_served(params: Params, name: str) -> Reward:
    """One of the rewards of `params`, on their device and with their threads."""
    found = {reward.name: reward for reward in params.rewards}
    if name not in found:
        raise ConfigError(f"{name!r} is no reward of params.yaml{nearest(name, found)}")
    if found[name].adapter == "url":
        raise ConfigError(f"reward {name!r} is served at {found[name].path} already: name one that is loaded here")
    torch.set_num_threads(params.compute.threads)
    return open_reward(found[name], params.compute.device)


class CallableReward:
    """A function of pictures (B, H, W, 3) uint8 in numpy and prompts, such as OCR or a judge: it has no gradient."""

    differentiable = False
    pixels = "uint8"

    def __init__(self, function: Callable[..., Any], name: str, fingerprint: str) -> None:
        """`function(pictures, prompts)` gives a number a picture, higher is better."""
        self.function, self.name, self.fingerprint = function, name, fingerprint

    def score(self, images_B3HW: Tensor, prompts: list[str]) -> Tensor:
        """Scores (B,), float32, without gradient."""
        pictures = as_sent(images_B3HW, "uint8").permute(0, 2, 3, 1).contiguous().cpu().numpy()
        scores_B = np.asarray(self.function(pictures, prompts), dtype=np.float32)
        return torch.from_numpy(scores_B.copy()).to(images_B3HW.device)


def open_callable(target: str, name: str) -> Reward:
    """The function "module:function", found from the current folder too; its file decides its fingerprint.

    Raises ConfigError when there is none.
    """
    module_name, _, function_name = target.partition(":")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        module = importlib.import_module(module_name)
        function, source = getattr(module, function_name), Path(str(module.__file__)).read_bytes()
    except (ImportError, AttributeError, ValueError, OSError) as error:
        raise ConfigError(f"--callable {target!r} is no function ({error}): write MODULE:FUNCTION") from error
    identity = f"callable\n{target}\n{hashlib.sha256(source).hexdigest()}"
    return CallableReward(function, name, hashlib.sha256(identity.encode()).hexdigest())


class RewardServer(ThreadingTCPServer):
    """Answers one question after the other; beyond `queue` of them at a time it says "later"."""

    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, reward: Reward, host: str, port: int, max_batch: int, queue: int) -> None:
        """Listens at once; port 0 takes a free one. Raises CannotCreateError when the port is taken."""
        try:
            super().__init__((host, port), _Handler)
        except (OSError, OverflowError) as error:
            raise CannotCreateError(f"cannot listen at {host}:{port}: {error}; choose another --port") from error
        self.reward, self.queue = reward, queue
        self.slots = threading.BoundedSemaphore(queue)
        self.work = threading.Lock()
        self.about = ServedReward(
            name=reward.name,
            fingerprint=reward.fingerprint,
            differentiable=is_differentiable(reward),
            pixels=getattr(reward, "pixels", "float32"),
            max_batch=max_batch,
        )

    @property
    def url(self) -> str:
        """Where it listens."""
        host, port = self.server_address[:2]
        return f"http://{host!s}:{port}"

    def check(self, question: Question) -> None:
        """Raises ValueError for what this reward cannot answer."""
        if len(question.prompts) > self.about.max_batch:
            raise ValueError(f"{len(question.prompts)} pictures, at most {self.about.max_batch} go into a request")
        if question.gradient and not self.about.differentiable:
            raise ValueError(f"reward {self.about.name!r} has no gradient")

    def answer(self, question: Question) -> Answer:
        """Scores, NaN for a picture that the reward fails on, and the gradient that was asked for."""
        images = question.images_B3HW
        images = images.float() / 255 if images.dtype == torch.uint8 else images
        with self.work, torch.set_grad_enabled(question.gradient):
            scored = score(self.reward, images.requires_grad_(question.gradient), question.prompts)
            gradient = _gradient(scored.scores_B, images) if question.gradient else None
        scores_B = torch.where(scored.good_B, scored.scores_B.detach(), torch.nan)
        return Answer(self.about.fingerprint, scores_B, gradient)

    def serve(self) -> None:
        """Until the process is told to end; what is in the queue is then answered first."""
        try:
            self.serve_forever(poll_interval=0.1)
        finally:
            until = time.monotonic() + GRACE
            for _ in range(self.queue):  # once all places are ours, nobody is at work
                self.slots.acquire(timeout=max(0.0, until - time.monotonic()))
            self.server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away is no event."""
        log.debug("%s: %s", client_address, sys.exc_info()[1])


def _gradient(scores_B: Tensor, images_B3HW: Tensor) -> Tensor:
    """The derivative of each score: a score depends on no other picture, so that of the sum is each one's own."""
    if not scores_B.requires_grad:  # no picture is good
        return torch.zeros_like(images_B3HW)
    return torch.autograd.grad(scores_B.sum(), images_B3HW)[0]


class _Refused(Exception):
    """A request that gets this status and text."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


class _Handler(BaseHTTPRequestHandler):
    """GET /identity and POST /score; a connection serves one request."""

    server: RewardServer
    timeout = 60.0

    def do_GET(self) -> None:
        if self.path != "/identity":
            return self._reply(404, f"no {self.path}: GET /identity or POST /score".encode())
        self._reply(200, self.server.about.model_dump_json().encode())

    def do_POST(self) -> None:
        try:
            self._score()
        except _Refused as refused:
            self._reply(refused.status, str(refused).encode())

    def _score(self) -> None:
        length = self._length()
        if self.path != "/score":
            self._refuse(length, 404, f"no {self.path}: GET /identity or POST /score")
        if length > MAX_BODY:
            self._refuse(length, 413, f"{length} bytes, at most {MAX_BODY}: start the server with a lower --max-batch")
        with self._slot(length):
            self._reply(200, self._answered(self._question(self.rfile.read(length))))

    def _question(self, body: bytes) -> Question:
        try:
            question = unpack_question(body)
            self.server.check(question)
        except ValueError as error:
            raise _Refused(400, str(error)) from error
        return question

    def _answered(self, question: Question) -> bytes:
        try:
            return pack_answer(self.server.answer(question))
        except Exception as error:  # whatever it was, the client is told, and the next request may do better
            log.warning("a request failed: %s", one_line(error))
            raise _Refused(500, one_line(error)) from error

    def _length(self) -> int:
        text = self.headers.get("Content-Length")
        if text is None:
            raise _Refused(411, "say Content-Length")
        if not text.isdecimal():
            raise _Refused(400, f"Content-Length is {text[:40]!r}")
        return int(text)

    @contextmanager
    def _slot(self, length: int) -> Iterator[None]:
        """A place in the queue, taken before the body is read: only so many are held at a time."""
        if not self.server.slots.acquire(blocking=False):
            self._refuse(length, 503, "the queue is full")
        try:
            yield
        finally:
            self.server.slots.release()

    def _refuse(self, length: int, status: int, text: str) -> None:
        """Read what is being sent and throw it away (a client that is cut off sees no reply), then refuse."""
        left = min(length, 2 * MAX_BODY)
        while left > 0 and (chunk := self.rfile.read(min(left, CHUNK))):
            left -= len(chunk)
        raise _Refused(status, text)

    def _reply(self, status: int, content: bytes) -> None:
        self.send_response(status)
        if status == 503:
            self.send_header("Retry-After", "1")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """Not a line a request."""
        log.debug(format, *args)
