"""The intervals: what they cover, what they resample, and what they refuse."""

from __future__ import annotations

import numpy as np
import pytest

from rats.schemas.errors import ConfigError, DataError
from rats.stages.measure import intervals as st
from rats.stages.measure.features import kernel
from rats.stages.measure.kid import RealSet, kid_of, paired_kid


def drawn(seed: int, concepts: int, each: int, between: float, within: float) -> tuple[np.ndarray, list[str]]:
    """Values with a concept effect, and the concept of each."""
    rng = np.random.default_rng(seed)
    values = rng.normal(0, between, concepts).repeat(each) + rng.normal(0, within, concepts * each)
    return values, [f"c{i:02d}" for i in range(concepts) for _ in range(each)]


def test_the_mean_and_the_difference_are_the_plain_ones():
    result = st.paired_estimate([1.0, 2.0, 6.0], [0.0, 0.0, 3.0], ["a", "b", "b"])
    assert result.mean == 3.0 and result.delta == 2.0
    assert result.ci[0] <= 3.0 <= result.ci[1] and result.delta_ci[0] <= 2.0 <= result.delta_ci[1]


def test_a_constant_difference_has_an_interval_of_no_width():
    values, concepts = drawn(0, concepts=12, each=3, between=1, within=1)
    result = st.paired_estimate(values + 0.25, values, concepts)
    assert result.delta_ci == pytest.approx((0.25, 0.25)) and result.ci[1] - result.ci[0] > 0.3


def test_prompts_of_one_concept_do_not_count_as_independent():
    values, concepts = drawn(3, concepts=20, each=10, between=1.0, within=0.01)
    by_concept = st.paired_estimate(values, values * 0, concepts).ci
    by_sample = st.paired_estimate(values, values * 0, [str(i) for i in range(len(values))]).ci
    assert (by_concept[1] - by_concept[0]) > 2 * (by_sample[1] - by_sample[0])


@pytest.mark.parametrize("concepts", [6, 24])
def test_the_interval_covers_the_truth_nineteen_times_in_twenty(concepts: int):
    """The percentile bootstrap covers 85 % with 6 concepts and 92.5 % with 24."""
    hits, trials = 0, 2000
    for seed in range(trials):
        values, names = drawn(seed, concepts, each=4, between=0.5, within=1)
        low, high = st.paired_estimate(values, values * 0, names).ci
        hits += low <= 0 <= high
    assert hits / trials == pytest.approx(0.95, abs=0.015)  # three standard errors


def test_concepts_of_different_sizes_are_covered_too():
    hits, trials, sizes = 0, 1000, [1, 2, 3, 9] * 5
    for seed in range(trials):
        effects, (noise, _) = np.random.default_rng(seed).normal(0, 0.5, 20), drawn(seed + trials, 1, sum(sizes), 0, 1)
        names = [f"c{i}" for i, size in enumerate(sizes) for _ in range(size)]
        low, high = st.paired_estimate(effects.repeat(sizes) + noise, noise, names).delta_ci
        hits += low <= 0 <= high
    assert hits / trials == pytest.approx(0.95, abs=0.035)


@pytest.mark.parametrize(("degrees", "t"), [(1, 12.706), (4, 2.776), (23, 2.069), (500, 1.965)])
def test_students_t_is_that_of_the_tables(degrees: int, t: float):
    assert st.student_t(degrees) == pytest.approx(t, abs=5e-4)


def test_the_interval_of_equal_concepts_is_the_textbooks():
    values, concepts = [3.0, 5.0, 10.0, 2.0], ["a", "b", "c", "d"]
    low, high = st.paired_estimate(values, [0.0] * 4, concepts).ci
    half = 3.182 * np.std(values, ddof=1) / 2
    assert (low, high) == pytest.approx((5 - half, 5 + half), abs=2e-3)


def test_order_of_samples_does_not_move_the_interval():
    values, concepts = drawn(5, concepts=8, each=3, between=1, within=1)
    order = np.random.default_rng(0).permutation(len(values))
    first = st.paired_estimate(values, values**2, concepts)
    second = st.paired_estimate(values[order], values[order] ** 2, [concepts[i] for i in order])
    assert np.allclose(np.hstack(first), np.hstack(second))


def test_one_concept_is_refused_with_the_way_out():
    with pytest.raises(ConfigError, match="at least 2 concepts, the prompts have 1: add prompts"):
        st.paired_estimate([1.0, 2.0], [0.0, 0.0], ["cat", "cat"])


