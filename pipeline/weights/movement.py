"""How far a student has moved from its base: a share of the way, and what of it is left when weights are rounded.

bfloat16 keeps 8 bits of a number: a weight that moves by less than 1/512 of itself is mostly rounded back.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor


class Movement:
    """Sums up |rounded - start| and |trained - start| (L2 norms over all elements of all tensors that are added)."""

    def __init__(self) -> None:
        """Nothing has moved."""
        self._kept = self._moved = 0.0

    @torch.no_grad()
    def add(self, start: Tensor, trained: Tensor, rounded: Tensor) -> None:
        """Adds one tensor, of one shape three times: before training, after it, and as it is kept."""
        before = start.double()
        self._kept += float((rounded.double() - before).square().sum())
        self._moved += float((trained.double() - before).square().sum())

    @property
    def share(self) -> float:
        """|rounded - start| / |trained - start|; 1 where nothing has moved."""
        return (self._kept / self._moved) ** 0.5 if self._moved else 1.0


def shortened(start: Mapping[str, Tensor], trained: Mapping[str, Tensor], length: float) -> dict[str, Tensor]:
    """Gives start + length (trained - start), by name and in float32."""
    return {name: torch.lerp(start[name].float(), tensor.float(), length) for name, tensor in trained.items()}


def share_kept(start: Mapping[str, Tensor], trained: Iterable[tuple[str, Tensor]]) -> float:
    """The share of the movement that is left when each trained tensor is rounded to its start's dtype."""
    movement = Movement()
    for name, tensor in trained:
        movement.add(start[name], tensor, tensor.to(start[name].dtype))
    return movement.share
