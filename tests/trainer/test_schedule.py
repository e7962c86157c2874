"""The learning rate's schedule, and what may differ when a run goes on: it changes no step."""

from __future__ import annotations

import csv
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from rats.schemas.train_params import TrainParams
from rats.stages.train.source import NOT_IN_SETTINGS
from rats.trainer.optim import Learner, Schedule
from tests.support import toy

OTHERWISE: dict[str, Any] = {
    "steps": 9,
    "checkpoint_every": 3,
    "checkpoints_total_limit": 5,
    "max_bad": 0.7,
    "loader_workers": 2,
    "guard": {"every": 4},
    "samples_every": 3,
    "trackers": ("tensorboard",),
    "save_dtype": "model",
}
RESOLVED = {"gate"}
"""What it was resolved to is in the hash."""


def test_the_learning_rate_warms_up_linearly_and_stays():
    assert [Schedule(0.6, 4).at(step) for step in range(6)] == pytest.approx([0.15, 0.3, 0.45, 0.6, 0.6, 0.6])
    assert Schedule(0.6, 0).at(0) == 0.6


def test_a_schedule_sees_fields_that_are_in_the_settings_hash_and_nothing_else():
    names = {field.name for field in fields(Schedule)}
    assert names <= set(TrainParams.model_fields) and not names & set(NOT_IN_SETTINGS)
    learner = Learner(toy.ToyStudent().network, toy.settings(lr=0.3, warmup=7).train)
    assert learner.schedule == Schedule(0.3, 7)


def first_rows(folder: Path, count: int) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(newline="") as file:
        rows = [{name: value for name, value in row.items() if name != "seconds"} for row in csv.DictReader(file)]
    assert len(rows) >= count
    return rows[:count]


@pytest.mark.parametrize("field", sorted(set(NOT_IN_SETTINGS) - RESOLVED))
def test_what_is_not_in_the_settings_hash_changes_no_step(tmp_path, field):
    plain = {"warmup": 5, "ema": 0.9}
    assert toy.settings(**plain).train != toy.settings(**plain, **{field: OTHERWISE[field]}).train
    toy.train_in(tmp_path / "plain", toy.settings(**plain))
    toy.train_in(tmp_path / "otherwise", toy.settings(**plain, **{field: OTHERWISE[field]}))
    assert first_rows(tmp_path / "plain", 6) == first_rows(tmp_path / "otherwise", 6)