def test_values_that_are_not_finite_are_refused():
    with pytest.raises(DataError, match="values_a has 2 values, 1 of them not finite"):
        st.paired_estimate([1.0, float("nan")], [0.0, 0.0], ["a", "b"])


def test_samples_that_are_not_paired_are_refused():
    with pytest.raises(DataError, match="differ in number: 2, 1"):
        st.paired_estimate([1.0, 2.0], [0.0], ["a", "b"])


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
    assert kid_of(distance, np.ones(1), np.ones((1, 1)))[0] == pytest.approx(plain_kid(fake, real))


def test_kid_of_many_concepts_is_near_the_textbook_formula():
    concepts = [f"c{i}" for i in range(20) for _ in range(10)]
    fake, real = features(0, 200, 0.3), features(1, 200)
    distance = RealSet(real, concepts, concepts).distance(fake, concepts)
    ours = paired_kid(distance, distance, concepts)
    assert ours.mean == pytest.approx(plain_kid(fake, real), rel=0.1)
    assert ours.ci[0] < ours.mean < ours.ci[1] and ours.delta_ci == (0.0, 0.0)


def test_kid_of_pictures_like_the_real_ones_is_zero_in_the_mean():
    concepts = [f"c{i}" for i in range(12) for _ in range(5)]
    centres = features(99, 12).repeat(5, axis=0) * 2
    found = []
    for seed in range(40):
        real = RealSet(centres + features(seed, 60), concepts, concepts)
        distance = real.distance(centres + features(1000 + seed, 60), concepts)
        found.append(paired_kid(distance, distance, concepts).mean)
    assert abs(np.mean(found)) < 3 * np.std(found) / np.sqrt(len(found))


def test_kid_without_a_concept_is_that_of_the_others():
    concepts = [f"c{i}" for i in range(5) for _ in range(4)]
    fake, real, others = features(0, 20, 0.4), features(1, 20), slice(4, None)
    distance = RealSet(real, concepts, concepts).distance(fake, concepts)
    rest = RealSet(real[others], concepts[others], concepts[others]).distance(fake[others], concepts[others])
    left = kid_of(distance, np.full(5, 0.2), st.leave_one_out(5))
    assert left[0] == pytest.approx(kid_of(rest, np.full(4, 0.25), np.ones((1, 4)))[0])
    assert len(set(left.round(9))) == 5


def test_the_interval_of_kid_covers_its_truth():
    concepts = [f"c{i}" for i in range(16) for _ in range(3)]
    found = []
    for seed in range(150):
        centres = features(seed, 16).repeat(3, axis=0)
        real = RealSet(centres + features(1000 + seed, 48), concepts, concepts)
        distance = real.distance(centres + 0.5 + features(2000 + seed, 48), concepts)
        found.append(paired_kid(distance, distance, concepts))
    truth = np.mean([estimate.mean for estimate in found])
    assert np.mean([low <= truth <= high for _, (low, high), *_ in found]) == pytest.approx(0.95, abs=0.05)


def test_two_concepts_of_one_picture_each_say_nothing_of_the_kid_of_others():
    real = RealSet(features(1, 8), ["a", "b"] * 4, ["a", "b"])
    result = paired_kid(*[real.distance(features(0, 2, 1.0), ["a", "b"])] * 2, ["a", "b"])
    assert np.isfinite(result.mean) and result.ci == (-np.inf, np.inf)


def test_concepts_without_real_pictures_are_held_against_the_whole_real_set():
    concepts = ["x", "x", "y", "y"]
    fake, real = features(0, 4, 0.5), features(1, 9)
    distance = RealSet(real, ["a"] * 9, concepts).distance(fake, concepts)
    shares, once = np.full(2, 0.5), np.ones((1, 2))
    assert kid_of(distance, shares, once)[0] == pytest.approx(plain_kid(fake, real), rel=0.5)


def test_a_concept_with_one_picture_leaves_its_own_block_out_and_stays_finite():
    concepts = ["a", "b", "c"]
    real = RealSet(features(1, 12), ["a", "b", "c"] * 4, concepts)
    distance = real.distance(features(0, 3, 1.0), concepts)
    assert np.isnan(np.diag(distance)).all()
    result = paired_kid(distance, distance, concepts)
    assert np.isfinite([result.mean, *result.ci]).all()
