"""Paired 95 % intervals over *concepts*: prompts of one concept are not independent.

Student's t with the standard error of the delete-one jackknife: each concept is left out in turn, for every system and
metric alike. For a mean over equally large concepts that is the textbook interval; the percentile bootstrap is too
narrow for a few dozen concepts. Shapes: N samples, C concepts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import mpmath
import numpy as np
from numpy.typing import NDArray

from rats.schemas.errors import ConfigError, DataError

Array = NDArray[np.float64]
Rows = NDArray[np.intp]
Interval = tuple[float, float]

LEVEL = 0.95


class PairedEstimate(NamedTuple):
    """A system's value and its difference to the reference, each with its 95 % interval."""

    mean: float
    ci: Interval
    delta: float
    delta_ci: Interval


def leave_one_out(num_concepts: int) -> Array:
    """How often each concept counts where one of them is left out: (C, C), zeros on the diagonal, else ones.

    Raises ConfigError for fewer than two concepts, which say nothing about other concepts.
    """
    if num_concepts < 2:
        raise ConfigError(
            f"an interval over concepts needs at least 2 concepts, the prompts have {num_concepts}: "
            "add prompts of another concept to the test split"
        )
    return 1.0 - np.eye(num_concepts)


def interval(value: float, without_C: Array) -> Interval:
    """The interval of `value` from the C values with one concept left out; infinite where one of these is unknown."""
    num_concepts = len(without_C)
    if not np.isfinite(without_C).all():
        return -math.inf, math.inf
    error = math.sqrt((num_concepts - 1) * float(without_C.var()))
    half = student_t(num_concepts - 1) * error
    return value - half, value + half


@cache
def student_t(degrees: int) -> float:
    """The t that a variable of Student's distribution exceeds in size once in twenty: 12.71 for 1 degree of freedom."""

    def beyond(t: float) -> float:
        return mpmath.betainc(degrees / 2, 0.5, 0, degrees / (degrees + t * t), regularized=True) - (1 - LEVEL)

    return float(mpmath.findroot(beyond, (1.9, 13.0), solver="anderson"))


def group(labels: Sequence[str]) -> tuple[list[str], Rows]:
    """Distinct labels in sorted order, and the position of each entry's label among them."""
    names, rows = np.unique(np.asarray(labels, dtype=str), return_inverse=True)
    return names.tolist(), rows.reshape(-1)


def paired_estimate(values_a: Sequence[float], values_b: Sequence[float], concepts: Sequence[str]) -> PairedEstimate:
    """Mean of `values_a` and of `values_a - values_b` over samples (N,) that are paired one to one."""
    a, b = _finite(values_a, "values_a"), _finite(values_b, "values_b")
    if not len(a) == len(b) == len(concepts):
        raise DataError(f"paired samples differ in number: {len(a)}, {len(b)} and {len(concepts)} concepts")
    names, rows = group(concepts)
    kept = leave_one_out(len(names))
    sizes = np.bincount(rows).astype(np.float64)

    def around(values: Array) -> tuple[float, Interval]:
        sums = np.bincount(rows, weights=values)
        mean = float(values.mean())
        return mean, interval(mean, (kept @ sums) / (kept @ sizes))

    return PairedEstimate(*around(a), *around(a - b))


def _finite(values: Sequence[float], what: str) -> Array:
    """As float64; DataError for NaN, inf or nothing at all."""
    array = np.asarray(values, np.float64)
    if not len(array) or not np.isfinite(array).all():
        raise DataError(f"{what} has {len(array)} values, {int((~np.isfinite(array)).sum())} of them not finite")
    return array
