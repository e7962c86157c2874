"""Asking a reward: what its answer must look like, and which of its errors say something about a picture."""

from __future__ import annotations

import torch
from torch import Tensor

from rats.pipeline.protocols import Reward
from rats.schemas.errors import RatsError

NOT_THE_SAMPLES_FAULT = (RatsError, MemoryError, torch.OutOfMemoryError, torch.AcceleratorError)
"""Errors that say nothing about a picture: they end the task or the step, and no sample is blamed."""


def ask(reward: Reward, images_B3HW: Tensor, prompts: list[str]) -> Tensor:
    """Scores (B,) as the reward gives them, NaN and infinities included; of videos (B, K, 3, H, W) the frames' mean.

    Raises ValueError for scores of another shape: broadcast, they would be somebody else's.
    """
    if images_B3HW.ndim == 5:
        frames_BK3HW, count = images_B3HW, images_B3HW.shape[1]
        each = [prompt for prompt in prompts for _ in range(count)]
        return ask(reward, frames_BK3HW.flatten(0, 1), each).unflatten(0, (-1, count)).mean(1)
    scores_B = reward.score(images_B3HW, prompts)
    if scores_B.shape != (len(prompts),):
        raise ValueError(f"the reward gave {tuple(scores_B.shape)} scores for {len(prompts)} pictures")
    return scores_B


def is_differentiable(reward: Reward) -> bool:
    """Whether its scores carry a gradient to the pixels: its attribute `differentiable`, true if it has none."""
    return bool(getattr(reward, "differentiable", True))


def one_line(error: Exception) -> str:
    """An error as a table's cell or a log's line may hold it: its kind and at most 300 characters."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
