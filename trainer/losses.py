"""The two losses of the paper (arXiv 2604.14910; docs/design.md#the-method), per sample and in float32.

B samples, T latent tokens, C channels, N student steps; k runs over 1..N.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

EPS = 1e-8  # as in cosine_similarity: a zero vector has no direction, and must not cause a division by zero


def _state(states: Sequence[Tensor], x0s: Sequence[Tensor], sigmas: Sequence[float]) -> Tensor:
    """x_sigma_k, after each step."""
    return torch.stack(list(states[1:]))


def _velocity(states: Sequence[Tensor], x0s: Sequence[Tensor], sigmas: Sequence[float]) -> Tensor:
    """Average velocity of each step, (x_k - x_k-1) / (sigma_k - sigma_k-1) (docs/design.md, equation 7)."""
    velocities = []
    for k in range(1, len(states)):
        moved = states[k] - states[k - 1]
        velocities.append(moved / (sigmas[k] - sigmas[k - 1]))
    return torch.stack(velocities)


def _x0(states: Sequence[Tensor], x0s: Sequence[Tensor], sigmas: Sequence[float]) -> Tensor:
    """Predicted clean latent *before* each step (docs/design.md, equation 4): the paper's named choice, an ablation."""
    return torch.stack(list(x0s))


SPACES: dict[str, Callable[[Sequence[Tensor], Sequence[Tensor], Sequence[float]], Tensor]] = {
    "state": _state,
    "velocity": _velocity,
    "x0": _x0,
}


def compared(space: str, states: Sequence[Tensor], x0s: Sequence[Tensor], sigmas: Sequence[float]) -> Tensor:
    """What the shaping loss compares, (N, B, T, C). Used for the student's and for the teacher's path.

    `states` are the N + 1 of (B, T, C) at `sigmas`, the noise first; `x0s` the N predictions before each step.
    """
    return SPACES[space]([_wide(x) for x in states], [_wide(x) for x in x0s], sigmas)


def shape_loss(student_NBTC: Tensor, teacher_NBTC: Tensor, l2: float = 1.0, cos: float = 1.0) -> Tensor:
    """Shaping loss (N, B): l2 * MSE + cos * (1 - cosine) at every horizon; L_shape is its mean over N.

    The mean runs over a sample's elements, the cosine over the flattened sample (docs/design.md, equation 8).
    """
    student = _wide(student_NBTC).flatten(2)
    teacher = _wide(teacher_NBTC).detach().flatten(2)
    mse_NB = (student - teacher).square().mean(-1)
    # 1 - cos(a, b) = |a/|a| - b/|b||^2 / 2: the same number, but exactly 0 (and no gradient) where a = b
    gap_NBD = F.normalize(student, dim=-1, eps=EPS) - F.normalize(teacher, dim=-1, eps=EPS)
    return l2 * mse_NB + cos * 0.5 * gap_NBD.square().sum(-1)


def reward_loss(scores_B: Tensor, weight: float, margin: float | None = None) -> Tensor:
    """Reward loss (B,): -w R, or w relu(m - R), whose gradient is 0 above the margin m.

    docs/design.md, equation 13.
    """
    scores_B = _wide(scores_B)
    return -weight * scores_B if margin is None else weight * F.relu(margin - scores_B)


def _wide(x: Tensor) -> Tensor:
    """Casts to float32, but keeps float64, which the tests need for finite differences."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
