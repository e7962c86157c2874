"""What rewards share: their identity, how they are called, and which of their errors are about a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn

from rats.pipeline.protocols import Reward
from rats.pipeline.weights.hashes import adapter_fingerprint
from rats.pipeline.weights.hub import find_checkpoint
from rats.schemas.errors import RatsError

FATAL_ERRORS = (RatsError, MemoryError, torch.OutOfMemoryError, torch.AcceleratorError)
"""Errors that no picture causes. They end the task or the step; no sample is marked as failed."""


def call_reward(reward: Reward, images_B3HW: Tensor, prompts: list[str]) -> Tensor:
    """Scores (B,) as the reward gives them, NaN and infinities included. Videos (B, K, 3, H, W) get their frames' mean.

    Raises ValueError for scores of another shape: broadcasting would give pictures the scores of others.
    """
    if images_B3HW.ndim == 5:
        frames_BK3HW, count = images_B3HW, images_B3HW.shape[1]
        each = [prompt for prompt in prompts for _ in range(count)]
        return call_reward(reward, frames_BK3HW.flatten(0, 1), each).unflatten(0, (-1, count)).mean(1)
    scores_B = reward.score(images_B3HW, prompts)
    if scores_B.shape != (len(prompts),):
        raise ValueError(f"the reward gave {tuple(scores_B.shape)} scores for {len(prompts)} pictures")
    return scores_B


def is_differentiable(reward: Reward) -> bool:
    """Whether its scores have a gradient to the pixels: its attribute `differentiable`, by default true."""
    return bool(getattr(reward, "differentiable", True))


class CheckpointReward:
    """A reward that is read from one file of weights and the small files beside it."""

    adapter: ClassVar[str]
    version: ClassVar[int]
    """Version of preprocessing and formula. It is increased when the same weights give other scores."""
    checkpoints: ClassVar[tuple[str, ...]]
    """Names that the file may have, the preferred one first."""

    name: str
    fingerprint: str

    @classmethod
    def weights(cls, path: Path) -> Path:
        """The file of weights: `path`, or what the folder `path` holds."""
        return find_checkpoint(path, cls.checkpoints)

    @classmethod
    def files(cls, path: Path) -> list[Path]:
        """All files of weights."""
        return [cls.weights(path)]

    @classmethod
    def identify(cls, path: Path) -> str:
        """The reward's fingerprint, without loading it."""
        weights = cls.weights(path)
        return adapter_fingerprint(cls.adapter, cls.version, [weights], weights.parent)


POSITIONS = (0, 2, 4, 6, 7)
"""Upstream's numbers: dropouts lie at 1, 3 and 5, which do nothing in eval mode."""


def head_widths(state: Mapping[str, Tensor], prefix: str) -> list[int]:
    """The head's widths, its input first and 1 last, read from its tensors. Raises KeyError when one is missing."""
    weights = [state[f"{prefix}{position}.weight"] for position in POSITIONS]
    return [weights[0].shape[1], *(weight.shape[0] for weight in weights)]


class LinearHead(nn.ModuleDict):
    """The layers under upstream's numbers."""

    def __init__(self, widths: Sequence[int]) -> None:
        """`widths`: six, as `head_widths` gives them."""
        pairs = zip(POSITIONS, widths[:-1], widths[1:], strict=True)
        super().__init__({str(position): nn.Linear(a, b) for position, a, b in pairs})

    def forward(self, hidden_BD: Tensor) -> Tensor:
        """Scores (B,)."""
        for layer in self.values():
            hidden_BD = layer(hidden_BD)
        return hidden_BD[:, 0]
