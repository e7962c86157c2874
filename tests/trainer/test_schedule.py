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


def test_a_schedule_sees_fields_that_are_in_the_settings_hash_and_nothing_else():
    names = {field.name for field in fields(Schedule)}
    assert names <= set(TrainParams.model_fields) and not names & set(NOT_IN_SETTINGS)
    learner = Learner(toy.ToyStudent().network, toy.settings(lr=0.3, warmup=7).train)
    assert learner.schedule == Schedule(0.3, 7)
