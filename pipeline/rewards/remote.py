"""A reward in another process or on another host: the client of `rats serve`, or of any server of the same protocol.

A remote reward trains like a local one: if it has a gradient, the server also sends d score / d image. So packages that
cannot be installed together can run in separate environments. B samples.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
import urllib3
from pydantic import ValidationError
from torch import Tensor

from rats.pipeline.rewards.remote_protocol import (
    ScoreReply,
    ScoreRequest,
    ServedReward,
    pack_request,
    read_token,
    unpack_reply,
)
from rats.schemas.errors import ConfigError, DataError, NoWorkerError, RetryLaterError, plain

log = logging.getLogger(__name__)

TIMEOUT = 120.0
"""Seconds that a server may be silent in one request: a judge may need long for a full batch."""
PATIENCE, FIRST_PATIENCE = 300.0, 10.0
"""Seconds for which requests to a busy or lost server are retried: during a run, and at its start."""
FIRST_PAUSE, LONGEST_PAUSE = 0.1, 10.0
LOOK_UP = 0.2
"""Seconds between two checks during a pause whether the run must stop."""
BUSY = (429, 502, 503, 504)
"""Statuses after which a request is retried: too many requests, or a server that is full, starting or unreachable."""
REPLY_OVERHEAD = 1 << 20
"""Bytes of a reply beyond its tensors."""

_jitter = random.Random()  # not the global generator, whose state is in checkpoints and must not depend on retries


class _Again(Exception):
    """The request should be retried, after at least `after` seconds."""

    def __init__(self, reason: str, after: float = 0.0) -> None:
        super().__init__(reason)
        self.after = after


class RewardClient:
    """The client of one server: one request at a time, with retries and growing pauses while it is away or full."""

    def __init__(
        self, url: str, timeout: float = TIMEOUT, patience: float = PATIENCE, token_file: str | None = None
    ) -> None:
        """`url`: http://host:port, or https, with a path before /score if there is one.

        `token_file`: the file of the server's token. Raises ConfigError for an invalid url or token.
        """
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.username:
            raise ConfigError(f"{url!r} is no reward server: write http://HOST:PORT, without a name and password")
        self.url, self.timeout, self.patience = url.rstrip("/"), timeout, patience
        self.stopping: Callable[[], bool] = lambda: False
        self._headers = {"Authorization": f"Bearer {read_token(Path(token_file))}"} if token_file else {}
        self._pool = urllib3.PoolManager(timeout=timeout, retries=False)

    def call(self, method: str, path: str, body: bytes | None = None) -> bytes:
        """The reply's body.

        Raises:
            RetryLaterError: nobody answers, or the server stays full, or `stopping` turned true in a pause.
            ConfigError: the server refuses the request (4xx), in its words.
            NoWorkerError: the server fails (5xx), in its words.
        """
        started, pause = time.monotonic(), FIRST_PAUSE
        while True:
            try:
                return self._once(method, path, body)
            except _Again as again:
                wait = max(again.after, pause * _jitter.uniform(0.5, 1.0))
                if time.monotonic() - started + wait > self.patience:
                    raise RetryLaterError(self._gave_up(str(again))) from None
                log.log(logging.WARNING if pause > 1.0 else logging.DEBUG, "%s: %s; asking again", self.url, again)
                self._pause(wait, str(again))
            pause = min(2 * pause, LONGEST_PAUSE)

    def _pause(self, seconds: float, reason: str) -> None:
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            if self.stopping():
                raise RetryLaterError(f"told to stop, and the reward server {self.url} gives no answer ({reason})")
            time.sleep(min(left, LOOK_UP))

    def _gave_up(self, reason: str) -> str:
        return (
            f"the reward server {self.url} gives no answer ({reason}; asked for {self.patience:.0f} s): start it with "
            "`rats serve`, or give its url as the reward's path, then run the same command again"
        )

    def _once(self, method: str, path: str, body: bytes | None) -> bytes:
        headers = self._headers | ({"Content-Type": "application/octet-stream"} if body else {})
        # the token goes to this server alone: no redirect is followed
        how: dict[str, Any] = {"redirect": False, "preload_content": False, "decode_content": False}
        limit = len(body or b"") + REPLY_OVERHEAD
        try:
            with self._pool.request(method, self.url + path, body, headers=headers, **how) as response:
                content = response.read(limit + 1)
        except (OSError, urllib3.exceptions.HTTPError) as error:
            cause = error.__cause__ or error
            raise _Again(plain(f"{type(cause).__name__}: {cause}")) from error
        if len(content) > limit:
            raise DataError(f"a reward server's reply is longer than {limit} bytes: is this the url of a `rats serve`?")
        if response.length_remaining:  # cut off, which read(n) does not tell
            raise _Again(f"{len(content)} bytes of a reply, {response.length_remaining} fewer than it said")
        return self._accepted(response, content)

    def _accepted(self, response: urllib3.BaseHTTPResponse, content: bytes) -> bytes:
        if response.status == 200:
            return content
        said = f"{response.status} {plain(content.decode(errors='replace'))}"
        if response.status in BUSY:
            raise _Again(said, _seconds(response.headers.get("Retry-After")))
        if response.status >= 500:
            raise NoWorkerError(f"the reward server {self.url} has failed: {said}; look at its log, then go on")
        raise ConfigError(f"the reward server {self.url} refuses: {said}; is this the url of a `rats serve`?")


def _seconds(header: str | None) -> float:
    """A Retry-After header, in seconds or as a date; 0 when there is none or it cannot be read."""
    try:
        return max(0.0, float(header or 0.0))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(str(header)).timestamp() - time.time())
    except ValueError:
        return 0.0


def fetch_identity(server: RewardClient) -> ServedReward:
    """The server's reply to GET /identity. Raises DataError if it is not that of a reward server."""
    reply = server.call("GET", "/identity")
    try:
        return ServedReward.model_validate_json(reply)
    except ValidationError as error:
        first = error.errors()[0]
        what = f"{'.'.join(map(str, first['loc'])) or 'the reply'}: {first['msg']}"
        raise DataError(
            f"{server.url}/identity is not what a reward server says ({what}); see docs/rewards.md"
        ) from None


