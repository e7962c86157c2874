"""Scores of a micro-batch by a reward. A sample that fails does not affect the others. B samples."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from rats.pipeline.protocols import Reward
from rats.pipeline.rewards.base import FATAL_ERRORS, call_reward
from rats.schemas.errors import one_line

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Scored:
    """Scores of a batch and which of them count.

    `scores_B` is float32, with gradient to the pixels where the reward has one; exactly 0.0 and without gradient
    where `good_B` is false.
    """

    scores_B: Tensor
    good_B: Tensor


def score(reward: Reward, images_B3HW: Tensor, prompts: Sequence[str]) -> Scored:
    """Scores images in [0, 1]. A sample is bad if its score is NaN or infinite, or if it raises an exception.

    If a batch raises, its samples are scored one by one. Samples whose score is not finite are removed, and the others
    are scored again without them. Masking would not be enough, since 0 times the gradient of a NaN is NaN.

    Raises errors that no picture causes: out of memory, a lost device, a RatsError.
    """
    try:
        scores_B = call_reward(reward, images_B3HW, list(prompts)).to(images_B3HW.device, torch.float32)
    except FATAL_ERRORS:
        raise
    except Exception as error:
        _say_once(reward.name, one_line(error))
        return _one_by_one(reward, images_B3HW, prompts)
    good_B = torch.isfinite(scores_B.detach())
    if good_B.all():
        return Scored(scores_B, good_B)
    _say_once(reward.name, "a score that is not finite")
    return _without_bad(reward, images_B3HW, prompts, good_B)


def _one_by_one(reward: Reward, images_B3HW: Tensor, prompts: Sequence[str]) -> Scored:
    count = len(prompts)
    if count == 1:
        return _nothing(images_B3HW)
    parts = [score(reward, images_B3HW[i : i + 1], prompts[i : i + 1]) for i in range(count)]
    return Scored(torch.cat([part.scores_B for part in parts]), torch.cat([part.good_B for part in parts]))


def _without_bad(reward: Reward, images_B3HW: Tensor, prompts: Sequence[str], good_B: Tensor) -> Scored:
    all_bad = _nothing(images_B3HW)
    kept = good_B.nonzero().flatten()
    if len(kept) == 0:
        return all_bad
    # whatever turns bad only now leaves too: each call has fewer samples, so this ends
    again = score(reward, images_B3HW[kept], [prompts[i] for i in kept.tolist()])
    scores_B = all_bad.scores_B.index_put((kept,), again.scores_B)
    return Scored(scores_B, good_B.index_put((kept,), again.good_B))


def _nothing(images_B3HW: Tensor) -> Scored:
    count, device = len(images_B3HW), images_B3HW.device
    return Scored(torch.zeros(count, device=device), torch.zeros(count, dtype=torch.bool, device=device))


@lru_cache(maxsize=256)
def _say_once(name: str, reason: str) -> None:
    """Logs each message once, so that a reward that fails in every step does not fill the log."""
    log.warning("reward %r gave no score for a picture, which is left out: %s", name, reason)
