"""What a judge's features say of pictures: kernel distance (KID), recognition, and diversity within a prompt."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rats.schemas.errors import ConfigError


def kernel(features_a: ArrayLike, features_b: ArrayLike) -> NDArray[np.float64]:
    """Polynomial kernel (n, m) of features (n, d) and (m, d): (x . y / d + 1)^3 (Binkowski et al. 2018)."""
    a, b = np.asarray(features_a, np.float64), np.asarray(features_b, np.float64)
    return (a @ b.T / a.shape[1] + 1) ** 3


def kid(features_a: ArrayLike, features_b: ArrayLike) -> float:
    """Unbiased squared kernel distance of two sets of features, 0 in the mean for equal distributions.

    Raises ConfigError for fewer than two samples on a side.
    """
    a, b = np.asarray(features_a, np.float64), np.asarray(features_b, np.float64)
    if min(len(a), len(b)) < 2:
        raise ConfigError(f"KID needs two samples on each side, not {len(a)} and {len(b)}: evaluate more prompts")
    return mean_off_diagonal(kernel(a, a)) + mean_off_diagonal(kernel(b, b)) - 2 * float(kernel(a, b).mean())


def kid_by_sample(features_a: ArrayLike, features_b: ArrayLike, own_b: float) -> NDArray[np.float64]:
    """Contribution of each sample of the first set to `kid`, (n,). Their mean is `kid`; their spread gives its error.

    To first order, these are the jackknife's pseudo-values. `own_b`: `mean_off_diagonal` of the second set's kernel.
    """
    a = np.asarray(features_a, np.float64)
    within, across = kernel(a, a), kernel(a, features_b).mean(1)
    own = (within.sum(1) - np.diag(within)) / (len(a) - 1)
    total = own.mean() + own_b - 2 * across.mean()
    return total + 2 * (own - own.mean()) - 2 * (across - across.mean())


def diversity_by_sample(features: ArrayLike) -> NDArray[np.float64]:
    """As `kid_by_sample`, for the mean pairwise cosine distance of all samples: (n,), in [0, 2]."""
    values = np.asarray(features, np.float64)
    unit = values / np.maximum(np.linalg.norm(values, axis=1, keepdims=True), 1e-12)
    own = (1 - unit @ unit.T).sum(1) / (len(unit) - 1)
    return own.mean() + 2 * (own - own.mean())


def mean_off_diagonal(matrix: NDArray[np.float64]) -> float:
    """Mean of all entries but those of the diagonal."""
    n = len(matrix)
    return float((matrix.sum() - np.trace(matrix)) / (n * (n - 1)))


def diversity_by_group(features: ArrayLike, groups: Sequence[Hashable]) -> dict[Hashable, float]:
    """Mean pairwise cosine distance within each group (a prompt) that has two samples or more, in [0, 2]."""
    values = np.asarray(features, np.float64)
    unit = values / np.maximum(np.linalg.norm(values, axis=1, keepdims=True), 1e-12)
    members: dict[Hashable, list[int]] = {}
    for index, group in enumerate(groups):
        members.setdefault(group, []).append(index)
    distances = {group: 1 - unit[rows] @ unit[rows].T for group, rows in members.items() if len(rows) > 1}
    return {group: mean_off_diagonal(matrix) for group, matrix in distances.items()}


def diversity(features: ArrayLike, groups: Sequence[Hashable]) -> float:
    """Mean of `diversity_by_group` over groups; nan when no group has two samples."""
    distances = diversity_by_group(features, groups)
    return float(np.mean(list(distances.values()))) if distances else float("nan")


def recognised(
    features: ArrayLike, concepts: Sequence[str], real: ArrayLike, real_concepts: Sequence[str]
) -> NDArray[np.float64]:
    """1.0 for each picture whose nearest mean of real pictures is that of its own concept, else 0.0, (n,).

    Nearest by the cosine of features (n, d) around the mean of all real ones (m, d), whose means are taken by concept.
    A concept without a real picture is never recognised.
    """
    seen, labels = np.asarray(real, np.float64), np.asarray(real_concepts, dtype=str)
    names, middle = np.unique(labels), seen.mean(0)
    means = np.stack([seen[labels == name].mean(0) for name in names]) - middle
    unit = means / np.maximum(np.linalg.norm(means, axis=1, keepdims=True), 1e-12)
    nearest = ((np.asarray(features, np.float64) - middle) @ unit.T).argmax(1)
    return (names[nearest] == np.asarray(concepts, dtype=str)).astype(np.float64)
