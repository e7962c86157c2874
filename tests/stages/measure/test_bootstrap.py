"""The intervals: what they cover, what they resample, and what they refuse."""

from __future__ import annotations

import numpy as np
import pytest

from rats.schemas.errors import ConfigError, DataError
from rats.stages.measure import bootstrap as st
from rats.stages.measure.features import kernel
from rats.stages.measure.kid import RealSet, paired_kid, resampled_kid


def drawn(seed: int, concepts: int, each: int, between: float, within: float) -> tuple[np.ndarray, list[str]]:
    """Values with a concept effect, and the concept of each."""
    rng = np.random.default_rng(seed)
    values = rng.normal(0, between, concepts).repeat(each) + rng.normal(0, within, concepts * each)
    return values, [f"c{i:02d}" for i in range(concepts) for _ in range(each)]


def test_the_mean_and_the_difference_are_the_plain_ones():
    result = st.paired_bootstrap([1.0, 2.0, 6.0], [0.0, 0.0, 3.0], ["a", "b", "b"], n=200, seed=0)
    assert result.mean == 3.0 and result.delta == 2.0
    assert result.ci[0] <= 3.0 <= result.ci[1] and result.delta_ci[0] <= 2.0 <= result.delta_ci[1]


def test_a_constant_difference_has_an_interval_of_no_width():
    values, concepts = drawn(0, concepts=12, each=3, between=1, within=1)
    result = st.paired_bootstrap(values + 0.25, values, concepts, n=300, seed=1)
    assert result.delta_ci == pytest.approx((0.25, 0.25)) and result.ci[1] - result.ci[0] > 0.3


def test_prompts_of_one_concept_do_not_count_as_independent():
    values, concepts = drawn(3, concepts=20, each=10, between=1.0, within=0.01)
    by_concept = st.paired_bootstrap(values, values * 0, concepts, n=500, seed=0).ci
    by_sample = st.paired_bootstrap(values, values * 0, [str(i) for i in range(len(values))], n=500, seed=0).ci
    assert (by_concept[1] - by_concept[0]) > 2 * (by_sample[1] - by_sample[0])


def test_the_interval_covers_the_truth_about_nineteen_times_in_twenty():
    hits = 0
    for seed in range(200):
        values, concepts = drawn(seed, concepts=24, each=4, between=0.5, within=1)
        low, high = st.paired_bootstrap(values, values * 0, concepts, n=300, seed=seed).ci
        hits += low <= 0 <= high
    assert 176 <= hits <= 199


def test_order_of_samples_does_not_move_the_interval():
    values, concepts = drawn(5, concepts=8, each=3, between=1, within=1)
    order = np.random.default_rng(0).permutation(len(values))
    first = st.paired_bootstrap(values, values**2, concepts, n=200, seed=4)
    second = st.paired_bootstrap(values[order], values[order] ** 2, [concepts[i] for i in order], n=200, seed=4)
    assert np.allclose(np.hstack(first), np.hstack(second))


def test_one_concept_is_refused_with_the_way_out():
    with pytest.raises(ConfigError, match="at least 2 concepts, the prompts have 1: add prompts"):
        st.paired_bootstrap([1.0, 2.0], [0.0, 0.0], ["cat", "cat"], n=10, seed=0)


def test_values_that_are_not_finite_are_refused():
    with pytest.raises(DataError, match="values_a has 2 values, 1 of them not finite"):
        st.paired_bootstrap([1.0, float("nan")], [0.0, 0.0], ["a", "b"], n=10, seed=0)


def test_samples_that_are_not_paired_are_refused():
    with pytest.raises(DataError, match="differ in number: 2, 1"):
        st.paired_bootstrap([1.0, 2.0], [0.0], ["a", "b"], n=10, seed=0)


def features(seed: int, n: int, shift: float = 0.0) -> np.ndarray:
    return np.random.default_rng(seed).normal(shift, 1, (n, 16))


def plain_kid(a: np.ndarray, b: np.ndarray) -> float:
    """KID by its textbook formula."""
    kaa, kbb, kab = kernel(a, a), kernel(b, b), kernel(a, b)
    n, m = len(a), len(b)
    inside = (kaa.sum() - np.trace(kaa)) / (n * (n - 1)) + (kbb.sum() - np.trace(kbb)) / (m * (m - 1))
    return float(inside - 2 * kab.mean())


def test_kid_of_a_single_concept_is_the_textbook_formula():
    fake, real = features(0, 7, 0.3), features(1, 11)
    distance = RealSet(real, ["a"] * 11, ["a"]).distance(fake, ["a"] * 7)
    assert resampled_kid(distance, np.ones(1), np.ones((1, 1)))[0] == pytest.approx(plain_kid(fake, real))


def test_kid_of_many_concepts_is_near_the_textbook_formula():
    concepts = [f"c{i}" for i in range(20) for _ in range(10)]
    fake, real = features(0, 200, 0.3), features(1, 200)
    distance = RealSet(real, concepts, concepts).distance(fake, concepts)
    ours = paired_kid(distance, distance, concepts, n=100, seed=0)
    assert ours.mean == pytest.approx(plain_kid(fake, real), rel=0.1)
    assert ours.ci[0] < ours.mean < ours.ci[1] and ours.delta_ci == (0.0, 0.0)


def test_kid_of_pictures_like_the_real_ones_is_zero_in_the_mean():
    concepts = [f"c{i}" for i in range(12) for _ in range(5)]
    centres = features(99, 12).repeat(5, axis=0) * 2
    found = []
    for seed in range(40):
        real = RealSet(centres + features(seed, 60), concepts, concepts)
        distance = real.distance(centres + features(1000 + seed, 60), concepts)
        found.append(paired_kid(distance, distance, concepts, n=2, seed=0).mean)
    assert abs(np.mean(found)) < 3 * np.std(found) / np.sqrt(len(found))


def test_the_resampled_kid_is_centred_on_the_estimate_though_concepts_repeat():
    concepts = [f"c{i}" for i in range(24) for _ in range(6)]
    centres = features(7, 24).repeat(6, axis=0) * 2
    real = RealSet(centres + features(1, 144), concepts, concepts)
    distance = real.distance(centres + 0.2 + features(2, 144), concepts)
    shares, once = np.full(24, 1 / 24), np.ones((1, 24))
    many = resampled_kid(distance, shares, st.resample(24, 4000, 0))
    assert many.mean() == pytest.approx(resampled_kid(distance, shares, once)[0], abs=0.2 * many.std())


def test_concepts_without_real_pictures_are_held_against_the_whole_real_set():
    concepts = ["x", "x", "y", "y"]
    fake, real = features(0, 4, 0.5), features(1, 9)
    distance = RealSet(real, ["a"] * 9, concepts).distance(fake, concepts)
    shares, once = np.full(2, 0.5), np.ones((1, 2))
    assert resampled_kid(distance, shares, once)[0] == pytest.approx(plain_kid(fake, real), rel=0.5)


def test_a_concept_with_one_picture_leaves_its_own_block_out_and_stays_finite():
    concepts = ["a", "b", "c"]
    real = RealSet(features(1, 12), ["a", "b", "c"] * 4, concepts)
    distance = real.distance(features(0, 3, 1.0), concepts)
    assert np.isnan(np.diag(distance)).all()
    result = paired_kid(distance, distance, concepts, n=50, seed=0)
    assert np.isfinite([result.mean, *result.ci]).all()
