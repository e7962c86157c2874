"""What a step's row says in a few words."""

from __future__ import annotations

from rats.trainer.metrics import note_of


def test_a_step_is_said_in_a_few_words():
    row = {"step": 7, "nfe": 5, "reward_student": 11.25, "reward_teacher": 11.75, "gap": 0.5, "gate_mean": 0.625}
    row |= {"loss_total": -8.12345, "loss_reward": -8.4, "seconds": 2.345, "bad": 3}
    expected = "5 NFE: reward 11.25, teacher 11.75, gap 0.5, gate 0.625, loss -8.123, 2.3 s/step"
    assert note_of(row) == expected


def test_a_step_without_a_score_says_its_time_alone():
    assert note_of({"step": 7, "nfe": 5, "gap": None, "seconds": 2.345}) == "5 NFE: 2.3 s/step"
