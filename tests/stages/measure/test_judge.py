"""The judge's features and its two distances."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch

from rats.schemas.errors import ConfigError
from rats.stages.measure.judge import DIMENSION, Judge, diversity, diversity_by_group, kernel, kid


def test_features_depend_on_the_picture_and_not_on_its_company() -> None:
    judge, pictures = Judge(), torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    together, alone = judge.features(pictures), judge.features(pictures[1:2])
    assert together.shape == (3, DIMENSION) and together.dtype == torch.float32
    torch.testing.assert_close(together[1:2], alone, atol=1e-4, rtol=1e-4)
    assert float((together[0] - together[1]).abs().max()) > 0.01


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


def test_too_few_samples_and_a_missing_package_are_config_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="two samples on each side, not 1 and 3"):
        kid(np.ones((1, 2)), np.ones((3, 2)))
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    with pytest.raises(ConfigError, match="pip install efficientnet-lite-pytorch"):
        Judge()
