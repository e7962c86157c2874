"""The gate of DESIGN.md section 1: how much of the shaping loss each sample feels.

Every form has one signature, so that adding one touches no other line. B samples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from rats.schemas.errors import ConfigError, DataError


def _rats(gap_B: Tensor, tau: float, value: float | None) -> Tensor:
    """Gate sigmoid((R_T - R_S) / tau): strong where the teacher is better, 0.5 at a tie (the paper's text)."""
    return torch.sigmoid(gap_B / tau)


def _figure(gap_B: Tensor, tau: float, value: float | None) -> Tensor:
    """The opposite sign, as the paper's figure prints it: an ablation."""
    return torch.sigmoid(-gap_B / tau)


def _constant(gap_B: Tensor, tau: float, value: float | None) -> Tensor:
    """One number for all samples: the control that has the gate's mean and none of its information."""
    if value is None:
        raise ConfigError("gate.form is constant and has no value: set train.gate.value or train.gate.value_from")
    return torch.full_like(gap_B, value)


def _off(gap_B: Tensor, tau: float, value: float | None) -> Tensor:
    """No gate: the shaping loss in full, always."""
    return torch.ones_like(gap_B)


FORMS: dict[str, Callable[[Tensor, float, float | None], Tensor]] = {
    "rats": _rats,
    "figure": _figure,
    "constant": _constant,
    "off": _off,
}


def gate(form: str, r_teacher_B: Tensor, r_student_B: Tensor, tau: float, value: float | None = None) -> Tensor:
    """Weights (B,) in [0, 1], float32 and without gradient, from the rewards of teacher and student.

    `tau` is in the reward's units. Raises ConfigError for an unknown form or a constant without a value.
    """
    if form not in FORMS:
        raise ConfigError(f"gate.form {form!r} is unknown: use one of {', '.join(FORMS)}")
    gap_B = (r_teacher_B - r_student_B).detach().float()
    return FORMS[form](gap_B, tau, value)


def spread(scores: Sequence[float]) -> float:
    """Standard deviation of the teacher's scores: the default tau, so that the gate has no scale of its own."""
    tau = float(torch.tensor(scores, dtype=torch.float64).std(correction=0)) if len(scores) else 0.0
    if not tau > 0.0 or tau == float("inf"):
        raise DataError(f"the teacher's {len(scores)} scores have no usable spread ({tau}): set train.gate.tau")
    return tau
