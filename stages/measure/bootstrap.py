"""Paired 95 % bootstrap intervals that resample *concepts*: prompts of one concept are not independent.

Pure numpy. Shapes: N and M samples, C concepts, R resamples. A resample draws C concepts with
replacement, the same ones for every system and metric, and is held as counts (R, C).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from rats.schemas.errors import ConfigError, DataError

Array = NDArray[np.float64]
Rows = NDArray[np.intp]
Interval = tuple[float, float]

LEVELS = (2.5, 97.5)
"""Percentiles of a 95 % interval."""


class PairedEstimate(NamedTuple):
    """A system's value and its difference to the reference, each with its 95 % interval."""

    mean: float
    ci: Interval
    delta: float
    delta_ci: Interval


def resample(num_concepts: int, n: int, seed: int) -> Array:
    """How often each concept was drawn in each of `n` resamples: (R, C), every row sums to C.

    Raises ConfigError for fewer than two concepts, which say nothing about other concepts.
    """
    if num_concepts < 2:
        raise ConfigError(
            f"an interval over concepts needs at least 2 concepts, the prompts have {num_concepts}: "
            "add prompts of another concept to the test split"
        )
    rng = np.random.default_rng(seed)
    return rng.multinomial(num_concepts, np.full(num_concepts, 1 / num_concepts), size=n).astype(np.float64)


def group(labels: Sequence[str]) -> tuple[list[str], Rows]:
    """Distinct labels in sorted order, and the position of each entry's label among them."""
    names, rows = np.unique(np.asarray(labels, dtype=str), return_inverse=True)
    return names.tolist(), rows.reshape(-1)


def paired_bootstrap(
    values_a: Sequence[float], values_b: Sequence[float], concepts: Sequence[str], n: int, seed: int
) -> PairedEstimate:
    """Mean of `values_a` and of `values_a - values_b` over samples (N,) that are paired one to one."""
    a, b = _finite(values_a, "values_a"), _finite(values_b, "values_b")
    if not len(a) == len(b) == len(concepts):
        raise DataError(f"paired samples differ in number: {len(a)}, {len(b)} and {len(concepts)} concepts")
    names, rows = group(concepts)
    counts = resample(len(names), n, seed)
    sizes = np.bincount(rows, minlength=len(names)).astype(np.float64)

    def ratio(values: Array) -> Array:
        return (counts @ np.bincount(rows, weights=values, minlength=len(names))) / (counts @ sizes)

    return PairedEstimate(float(a.mean()), _interval(ratio(a)), float((a - b).mean()), _interval(ratio(a - b)))


def _finite(values: Sequence[float], what: str) -> Array:
    """As float64; DataError for NaN, inf or nothing at all."""
    array = np.asarray(values, np.float64)
    if not len(array) or not np.isfinite(array).all():
        raise DataError(f"{what} has {len(array)} values, {int((~np.isfinite(array)).sum())} of them not finite")
    return array


def _interval(values: Array) -> Interval:
    low, high = np.nanpercentile(values, LEVELS)
    return float(low), float(high)
