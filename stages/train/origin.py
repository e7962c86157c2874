"""Whether a model is the one that a run was trained from, and samples as it did then."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import diffusers

from rats.pipeline.families.open import Model
from rats.pipeline.weights.hashes import NETWORK
from rats.pipeline.weights.lora import is_lora
from rats.schemas.errors import DataError
from rats.schemas.recipe import DECODER
from rats.schemas.run import RunRecord

ROUNDING = 1e-5
"""What float32 may round a sigma by; a grid that has moved differs by more than a thousandth."""


def check_base(model: Model, run: Path, record: RunRecord, student: Path) -> None:
    """The decoder must be the one of the run. For adapters, so must the network that they were trained on.

    Raises DataError that names both.
    """
    expected = {DECODER: record.vae} | ({NETWORK: record.base} if is_lora(student) else {})
    for name, there in expected.items():
        if (here := model.folder.hash_of(name)) != there:
            part = model.folder.parts(name)[name]
            raise DataError(
                f"{run} was trained with another {part.name}: {there[:12]} there, {here[:12]} in {part}: "
                "name the run's own model with --set model.path=DIR"
            )


def changed_call(model: Model, record: RunRecord) -> dict[str, tuple[float, float]]:
    """By name, what the pipeline was called with in training and is not called with now, and what with now.

    Records of older versions of rats do not say how it was called.
    """
    there = record.call or {}
    return {name: (there[name], here) for name, here in model.call().items() if there.get(name, here) != here}


def check_grid(model: Model, run: Path, record: RunRecord) -> None:
    """A student must draw on the sigmas that it was trained on.

    Raises DataError where the scheduler now gives others: another version of diffusers, scheduler or resolution.
    """
    for steps, there in (record.sigmas or {}).items():
        here = model.sigmas([steps])[steps]
        if _differ(here, there):
            raise DataError(
                f"{run} was trained on the sigmas {_listed(there)} for {steps} steps, by diffusers "
                f"{record.diffusers}; the scheduler gives {_listed(here)} by diffusers {diffusers.__version__}",
                "restore diffusers, scheduler and resolution of the run, train again, or give a plain pipeline the "
                "run's own by sigmas= (docs/export.md)",
            )


def _differ(here: Sequence[float], there: Sequence[float]) -> bool:
    pairs = zip(here, there, strict=False)
    return len(here) != len(there) or any(abs(a - b) > ROUNDING for a, b in pairs)


def _listed(sigmas: Sequence[float]) -> str:
    return ", ".join(f"{sigma:.4g}" for sigma in sigmas)
