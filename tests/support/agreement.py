"""A family's own sampling beside its diffusers pipeline's, on tiny random models: what two families' tests share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from rats.pipeline.families.models import FamilyTeacher
from rats.pipeline.families.open import Model
from rats.pipeline.solver import euler
from rats.schemas.params import ComputeParams, ModelParams, TeacherParams

PROMPTS = ["a red fox", "a house at night"]
"""Of different length in tokens."""
NEGATIVE = "a blue whale"
CPU = ComputeParams()


def teacher_of(family: str, folder: Path, length: int, **settings: Any) -> FamilyTeacher:
    """The teacher in `folder`, for 16 px pictures and prompts of `length` tokens."""
    sizes = {"height": 16, "width": 16, "max_sequence_length": length}
    return Model(ModelParams(path=str(folder), family=family), TeacherParams(**sizes | settings), CPU).open_teacher()


def noise(teacher: FamilyTeacher) -> torch.Tensor:
    """Packed latents (B, T, C) for `PROMPTS`, always the same."""
    return torch.randn(len(PROMPTS), *teacher.latent_shape(), generator=torch.Generator().manual_seed(1))


def evaluations(teacher: FamilyTeacher) -> int:
    """Of the network, in one guided velocity, counted by a hook."""
    calls: list[int] = []
    teacher.network.register_forward_hook(lambda *_: calls.append(1))
    teacher.guided_velocity(noise(teacher), 0.5, teacher.encode(PROMPTS))
    return len(calls)


def ours(teacher: FamilyTeacher, steps: int) -> torch.Tensor:
    """The final latents (B, T, C) of the stock grid, not snapped."""
    conditioning = teacher.encode(PROMPTS)
    states, _ = euler(
        lambda x, s: teacher.guided_velocity(x, s, conditioning), noise(teacher), teacher.stock_sigmas(steps)
    )
    return states[-1]


def plain(pipeline_class: Any, folder: Path) -> Any:
    """The pipeline as anybody loads it."""
    pipeline = pipeline_class.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def assert_latents(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal to 1e-4."""
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def assert_pictures(decoded: torch.Tensor, expected: np.ndarray) -> None:
    """(B, 3, H, W) against the pipeline's (B, H, W, 3), to 1e-4."""
    assert_latents(decoded.permute(0, 2, 3, 1), torch.from_numpy(expected))
