"""`rats stage train` where a run is already, on a tiny FLUX: what is refused, goes on, is kept, and is told."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from rats.schemas.errors import ConfigError, DataError
from rats.stages.train.record import read_record
from rats.stages.train.train import train_stage
from tests.stages.train.test_train import finished, home, params_of, rows  # noqa: F401
from tests.support.project import tree

WEIGHTS = "student/diffusion_pytorch_model.safetensors"
COUNTERS = ("student_forwards", "teacher_forwards", "teacher_reward_calls", "rewards_asked")


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:  # noqa: F811
    """A finished run of 4 steps, with something of the user's in its folder."""
    shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "run" / "notes.txt").write_text("mine")
    return tmp_path / "run"


@pytest.fixture
def half(home: Path, tmp_path: Path) -> Path:  # noqa: F811
    """A run of 2 steps."""
    train(home, tmp_path / "half", steps=2)
    return tmp_path / "half"


def train(home: Path, out: Path, resume: str | None = None, force: bool = False, **changes: Any):  # noqa: F811
    return train_stage(params_of(home, **changes), "rats", home / "shards", out, resume, force)


def test_what_is_refused_changes_nothing(home, run):  # noqa: F811
    before = tree(run)
    with pytest.raises(ConfigError, match="has a run already"):
        train(home, run)
    with pytest.raises(ConfigError, match="trained for 4 steps, train.steps is 3"):
        train(home, run, "latest", steps=3)
    for resume in ("latest", str(run / "checkpoints" / "000002")):
        with pytest.raises(DataError, match=r"train.lr 0.001, now 0.002\); restore what it was trained with"):
            train(home, run, resume, lr=0.002)
    assert tree(run) == before | {"owner.lock": tree(run)["owner.lock"]}


def test_a_new_start_by_force_keeps_the_old_run_aside(home, run):  # noqa: F811
    before = tree(run)
    train(home, run, force=True, steps=2)
    kept = tree(run / "replaced" / "0001")
    assert kept == {name: value for name, value in before.items() if name not in ("notes.txt", "owner.lock")}
    assert (run / "notes.txt").read_text() == "mine" and read_record(run).steps == 2 == len(rows(run))


def test_another_learning_rate_goes_on_by_force_and_is_in_the_record(home, half, tmp_path):  # noqa: F811
    train(home, half, "latest", force=True, lr=0.002)
    (change,) = read_record(half).changes
    assert (change.step, change.field, change.was, change.now) == (2, "train.lr", 0.001, 0.002)
    assert [row["lr"] for row in rows(half)][2:] == ["0.002", "0.002"]
    train(home, half, "latest", lr=0.002)  # from here on these are its settings
    record = read_record(half)
    assert record.changes == (change,) and record.settings_values["train"]["lr"] == 0.002


def test_what_does_not_change_the_mathematics_goes_on_to_the_last_bit(home, finished, half):  # noqa: F811
    train(home, half, "latest", gradient_checkpointing=True, loader_workers=2, fsdp=True, checkpoints_total_limit=3)
    assert rows(half) == rows(finished) and (half / WEIGHTS).read_bytes() == (finished / WEIGHTS).read_bytes()


def test_another_micro_batch_goes_on_up_to_the_order_of_a_sum(home, finished, half):  # noqa: F811
    train(home, half, "latest", micro_batch=1)
    for one, other in zip(rows(half), rows(finished), strict=True):
        assert float(one["loss_total"]) == pytest.approx(float(other["loss_total"]), rel=1e-4)


def test_counters_are_those_of_the_whole_run(home, finished, half):  # noqa: F811
    wanted = [getattr(read_record(finished), name) for name in COUNTERS]
    assert wanted == [2 * (2 + 3), 0, 0, 16]
    train(home, half, "latest")
    seconds = read_record(half).seconds
    train(home, half, "latest")
    record = read_record(half)
    assert [getattr(record, name) for name in COUNTERS] == wanted and record.seconds == seconds > 0


def test_counters_that_an_older_rats_has_not_kept_are_unknown(home, half):  # noqa: F811
    state = half / "checkpoints" / "000002" / "state.json"
    record = json.loads(state.read_text())
    for name in COUNTERS[:3]:
        del record["state"][name]
    state.write_text(json.dumps(record))
    report = train(home, half, "latest")
    assert (report.steps, report.teacher_forwards, report.teacher_reward_calls) == (4, None, None)
    assert read_record(half).student_forwards is None


def test_a_changed_run_that_dvc_starts_is_a_new_one_and_the_old_checkpoints_are_kept(home, run):  # noqa: F811
    checkpoints = tree(run / "checkpoints")
    shutil.rmtree(run / "student")
    for name in ("run.json", "metrics.csv"):
        (run / name).unlink()
    train(home, run, "latest", lr=0.002)
    assert [row["lr"] for row in rows(run)][2:] == ["0.002", "0.002"] and read_record(run).changes == ()
    assert tree(run / "replaced" / "0001" / "checkpoints") == checkpoints
