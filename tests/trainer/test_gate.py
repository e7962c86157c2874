"""The gate's direction, order, tie and bounds."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rats.schemas.errors import ConfigError, DataError
from rats.schemas.train_params import GateParams, Ramp, TrainParams
from rats.trainer.gate import FORMS, WeightedReward, gate, gate_all, score_std, weighted_sum

patient = settings(deadline=None, max_examples=60)
scores = st.floats(-50, 50, width=32)
taus = st.floats(1e-3, 10)


def one(form: str, teacher: float, student: float, tau: float, value: float | None = None) -> float:
    return float(gate(form, torch.tensor([teacher]), torch.tensor([student]), tau, value))


@patient
@given(scores, scores, taus)
def test_the_gate_is_above_one_half_exactly_where_the_teacher_is_better(teacher, student, tau):
    g = one("rats", teacher, student, tau)
    assert (g > 0.5) == (teacher - student > 1e-6 * tau) or abs(teacher - student) <= 1e-6 * tau


def test_the_gate_has_the_direction_of_the_papers_text_and_not_of_its_figure():
    assert one("rats", teacher=0.3, student=0.2, tau=0.05) == pytest.approx(0.8808, abs=1e-4)
    assert one("figure", teacher=0.3, student=0.2, tau=0.05) == pytest.approx(0.1192, abs=1e-4)


@patient
@given(scores, taus)
def test_the_gate_is_one_half_at_a_tie(score, tau):
    assert one("rats", score, score, tau) == 0.5
    assert one("figure", score, score, tau) == 0.5


@patient
@given(scores, scores, scores, taus)
def test_the_gate_never_rises_when_the_student_gets_better(teacher, student, other, tau):
    worse, better = sorted((student, other))
    assert one("rats", teacher, worse, tau) >= one("rats", teacher, better, tau)
    assert one("figure", teacher, worse, tau) <= one("figure", teacher, better, tau)


@patient
@given(st.sampled_from(sorted(FORMS)), scores, scores, taus)
def test_every_form_stays_within_zero_and_one(form, teacher, student, tau):
    assert 0.0 <= one(form, teacher, student, tau, value=0.35) <= 1.0


@patient
@given(scores, scores, taus)
def test_the_two_directions_are_mirror_images(teacher, student, tau):
    assert one("rats", teacher, student, tau) == one("figure", student, teacher, tau)


def test_the_gate_is_float32_per_sample_and_passes_no_gradient():
    student = torch.tensor([0.1, 0.2, 0.3], dtype=torch.bfloat16, requires_grad=True)
    g = gate("rats", torch.tensor([0.2, 0.2, 0.2]), student, 0.1)
    assert g.dtype == torch.float32 and g.shape == (3,) and not g.requires_grad


def test_constant_and_off_ignore_the_scores():
    assert one("constant", 5.0, -5.0, 0.1, value=0.35) == pytest.approx(0.35)
    assert one("off", 5.0, -5.0, 0.1) == 1.0


def test_a_constant_without_a_value_is_refused():
    with pytest.raises(ConfigError, match=r"train\.gate\.value_from"):
        one("constant", 0.0, 0.0, 0.1)


def test_an_unknown_form_is_refused_with_the_known_ones():
    with pytest.raises(ConfigError, match="rats, figure, constant, off"):
        one("sigmoid", 0.0, 0.0, 0.1)


def test_the_default_tau_is_the_spread_of_the_teachers_scores():
    assert score_std([1.0, 3.0]) == 1.0


@pytest.mark.parametrize("scores", [[], [0.3], [0.3, 0.3], [0.3, float("nan")]])
def test_scores_without_a_spread_give_no_tau(scores):
    with pytest.raises(DataError, match=r"set train\.gate\.tau"):
        score_std(scores)


def test_whose_scores_have_no_spread_is_said_with_a_way_out_that_helps():
    with pytest.raises(DataError, match=r"the teacher's hps 2 scores have no usable spread \(0.0\): leave it out"):
        score_std([0.3, 0.3], "the teacher's hps", "leave it out")


PARTS = (WeightedReward("hpsv2", 2.0, 0.02), WeightedReward("pickscore", 1.0, 1.5))


@patient
@given(st.tuples(scores, scores), st.tuples(scores, scores))
def test_several_rewards_are_added_in_units_of_their_spreads(teacher, student):
    r_teacher_RB, r_student_RB = torch.tensor([teacher, student]), torch.tensor([student, teacher])
    g_B = gate_all(GateParams(), r_teacher_RB, r_student_RB, PARTS, tau=0.5)
    gap_B = 2 * (r_teacher_RB[0] - r_student_RB[0]) / 0.02 + (r_teacher_RB[1] - r_student_RB[1]) / 1.5
    torch.testing.assert_close(g_B, torch.sigmoid(gap_B / 0.5), rtol=1e-3, atol=1e-4)


def test_a_gate_for_each_reward_is_their_weighted_mean():
    r_teacher_RB, r_student_RB = torch.tensor([[0.30], [20.0]]), torch.tensor([[0.28], [23.0]])
    g_B = gate_all(GateParams(each=True), r_teacher_RB, r_student_RB, PARTS, tau=1.0)
    expected = (2 * torch.sigmoid(torch.tensor(1.0)) + torch.sigmoid(torch.tensor(-2.0))) / 3
    torch.testing.assert_close(g_B, expected[None], rtol=1e-5, atol=1e-6)


def test_a_reward_alone_is_gated_in_its_own_unit_to_the_last_bit():
    r_teacher_RB, r_student_RB = torch.randn(1, 9), torch.randn(1, 9)
    alone = gate("rats", r_teacher_RB[0], r_student_RB[0], 0.3)
    assert torch.equal(gate_all(GateParams(), r_teacher_RB, r_student_RB, (WeightedReward(),), 0.3), alone)
    assert torch.equal(weighted_sum(r_teacher_RB, (WeightedReward(),)), r_teacher_RB[0])


def test_alpha_is_constant_or_by_nfe_or_moves_in_a_straight_line():
    constant, by_nfe, ramp = (
        TrainParams(reward="r", nfe=(3, 8), alpha=alpha)
        for alpha in (2.0, {3: 2.0, 8: 1.0}, Ramp(start=4.0, end=1.0, over=30))
    )
    assert constant.alpha_at(8, 99) == 2.0
    assert (by_nfe.alpha_at(3, 0), by_nfe.alpha_at(8, 0)) == (2.0, 1.0)
    assert [ramp.alpha_at(3, step) for step in (0, 10, 30, 99)] == [4.0, 3.0, 1.0, 1.0]
