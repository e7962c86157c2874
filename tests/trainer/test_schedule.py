"""The learning rate's schedule, which hangs on nothing that may differ when a run goes on."""

from __future__ import annotations

from dataclasses import fields

import pytest

from rats.schemas.train_params import TrainParams
from rats.stages.train.source import NOT_IN_SETTINGS
from rats.trainer.optim import Learner, Schedule
from tests.support import toy


def test_the_learning_rate_warms_up_linearly_and_stays():
    assert [Schedule(0.6, 4).at(step) for step in range(6)] == pytest.approx([0.15, 0.3, 0.45, 0.6, 0.6, 0.6])
    assert Schedule(0.6, 0).at(0) == 0.6


@pytest.mark.parametrize(
    ("name", "rates"),
    [("linear", [0.3, 0.6, 0.6, 0.45, 0.3, 0.15]), ("cosine", [0.3, 0.6, 0.6, 0.5121, 0.3, 0.0879])],
)
def test_after_the_warm_up_the_rate_falls_to_nothing_at_its_own_length(name: str, rates: list[float]):
    schedule = Schedule(0.6, 2, name, 6)
    assert [schedule.at(step) for step in range(6)] == pytest.approx(rates, abs=5e-5)
    assert schedule.at(6) == pytest.approx(0.0, abs=1e-12)


def test_the_length_of_a_falling_rate_is_that_of_the_training_it_was_set_for():
    assert toy.settings(steps=9).train.lr_steps is None
    assert toy.settings(steps=9, lr_schedule="cosine").train.lr_steps == 9
    assert toy.settings(steps=9, lr_schedule="cosine", lr_steps=13).train.lr_steps == 13


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"steps": 9, "lr_steps": 8}, "the rate is 0 from there on, and train.steps is 9"),
        ({"steps": 3, "warmup": 3}, "the warm-up alone takes train.warmup = 3"),
    ],
)
def test_a_rate_that_would_train_nothing_is_refused(changes: dict[str, int], words: str):
    with pytest.raises(ValueError, match=words):
        toy.settings(lr_schedule="linear", **changes)


def test_the_optimizer_takes_the_rate_of_the_step(tmp_path):
    run = toy.train_in(tmp_path, toy.settings(lr=0.06, lr_schedule="linear", lr_steps=8))
    rates = [float(row["lr"]) for row in run.logs["metrics.csv"].rows()]
    assert rates == pytest.approx([0.03, 0.06, 0.06, 0.05, 0.04, 0.03])
    assert run.learner.optimizer.param_groups[0]["lr"] == rates[-1]


def test_a_schedule_sees_fields_that_are_in_the_settings_hash_and_nothing_else():
    names = {field.name for field in fields(Schedule)}
    assert names <= set(TrainParams.model_fields) and not names & set(NOT_IN_SETTINGS)
    learner = Learner(toy.ToyStudent().network, toy.settings(lr=0.3, warmup=7).train)
    assert learner.schedule == Schedule(0.3, 7)
