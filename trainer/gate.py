"""The gate of the paper (arXiv 2604.14910; docs/design.md#gate): the weight of the shaping loss for each sample.

Every form has one signature. A new one is a function, its line in `FORMS`, and its name in
`GateParams.form` of `schemas/train_params.py`. B samples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rats.schemas.errors import ConfigError, DataError
from rats.schemas.train_params import GateParams


@dataclass(frozen=True)
class WeightedReward:
    """One of the rewards that train: its weight, and the unit by which its scores are divided.

    A single reward keeps its own unit (1.0). Several are each divided by the standard deviation of the teacher's
    scores, since HPS differs by hundredths and PickScore by whole numbers.
    """

    name: str = ""
    weight: float = 1.0
    unit: float = 1.0


def weighted_sum(r_RB: Tensor, parts: Sequence[WeightedReward]) -> Tensor:
    """The weighted sum (B,) of R rewards, each in its unit (docs/design.md, equation 12)."""
    factors_R1 = torch.tensor([[part.weight / part.unit] for part in parts]).to(r_RB)
    return (factors_R1 * r_RB).sum(0)


def _rats(gap_B: Tensor, tau: float, value: float | None) -> Tensor:
    """Gate sigmoid((R_T - R_S) / tau): strong where the teacher is better, 0.5 at a tie.

    docs/design.md, equation 9: the direction of the paper's text and caption.
    """
    return torch.sigmoid(gap_B / tau)


def _figure(gap_B: Tensor, tau: float, value: float | None) -> Tensor:
    """The opposite sign, as the paper's figure prints it: an ablation (docs/design.md, equation 10)."""
    return torch.sigmoid(-gap_B / tau)


def _constant(gap_B: Tensor, tau: float, value: float | None) -> Tensor:
    """One number for all samples: a control with the gate's mean and without its information."""
    if value is None:
        raise ConfigError("gate.form is constant and has no value: set train.gate.value or train.gate.value_from")
    return torch.full_like(gap_B, value)


def _off(gap_B: Tensor, tau: float, value: float | None) -> Tensor:
    """No gate: the full shaping loss for every sample."""
    return torch.ones_like(gap_B)


FORMS: dict[str, Callable[[Tensor, float, float | None], Tensor]] = {
    "rats": _rats,
    "figure": _figure,
    "constant": _constant,
    "off": _off,
}
OF_TAU = ("rats", "figure")
"""Forms that divide by tau. For the others it need not exist."""


def gate(form: str, r_teacher_B: Tensor, r_student_B: Tensor, tau: float, value: float | None = None) -> Tensor:
    """Weights (B,) in [0, 1], float32 and without gradient, from the rewards of teacher and student.

    `tau` is in the reward's units. Raises ConfigError for an unknown form or a constant without a value.
    """
    if form not in FORMS:
        raise ConfigError(f"gate.form {form!r} is unknown: use one of {', '.join(FORMS)}")
    gap_B = (r_teacher_B - r_student_B).detach().float()
    return FORMS[form](gap_B, tau, value)


def gate_all(
    settings: GateParams,
    r_teacher_RB: Tensor,
    r_student_RB: Tensor,
    parts: Sequence[WeightedReward],
    tau: float,
    value: float | None = None,
) -> Tensor:
    """Weights (B,) from R rewards: one gate for their sum, or, with `each`, the weighted mean of a gate for each.

    `tau` is in units of the sum, or with `each` in units of each reward's spread.
    """
    if not settings.each:
        return gate(settings.form, weighted_sum(r_teacher_RB, parts), weighted_sum(r_student_RB, parts), tau, value)
    weighted = []
    for part, r_teacher_B, r_student_B in zip(parts, r_teacher_RB, r_student_RB, strict=True):
        own = gate(settings.form, r_teacher_B / part.unit, r_student_B / part.unit, tau, value)
        weighted.append(part.weight * own)
    return torch.stack(weighted).sum(0) / sum(part.weight for part in parts)


def spread(scores: Sequence[float]) -> float:
    """Standard deviation; 0 without scores."""
    return float(torch.tensor(scores, dtype=torch.float64).std(correction=0)) if len(scores) else 0.0


def score_std(scores: Sequence[float], of: str = "the teacher's", way_out: str = "set train.gate.tau") -> float:
    """The spread of scores, by which something is divided. As the default tau it makes the gate independent of scale.

    Raises DataError, with whose scores they are and the way out, where nothing can be divided by it.
    """
    found = spread(scores)
    if not found > 0.0 or found == float("inf"):
        raise DataError(f"{of} {len(scores)} scores have no usable spread ({found}): {way_out}")
    return found
