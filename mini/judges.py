"""What two networks that nobody here trained say of samples: kernel distance and recognition, over concepts."""

from __future__ import annotations

import numpy as np

from rats.stages.measure.features import kernel, kid_by_sample, mean_off_diagonal, recognised

STUDENT_T = 1.99
"""The 97.5 % point of Student's t for 79 degrees of freedom: 80 judged concepts."""


def by_concept(values: np.ndarray, concepts: np.ndarray) -> tuple[float, float]:
    """Mean over concepts of each concept's mean, and the half-width of its 95 % interval."""
    means = np.array([values[concepts == c].mean() for c in np.unique(concepts)])
    half = STUDENT_T * means.std(ddof=1) / np.sqrt(len(means))
    return float(means.mean()), float(half)


def distance(features: np.ndarray, concepts: np.ndarray, real: np.ndarray) -> tuple[float, float]:
    """KID to the real features with its half-width over concepts."""
    own = mean_off_diagonal(kernel(real, real))
    return by_concept(kid_by_sample(features, real, own), concepts)


def recognition(
    features: np.ndarray, concepts: np.ndarray, real: np.ndarray, real_concepts: np.ndarray
) -> tuple[float, float]:
    """Share of pictures whose nearest mean of real pictures (cosine, centred) is their own concept's."""
    return by_concept(recognised(features, concepts.tolist(), real, real_concepts.tolist()), concepts)
