"""What stage two reads: stored samples joined with their embeddings and the teacher's scores, in batches.

B samples, H horizons (the noise first, the final last), T latent tokens, C channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from rats.pipeline.protocols import Conditioning


@dataclass(frozen=True)
class Sample:
    """One stored teacher trajectory with all that the loop wants to know about it."""

    key: str
    prompt: str
    x_HTC: Tensor
    x0_HTC: Tensor
    """Predicted clean latents at the horizons, the last (sigma = 0) left out: H - 1 rows."""
    conditioning: Conditioning
    """Of this prompt alone: the tensors have no batch axis."""
    scores: tuple[float, ...]
    """R_T by each reward that trains, scored from the stored final latent."""


class SampleStream(Protocol):
    """An endless, exactly resumable order of samples, the same for any number of ranks."""

    @property
    def position(self) -> int:
        """Samples of the global order handed out so far, over all ranks: the whole state."""
        ...

    def take(self) -> list[Sample]:
        """This rank's contiguous share of the next batch; the position moves on by the whole batch."""
        ...


@dataclass(frozen=True)
class Batch:
    """Samples side by side, on one device; R rewards."""

    keys: list[str]
    prompts: list[str]
    x_HBTC: Tensor
    x0_HBTC: Tensor
    conditioning: Conditioning
    r_teacher_RB: Tensor
    good_B: Tensor | None = None
    """Where a teacher that runs in the loop has scores; a stored one always has."""

    @property
    def noise(self) -> Tensor:
        """The stored noise (B, T, C) as float32: where the student starts, as the teacher did."""
        return self.x_HBTC[0].float()


def collate(samples: Sequence[Sample], device: torch.device) -> Batch:
    """Stack samples along the batch axis."""
    names = samples[0].conditioning
    return Batch(
        keys=[s.key for s in samples],
        prompts=[s.prompt for s in samples],
        x_HBTC=torch.stack([s.x_HTC for s in samples], 1).to(device),
        x0_HBTC=torch.stack([s.x0_HTC for s in samples], 1).to(device),
        conditioning={name: torch.stack([s.conditioning[name] for s in samples]).to(device) for name in names},
        r_teacher_RB=torch.tensor([s.scores for s in samples], dtype=torch.float32, device=device).T,
    )
