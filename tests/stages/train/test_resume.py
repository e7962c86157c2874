"""Which checkpoint a run goes on from: nothing that finished is lost, and what differs is named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from rats.schemas.errors import ConfigError, DataError, RatsError
from rats.stages.train.resume import Begin, Request, decide, differences, requested_checkpoint
from rats.trainer.checkpoint import Change, RunIdentity, SavedCheckpoint, read_checkpoint
from rats.trainer.replaced import set_aside
from rats.trainer.run import checkpoints_in, open_run
from tests.support import toy

WAS = {"train": {"lr": 0.25, "gate": {"tau": 0.5, "form": "rats"}}, "scores": {"pick": "a"}}


def identity(**train: object) -> RunIdentity:
    values = WAS | {"train": WAS["train"] | train}
    return RunIdentity("s" * 64, "r" * 64, json.dumps(values), values)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with checkpoints after 4 and 6 steps, whose results are there."""
    out = tmp_path / "run"
    given = toy.objective(toy.settings())
    toy.train_on(given, open_run(given, out, identity(), 1))
    (out / "run.json").write_text("{}")
    (out / "student").mkdir()
    return out


def ask(request: Request, steps: int = 6) -> SavedCheckpoint | None:
    return requested_checkpoint(request, checkpoints_in(request.out, toy.settings().train), steps)


def refusal(request: Request, steps: int = 6) -> RatsError:
    with pytest.raises((ConfigError, DataError)) as error:
        ask(request, steps)
    assert "--out" in error.value.remedy and "--force" in error.value.remedy and "\n" not in str(error.value)
    return error.value


def clear(out: Path) -> None:
    """As `dvc repro` does."""
    shutil.rmtree(out / "student")
    for name in ("run.json", "metrics.csv"):
        (out / name).unlink()


def test_the_newest_checkpoint_is_gone_on_from(run):
    assert ask(Request(run, "latest")).state.step == 6
    assert ask(Request(run, str(run / "checkpoints" / "000004"))).state.step == 4
    assert ask(Request(run.parent / "new", "latest")) is None is ask(Request(run.parent / "new"))


def test_a_run_is_no_place_for_another_one(run):
    error = refusal(Request(run))
    assert isinstance(error, ConfigError) and "--resume latest" in error.remedy
    assert ask(Request(run, force=True)) is None
    shutil.rmtree(run / "checkpoints")
    for resume in (None, "latest"):
        assert "run.json" in refusal(Request(run, resume)).what  # finished, and nothing to go on from
    other = run.parent / "other"
    shutil.copytree(run, other)
    clear(other)
    assert ask(Request(other)) is None


def test_a_checkpoint_of_another_run_is_gone_on_from_where_there_is_none(run):
    named, other = str(run / "checkpoints" / "000004"), run.parent / "other"
    assert ask(Request(other, named)).state.step == 4
    shutil.copytree(run, other)
    refusal(Request(other, named))


def test_a_shorter_run_loses_no_later_checkpoint(run):
    error = refusal(Request(run, "latest"), steps=5)
    assert "trained for 6 steps, train.steps is 5" in error.what and "train.steps to 6" in error.remedy
    assert ask(Request(run, "latest", force=True), steps=5).state.step == 4
    clear(run)
    assert ask(Request(run, "latest"), steps=5).state.step == 4


def test_checkpoints_that_cannot_be_read_are_no_new_start(run):
    for path in (run / "checkpoints").iterdir():
        (path / "state.json").write_text("{")
    assert "can be read" in refusal(Request(run, "latest")).what
    clear(run)
    assert ask(Request(run, "latest")) is None


def begun(run: Path, now: RunIdentity, older: str = "older", **request: object) -> Begin:
    saved = read_checkpoint(run / "checkpoints" / "000004")
    return decide(saved, now, older, Request(run, **{"resume": "latest", **request}))


def test_other_settings_are_refused_by_field_and_both_values_and_recorded_under_force(run):
    assert begun(run, identity()).changes == () and begun(run, identity()).saved is not None
    now = identity(lr=0.125, gate={"tau": 0.75, "form": "rats"})
    for resume in ("latest", "named"):
        with pytest.raises(DataError, match=r"\(train.gate.tau 0.5, now 0.75; train.lr 0.25, now 0.125\)") as error:
            begun(run, now, resume=resume)
        assert "--out" in error.value.remedy and "go on by --force" in error.value.remedy
    changes = begun(run, now, force=True).changes
    assert changes == (Change(4, "train.gate.tau", 0.5, 0.75), Change(4, "train.lr", 0.25, 0.125))


def test_other_shards_are_refused_even_under_force(run):
    now = RunIdentity("s" * 64, "q" * 64, identity().settings, WAS)
    for force in (False, True):
        with pytest.raises(DataError, match="recipe rrrrrrrrrrrr, now qqqqqqqqqqqq"):
            begun(run, now, force=force)


def test_where_dvc_has_cleared_the_results_a_changed_run_begins_anew(run, caplog):
    clear(run)
    assert begun(run, identity(lr=0.125)) == Begin(None) and "train.lr 0.25, now 0.125" in caplog.text
    assert begun(run, identity()).saved is not None
    assert begun(run, identity(lr=0.125), force=True).changes
    with pytest.raises(DataError):
        begun(run, identity(lr=0.125), resume="named")


def test_a_checkpoint_of_an_older_rats_goes_on_with_the_settings_that_it_had(run):
    state = run / "checkpoints" / "000004" / "state.json"
    record = json.loads(state.read_text())
    record["identity"] |= {"values": None, "settings": "hash"}
    for counter in ("student_forwards", "teacher_forwards", "teacher_reward_calls", "changes"):
        del record["state"][counter]
    state.write_text(json.dumps(record))
    assert begun(run, identity(), older="hash").saved.state.teacher_forwards is None
    with pytest.raises(DataError, match="an older rats with other settings"):
        begun(run, identity(), older="another")
    assert begun(run, identity(), older="another", force=True).changes[0].was == "hash"


def test_differences_are_named_at_every_depth():
    was, now = {"a": {"b": 2, "c": None}, "d": [2, 3]}, {"a": {"b": 2, "c": {"e": 4}}, "d": [2, 5]}
    assert list(differences(was, now)) == [("a.c", None, {"e": 4}), ("d", [2, 3], [2, 5])]


def test_what_makes_room_is_moved_and_never_deleted(run):
    (run / "notes.txt").write_text("mine")
    assert set_aside(run, [run / "no"]) is None
    first = set_aside(run, [run / "checkpoints" / "000006", run / "run.json"])
    assert first == run / "replaced" / "0001" and (first / "checkpoints" / "000006" / "state.json").is_file()
    assert set_aside(run, [run / "student"]) == run / "replaced" / "0002"
    assert (first / "run.json").read_text() == "{}" and (run / "notes.txt").read_text() == "mine"


def test_a_run_that_goes_back_sets_the_later_checkpoints_aside(run):
    given = toy.objective(toy.settings())
    open_run(given, run, identity(), 1, read_checkpoint(run / "checkpoints" / "000004"))
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["000004"]
    assert read_checkpoint(run / "replaced" / "0001" / "checkpoints" / "000006").state.step == 6
