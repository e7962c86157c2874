"""The guard in the loop, with looks that are written down by hand: who is warned, who stops, what is kept."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from rats.schemas.errors import ConfigError, DataError
from rats.schemas.params import Params
from rats.stages.train.callbacks import check_callbacks
from rats.stages.train.guard.panel import PANEL_FILE, PANEL_SAMPLES_FILE, Panel
from rats.stages.train.guard.rules import Roles, ValidationScores
from rats.trainer.loop import Stopped
from rats.trainer.run import Run
from tests.support import toy

KEYS = [f"key-{i}" for i in range(12)]
ROLES = Roles({"bright": 1.0}, ("held out",))
HACK = [(0.0, 0.0), (0.3, 0.4), (0.5, 0.5), (0.9, 0.1), (1.2, -0.3), (1.4, -0.6), (1.5, -0.8)]
"""Trained reward and panel, look by look: both rise, then they part."""


class Eyes:
    """Sees what it is told, in order."""

    def __init__(self, course: Sequence[tuple[float, float]], keys: Sequence[str] = KEYS) -> None:
        self.course = iter(course)
        self.validation = SimpleNamespace(keys=list(keys), concepts=list(keys))

    def look(self, learner: Any, nfe: Sequence[int], stopping: Any) -> ValidationScores:
        if stopping():
            raise Stopped
        shape = (len(nfe), len(KEYS))
        base = np.random.default_rng(0).normal(size=shape)
        return {name: base + mean for name, mean in zip(ROLES.metrics, next(self.course), strict=True)}


def watched(folder: Path, course: Sequence[tuple[float, float]], resume: bool = False, **changes: Any) -> Run:
    """A toy run of 6 steps with a look after each; it goes on from its newest checkpoint with `resume`."""
    guard = {"every": 1} | changes.pop("guard", {})
    chosen = toy.settings(**({"guard": guard, "checkpoint_every": 1, "checkpoints_total_limit": 1} | changes))
    given = toy.objective(chosen)
    run = toy.run_of(given, folder, resume)
    saved = run.checkpoints.newest() if resume else None
    kept = {name: saved.log(name) if saved else None for name in (PANEL_FILE, PANEL_SAMPLES_FILE)}
    panel = Panel(chosen.train, ROLES, folder, Eyes(course), kept)  # type: ignore[arg-type]
    panel.start(run)
    with run.with_callbacks(panel):
        toy.train_on(given, run)
    panel.leave_best(run)
    return run


def alarms(run: Run) -> str:
    return "".join(row["alarm"] for row in run.logs[PANEL_FILE].rows())


def checkpoints(run: Run) -> list[str]:
    return sorted(path.name for path in run.checkpoints.folder.iterdir())


def test_a_hack_is_warned_of_and_the_run_goes_on_unless_it_is_told_to_stop(tmp_path, caplog):
    run = watched(tmp_path, HACK)
    assert alarms(run) == "0001111" and run.state.step == 6 and run.state.finished is None
    first = next(record.getMessage() for record in caplog.records if "alarm 1" in record.getMessage())
    assert first.startswith("step 3: alarm 1: the trained reward +0.") and "since step 2" in first
    assert "down beyond noise: the panel, held out." in first
    assert "lower train.lr" in first and first.endswith("best look: step 2")


@pytest.mark.parametrize("patience, last", [(1, 3), (3, 5)])
def test_so_many_alarms_in_a_row_end_the_run_with_a_checkpoint(tmp_path, patience, last):
    run = watched(tmp_path, HACK, guard={"stop": True, "patience": patience})
    assert run.state.step == last and f"{patience} alarms in a row, the last at step {last}" in run.state.finished
    assert run.checkpoints.newest().state.finished == run.state.finished


def test_a_course_on_which_both_rise_ends_with_its_last_step(tmp_path):
    run = watched(tmp_path, [(0.1 * i, 0.1 * i) for i in range(7)], guard={"stop": True, "patience": 1})
    assert alarms(run) == "0000000" and run.state.step == 6 and run.state.finished is None


def test_the_checkpoint_of_the_best_look_outlives_its_turn_and_can_be_what_is_left(tmp_path):
    run = watched(tmp_path / "last", HACK)
    assert checkpoints(run) == ["000002", "000006"]
    best = watched(tmp_path / "best", HACK, guard={"keep": "best"})
    found = run.checkpoints.newest(at_most=2).tensors()["network"]
    assert all(torch.equal(value, found[name]) for name, value in best.learner.network.state_dict().items())
    assert any(not torch.equal(value, found[name]) for name, value in run.learner.network.state_dict().items())


def test_only_a_look_that_has_a_checkpoint_is_kept(tmp_path):
    assert watched(tmp_path, HACK, checkpoint_every=3).checkpoints.keep == 3


def test_a_run_that_goes_on_counts_its_alarms_from_the_log_alone(tmp_path):
    whole = watched(tmp_path / "whole", HACK, guard={"stop": True, "patience": 3})
    cut = watched(tmp_path / "cut", HACK, steps=4)
    cut.logs[PANEL_FILE].path.unlink()
    went_on = watched(tmp_path / "cut", HACK[5:], resume=True, guard={"stop": True, "patience": 3})
    assert went_on.state.step == 5 and went_on.state.finished == whole.state.finished
    for name in (PANEL_FILE, PANEL_SAMPLES_FILE):
        assert went_on.logs[name].content() == whole.logs[name].content()
    assert checkpoints(went_on) == checkpoints(whole) == ["000002", "000005"]


def test_a_run_that_is_asked_to_stop_while_it_looks_makes_that_look_when_it_goes_on(tmp_path):
    run = toy.run_of(toy.objective(toy.settings()), tmp_path)
    panel = Panel(toy.settings(guard={"every": 1}).train, ROLES, tmp_path, Eyes(HACK), {})  # type: ignore[arg-type]
    panel.start(run)
    run.stop_when(lambda: True)
    run.advance({"seconds": 0.0}, [0.5], 0, 4)
    with pytest.raises(Stopped):
        panel(run, {})
    run.save()
    kept = {name: run.checkpoints.newest().log(name) for name in (PANEL_FILE, PANEL_SAMPLES_FILE)}
    again = Panel(panel.chosen, ROLES, tmp_path, Eyes(HACK[1:]), kept)  # type: ignore[arg-type]
    with pytest.raises(SystemExit, match="143"):
        again.start(run)
    run.stop_when(lambda: False)
    again.start(run)
    assert [row["step"] for row in run.logs[PANEL_FILE].rows()] == ["0", "1"]


def test_a_run_that_goes_on_with_other_validation_prompts_is_refused(tmp_path):
    run = watched(tmp_path, HACK)
    kept = {name: run.logs[name].content() for name in (PANEL_FILE, PANEL_SAMPLES_FILE)}
    other = Panel(toy.settings(guard={"every": 1}).train, ROLES, tmp_path, Eyes([], KEYS[:6]), kept)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="other validation prompts"):
        other.start(run)


@pytest.mark.parametrize(
    "train, rewards, message",
    [
        ({"guard": {"stop": True}}, "ab", "never looks: set train.guard.every"),
        ({"guard": {"every": 3, "keep": "best"}, "checkpoint_every": 2}, "ab", "checkpoint_every to 3 or a divisor"),
        ({"guard": {"every": 2}}, "a", "list another reward under rewards"),
        ({"trackers": ("wandb",)}, "ab", "pip install wandb"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_loaded(train, rewards, message, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    params = Params.model_validate(
        {
            "model": {"path": "nowhere"},
            "prompts": {"train": "nowhere.txt"},
            "rewards": [{"name": name, "adapter": "hpsv2", "path": "nowhere"} for name in rewards],
            "train": {"reward": "a"} | train,
            "evaluate": {"judges": []},
        }
    )
    with pytest.raises(ConfigError, match=message):
        check_callbacks(params, params.train)
