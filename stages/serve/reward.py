"""`rats serve`: serves one reward by HTTP, for trainers that cannot install it. B samples."""

from __future__ import annotations

import hashlib
import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rats.pipeline.protocols import Reward
from rats.pipeline.rewards.base import is_differentiable
from rats.pipeline.rewards.open import open_reward
from rats.pipeline.rewards.remote import as_sent
from rats.pipeline.rewards.remote_protocol import ScoreReply, ScoreRequest, ServedReward, pack_reply, unpack_request
from rats.schemas.errors import ConfigError, nearest
from rats.schemas.params import Params
from rats.stages.serve.service import Service
from rats.trainer.scoring import score

MAX_PROMPT = 10_000
"""The most characters of a prompt. A tokenizer takes about 9 ms for so many, but 1 to 7 s for a million."""


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
        """`function(pictures, prompts)` returns one number for each picture; higher is better."""
        self.function, self.name, self.fingerprint = function, name, fingerprint

    def score(self, images_B3HW: Tensor, prompts: list[str]) -> Tensor:
        """Scores (B,), float32, without gradient."""
        pictures = as_sent(images_B3HW, "uint8").permute(0, 2, 3, 1).contiguous().cpu().numpy()
        scores_B = np.asarray(self.function(pictures, prompts), dtype=np.float32)
        return torch.from_numpy(scores_B.copy()).to(images_B3HW.device)


def open_callable(target: str, name: str) -> Reward:
    """Imports the function "module:function", also from the current folder. Its file decides the fingerprint.

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


class RewardServer(Service):
    """A reward behind HTTP."""

    def __init__(
        self, reward: Reward, host: str, port: int, max_batch: int, queue: int, token: str | None = None
    ) -> None:
        """See Service. A request has at most `max_batch` pictures."""
        super().__init__(host, port, queue, token)
        self.reward = reward
        self.about = ServedReward(
            name=reward.name,
            fingerprint=reward.fingerprint,
            differentiable=is_differentiable(reward),
            pixels=getattr(reward, "pixels", "float32"),
            max_batch=max_batch,
        )
        self.identity = self.about.model_dump_json().encode()

    def read(self, body: bytes) -> ScoreRequest:
        """Parses a request. Raises ValueError for one that this reward cannot answer, before the model runs."""
        question = unpack_request(body)
        if len(question.prompts) > self.about.max_batch:
            raise ValueError(f"{len(question.prompts)} pictures, at most {self.about.max_batch} go into a request")
        if (longest := max(map(len, question.prompts))) > MAX_PROMPT:
            raise ValueError(f"a prompt of {longest} characters, at most {MAX_PROMPT}: shorten it")
        if question.gradient and not self.about.differentiable:
            raise ValueError(f"reward {self.about.name!r} has no gradient")
        return question

    def answer(self, question: ScoreRequest) -> bytes:
        """Scores, NaN where the reward fails, and the gradient if it was requested."""
        images = question.images_B3HW
        images = images.float() / 255 if images.dtype == torch.uint8 else images
        with torch.set_grad_enabled(question.gradient):
            scored = score(self.reward, images.requires_grad_(question.gradient), question.prompts)
            gradient = _gradient(scored.scores_B, images) if question.gradient else None
        scores_B = torch.where(scored.good_B, scored.scores_B.detach(), torch.nan)
        return pack_reply(ScoreReply(self.about.fingerprint, scores_B, gradient))


def _gradient(scores_B: Tensor, images_B3HW: Tensor) -> Tensor:
    """The gradient of each score. A score depends on its own picture only, so the sum's gradient holds them all."""
    if not scores_B.requires_grad:  # no picture is good
        return torch.zeros_like(images_B3HW)
    return torch.autograd.grad(scores_B.sum(), images_B3HW)[0]
