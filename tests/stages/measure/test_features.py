"""What a judge's features say: kernel distance, recognition and diversity."""

from __future__ import annotations

import numpy as np
import pytest

from rats.schemas.errors import ConfigError
from rats.stages.measure.features import diversity, diversity_by_group, kernel, kid, recognised


def test_kid_agrees_with_its_definition_written_as_loops() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(4, 6)), rng.normal(size=(5, 6))
    within = [
        np.mean([(x @ y / 6 + 1) ** 3 for i, x in enumerate(s) for j, y in enumerate(s) if i != j]) for s in (a, b)
    ]
    between = np.mean([(x @ y / 6 + 1) ** 3 for x in a for y in b])
    assert kid(a, b) == pytest.approx(sum(within) - 2 * between)
    assert kernel(a, b).shape == (4, 5)


def test_kid_is_unbiased_at_equal_distributions_and_large_at_different_ones() -> None:
    rng = np.random.default_rng(1)
    same = [kid(rng.normal(size=(20, 8)), rng.normal(size=(20, 8))) for _ in range(300)]
    other = kid(rng.normal(size=(20, 8)), rng.normal(1.0, size=(20, 8)))
    assert abs(np.mean(same)) < 4 * np.std(same) / np.sqrt(len(same)) and other > 5 * np.std(same)


def test_diversity_is_measured_within_prompts_only() -> None:
    features = np.eye(4)[[0, 0, 1, 2, 3]]
    assert diversity_by_group(features, ["same", "same", "far", "far", "single"]) == pytest.approx(
        {"same": 0.0, "far": 1.0}
    )
    assert diversity(features, ["same", "same", "far", "far", "single"]) == pytest.approx(0.5)
    assert np.isnan(diversity(features, range(5)))


def test_a_picture_is_recognised_where_its_own_concepts_mean_is_nearest() -> None:
    real = np.array([[5.0, 1.0], [7.0, 3.0], [-2.0, 4.0], [-4.0, 6.0], [-3.0, -8.0]])
    labels = ["fox", "fox", "owl", "owl", "bee"]
    drawn = np.array([[9.0, 2.5], [-5.0, 7.0], [-5.0, 7.0], [0.8, -4.0], [6.0, 2.0]])
    assert recognised(drawn, ["fox", "owl", "fox", "bee", "hen"], real, labels).tolist() == [1, 1, 0, 1, 0]


def test_recognition_looks_around_the_mean_of_the_real_pictures() -> None:
    """Every feature here points the same way from the origin: only what differs from the mean tells concepts apart."""
    real = np.array([[100.0, 2.0], [300.0, -3.0]])
    assert recognised(np.array([[110.0, -1.0]]), ["fox"], real, ["fox", "owl"]).tolist() == [1]


def test_too_few_samples_are_a_config_error() -> None:
    with pytest.raises(ConfigError, match="two samples on each side, not 1 and 3"):
        kid(np.ones((1, 2)), np.ones((3, 2)))
