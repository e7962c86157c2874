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


class Paired(NamedTuple):
    """A system's value and its difference to the reference, each with its 95 % interval."""

    mean: float
    ci: Interval
    delta: float
    delta_ci: Interval


def resample(num_concepts: int, n: int, seed: int) -> Array:
    """How often each concept was drawn in each of `n` resamples: (R, C), every row sums to C.

    Raises ConfigError below two concepts, where nothing can be said about an unseen one.
    """
    if num_concepts < 2:
        raise ConfigError(
            f"an interval over concepts needs at least 2 concepts, the prompts have {num_concepts}: "
            "add prompts of another concept to the test split"
        )
    rng = np.random.default_rng(seed)
    return rng.multinomial(num_concepts, np.full(num_concepts, 1 / num_concepts), size=n).astype(np.float64)


def group(labels: Sequence[str]) -> tuple[list[str], Rows]:
    """Distinct labels, sorted, and each entry's position among them."""
    names, rows = np.unique(np.asarray(labels, dtype=str), return_inverse=True)
    return names.tolist(), rows.reshape(-1)


def paired(values_a: Sequence[float], values_b: Sequence[float], concepts: Sequence[str], n: int, seed: int) -> Paired:
    """Mean of `values_a` and of `values_a - values_b` over samples (N,) that are paired one to one."""
    a, b = _finite(values_a, "values_a"), _finite(values_b, "values_b")
    if not len(a) == len(b) == len(concepts):
        raise DataError(f"paired samples differ in number: {len(a)}, {len(b)} and {len(concepts)} concepts")
    names, rows = group(concepts)
    counts = resample(len(names), n, seed)
    sizes = np.bincount(rows, minlength=len(names)).astype(np.float64)

    def ratio(values: Array) -> Array:
        return (counts @ np.bincount(rows, weights=values, minlength=len(names))) / (counts @ sizes)

    return Paired(float(a.mean()), _interval(ratio(a)), float((a - b).mean()), _interval(ratio(a - b)))


def block_means(kernel_NM: Array, rows_N: Rows, rows_M: Rows, size_N: int, size_M: int) -> Array:
    """Mean kernel between the concepts of two sets: (size_N, size_M)."""
    left, right = np.eye(size_N)[rows_N], np.eye(size_M)[rows_M]
    return (left.T @ kernel_NM @ right) / np.outer(left.sum(0), right.sum(0))


def own_block_means(kernel_NN: Array, rows_N: Rows, size: int) -> Array:
    """As `block_means` of a set with itself, without a sample's kernel with itself; NaN for a lone sample."""
    means = block_means(kernel_NN, rows_N, rows_N, size, size)
    counts = np.bincount(rows_N, minlength=size).astype(np.float64)
    itself = np.bincount(rows_N, weights=np.diag(kernel_NN), minlength=size)
    diagonal = np.full(size, np.nan)
    many = counts > 1
    total = np.diag(means) * counts**2 - itself
    diagonal[many] = total[many] / (counts * (counts - 1))[many]
    means[np.diag_indices(size)] = diagonal
    return means


def kid(distance_CC: Array, shares_C: Array, counts_RC: Array) -> Array:
    """KID of each resample, (R,), for concepts with the given shares of the pictures.

    A concept that was drawn twice is two clusters of equal pictures; pairs *between* the copies would say that
    pictures of different concepts are alike, so a concept's own block counts once a copy and not squared.
    """
    weights = counts_RC * shares_C
    own = np.diag(distance_CC)
    known = np.isfinite(own)
    between = distance_CC.copy()
    np.fill_diagonal(between, 0)
    own_share = np.where(known, shares_C**2, 0)
    total = ((weights @ between) * weights).sum(1) + counts_RC @ np.where(known, own_share * own, 0)
    pairs = weights.sum(1) ** 2 - (weights**2).sum(1) + counts_RC @ own_share
    return np.divide(total, pairs, out=np.full(len(total), np.nan), where=pairs > 0)


def paired_kid(distance_a: Array, distance_b: Array, concepts: Sequence[str], n: int, seed: int) -> Paired:
    """KID of system a, and its difference to b's, from `quality.RealSet.distance` of both."""
    names, rows = group(concepts)
    shares = np.bincount(rows, minlength=len(names)) / len(rows)
    once = np.ones((1, len(names)))
    counts = resample(len(names), n, seed)
    a, b = (float(kid(d, shares, once)[0]) for d in (distance_a, distance_b))
    many_a, many_b = (kid(d, shares, counts) for d in (distance_a, distance_b))
    return Paired(a, _interval(many_a), a - b, _interval(many_a - many_b))


def _finite(values: Sequence[float], what: str) -> Array:
    """As float64; DataError for NaN, inf or nothing at all."""
    array = np.asarray(values, np.float64)
    if not len(array) or not np.isfinite(array).all():
        raise DataError(f"{what} has {len(array)} values, {int((~np.isfinite(array)).sum())} of them not finite")
    return array


def _interval(values: Array) -> Interval:
    low, high = np.nanpercentile(values, LEVELS)
    return float(low), float(high)
