"""The rules against reward hacking, on looks that are written down by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rats.schemas.errors import DataError
from rats.stages.measure.features import diversity, diversity_by_sample, kernel, kid, kid_by_sample, mean_off_diagonal
from rats.stages.train.guard.rules import (
    Roles,
    ValidationScores,
    alarms_in_a_row,
    best_step,
    mean_change,
    panel_columns,
    panel_row,
    relative_change,
    sample_std,
)

NFE = (3, 8)
CONCEPTS = [f"concept {i // 2}" for i in range(24)]
ROLES = Roles({"trained": 1.0}, ("held out", "judge"))


def look(trained: float, held_out: float, judge: float, noise: float = 0.1, seed: int = 0) -> ValidationScores:
    """Samples of spread about 1, moved by so many spreads with a little noise of their own."""
    base, moved = np.random.default_rng(7), np.random.default_rng(seed)
    shape = (len(NFE), len(CONCEPTS))
    means = {"trained": trained, "held out": held_out, "judge": judge}
    scale = {"trained": 0.01, "held out": 1.0, "judge": 50.0}
    return {
        name: scale[name] * (base.normal(size=shape) + mean + noise * moved.normal(size=shape))
        for name, mean in means.items()
    }


def course(*looks: ValidationScores) -> list[dict[str, str]]:
    """Rows as panel.csv gives them back, one look every 10 steps, each held against the best before it."""
    known, rows = {}, []
    for i, found in enumerate(looks):
        known[10 * i] = found
        best = best_step(rows)
        row = panel_row(10 * i, known, 10 * i if best is None else best, ROLES, NFE, CONCEPTS)
        assert set(row) == set(panel_columns(ROLES, NFE))
        rows.append({name: repr(value) for name, value in row.items()})
    return rows


def alarms(rows: list[dict[str, str]]) -> list[int]:
    return [int(row["alarm"]) for row in rows]


START = look(0, 0, 0, noise=0.0)


def test_the_trained_reward_up_and_the_panel_down_is_an_alarm():
    assert alarms(course(START, look(0.5, -0.5, -0.5, seed=1))) == [0, 1]


@pytest.mark.parametrize("trained, others", [(0.5, 0.5), (0.5, 0.0), (-0.5, -0.5), (-0.5, 0.5), (0, 0)])
def test_anything_else_is_none(trained, others):
    assert alarms(course(START, look(trained, others, others, seed=1))) == [0, 0]


def test_a_rise_of_the_trained_reward_within_its_noise_is_a_rise():
    assert alarms(course(START, look(0.3, -0.8, -0.8, noise=1.0, seed=2)))[1] == 1


def test_one_of_the_panel_that_falls_far_alone_is_an_alarm_though_the_mean_does_not_fall():
    assert alarms(course(START, look(0.5, 0.5, -0.5, seed=1))) == [0, 1]
    assert alarms(course(START, look(0.5, 0.5, -0.1, noise=1.5, seed=1))) == [0, 0]


def test_a_fall_from_the_best_look_counts_though_the_start_was_worse():
    rows = course(START, look(0.5, 1.0, 1.0, seed=1), look(1.0, 0.5, 0.5, seed=2), look(1.1, 1.2, 1.2, seed=3))
    assert alarms(rows) == [0, 0, 1, 0] and [row["against"] for row in rows] == ["0", "0", "10", "10"]
    assert float(rows[2]["panel"]) > 0 > float(rows[2]["panel_since"])


def test_a_fall_within_the_noise_of_few_prompts_is_no_alarm():
    assert alarms(course(START, look(0.5, -0.2, -0.2, noise=3.0, seed=4))) == [0, 0]


def test_changes_are_in_spreads_so_that_no_metric_outweighs_another_by_its_scale():
    row = course(START, look(0.5, -0.4, 0.4, noise=0.0, seed=1))[1]
    assert float(row["trained"]) == pytest.approx(0.5, abs=0.15) and abs(float(row["panel"])) < 0.1
    assert float(row["judge_delta"]) == pytest.approx(20.0) and float(row["trained_delta"]) == pytest.approx(0.005)
    assert float(row["judge_mean"]) == pytest.approx((float(row["judge_3"]) + float(row["judge_8"])) / 2)


def test_several_trained_rewards_count_by_their_weights():
    now = {"a": START["trained"] + 0.01 * np.ones((2, 24)), "b": START["judge"]}
    first = {"a": START["trained"], "b": START["judge"]}
    whole = relative_change(now, first, first, {"a": 1.0, "b": 1.0})
    assert relative_change(now, first, first, {"a": 3.0, "b": 1.0}) == pytest.approx(1.5 * whole)


def test_the_noise_of_prompts_that_stand_alone_is_the_standard_error_of_the_mean():
    values = np.random.default_rng(0).normal(size=50)
    found = mean_change(values, [str(i) for i in range(50)])
    assert found == pytest.approx((values.mean(), values.std(ddof=1) / np.sqrt(50)))


def test_prompts_of_one_concept_that_move_together_count_once():
    values, concepts = np.random.default_rng(0).normal(size=10), [str(i) for i in range(10)]
    once, copied = mean_change(values, concepts), mean_change(np.repeat(values, 4), np.repeat(concepts, 4).tolist())
    assert copied == pytest.approx(once)


@settings(max_examples=25)
@given(st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=20), st.floats(0.1, 100))
def test_a_change_scales_with_its_values(values, factor):
    concepts = [str(i % 3) for i in range(len(values))]
    one, many = mean_change(np.array(values), concepts), mean_change(factor * np.array(values), concepts)
    assert many == pytest.approx((factor * one.mean, factor * one.noise), rel=1e-6, abs=1e-6)


def test_a_sample_without_a_score_is_left_out_and_two_are_needed():
    values = np.array([1.0, np.nan, 3.0])
    assert mean_change(values, ["a", "b", "c"]) == mean_change(values[[0, 2]], ["a", "c"])
    assert np.isnan(mean_change(np.array([1.0, np.nan]), ["a", "b"])).all()


def test_a_metric_that_tells_no_pictures_apart_is_refused_before_training():
    with pytest.raises(DataError, match="held out tells the validation pictures .* not apart.*train.guard.prompts"):
        sample_std("held out", np.ones((2, 5)))
    with pytest.raises(DataError, match="not apart"):
        sample_std("held out", np.full((1, 5), np.nan))


def test_the_best_look_is_the_earliest_with_the_highest_panel_among_those_that_are_asked_for():
    rows = [{"step": str(step), "panel": panel} for step, panel in ((0, "0.0"), (10, "0.5"), (20, "0.5"), (30, "nan"))]
    assert best_step(rows) == 10 and best_step(rows, [20, 30]) == 20
    assert best_step(rows, [30]) is None and best_step([]) is None


def test_alarms_in_a_row_end_with_the_first_look_without_one():
    rows = [{"alarm": a} for a in "1011"]
    assert [alarms_in_a_row(rows[:n]) for n in range(5)] == [0, 1, 0, 1, 2]


def test_the_kid_by_sample_has_the_kid_as_mean_and_its_jackknife_as_spread():
    rng = np.random.default_rng(1)
    a, b = rng.normal(size=(20, 6)) + 0.3, rng.normal(size=(30, 6))
    found = kid_by_sample(a, b, mean_off_diagonal(kernel(b, b)))
    assert found.mean() == pytest.approx(kid(a, b))
    jackknife = [20 * kid(a, b) - 19 * kid(np.delete(a, i, 0), b) for i in range(20)]
    assert found == pytest.approx(np.array(jackknife), abs=0.15 * np.std(jackknife))


def test_the_diversity_by_sample_has_the_diversity_of_the_set_as_mean():
    features = np.random.default_rng(1).normal(size=(9, 6))
    assert diversity_by_sample(features).mean() == pytest.approx(diversity(features, [0] * 9))