class UrlReward:
    """The reward of a server, in requests of at most the server's batch size."""

    checkpoints = ()
    """Empty: there is no file, and the url is passed on unchanged."""

    @classmethod
    def identify(cls, url: str, token_file: str | None = None) -> str:
        """The reward's fingerprint from its server. It does not depend on the token."""
        return fetch_identity(RewardClient(url, patience=FIRST_PATIENCE, token_file=token_file)).fingerprint

    def __init__(
        self,
        url: str,
        name: str = "url",
        device: str = "cpu",
        timeout: float = TIMEOUT,
        token_file: str | None = None,
    ) -> None:
        """Fetches the server's identity. `device` is that of the pictures, not that of the server."""
        self.about = fetch_identity(RewardClient(url, timeout, FIRST_PATIENCE, token_file))
        self.server = RewardClient(url, timeout, token_file=token_file)
        self.name, self.fingerprint, self.differentiable = name, self.about.fingerprint, self.about.differentiable

    @property
    def stopping(self) -> Callable[[], bool]:
        """Whether the run must stop: then pauses end at once, and RetryLaterError is raised."""
        return self.server.stopping

    @stopping.setter
    def stopping(self, stopping: Callable[[], bool]) -> None:
        self.server.stopping = stopping

    def score(self, images_B3HW: Tensor, prompts: list[str]) -> Tensor:
        """Scores (B,), float32, NaN where the server has none; with gradient where the reward has one."""
        gradient = self.differentiable and torch.is_grad_enabled() and images_B3HW.requires_grad
        size = self.about.max_batch
        starts = range(0, len(prompts), size)
        answers = [self._ask(images_B3HW[i : i + size], prompts[i : i + size], gradient) for i in starts]
        scores_B = torch.cat([answer.scores_B for answer in answers]).to(images_B3HW.device)
        if not gradient:
            return scores_B
        found = torch.cat([answer.gradient_B3HW for answer in answers if answer.gradient_B3HW is not None])
        return _Remote.apply(images_B3HW, scores_B, found.to(images_B3HW))

    def _ask(self, images_B3HW: Tensor, prompts: list[str], gradient: bool) -> ScoreReply:
        question = ScoreRequest(as_sent(images_B3HW, self.about.pixels), list(prompts), gradient)
        reply = self.server.call("POST", "/score", pack_request(question))
        try:
            answer = unpack_reply(reply, question)
        except ValueError as error:
            raise DataError(f"{self.server.url}/score gives no answer to the question: {error}") from error
        if answer.fingerprint != self.fingerprint:
            now, before = plain(answer.fingerprint, 12), self.fingerprint[:12]
            raise DataError(f"{self.server.url} serves another reward now ({now}, before {before}): serve that one")
        return answer


def as_sent(images_B3HW: Tensor, pixels: str) -> Tensor:
    """Images in [0, 1] as float32, or rounded to uint8."""
    images = images_B3HW.detach().float()
    return (images.clamp(0, 1) * 255).round().to(torch.uint8) if pixels == "uint8" else images


class _Remote(torch.autograd.Function):
    """Scores whose gradient with respect to the pixels came from the server."""

    @staticmethod
    def forward(ctx: Any, images_B3HW: Tensor, scores_B: Tensor, gradient_B3HW: Tensor) -> Tensor:
        ctx.save_for_backward(gradient_B3HW)
        return scores_B.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (gradient_B3HW,) = ctx.saved_tensors
        return grads[0].view(-1, 1, 1, 1).to(gradient_B3HW) * gradient_B3HW, None, None
