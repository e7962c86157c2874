"""Trackers as copies of our own files: a real TensorBoard event file, and what is said when a package is missing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tensorboardX.proto.event_pb2 import Event

from rats.schemas.errors import ConfigError
from rats.stages.train.guard.panel import PANEL_FILE
from rats.stages.train.trackers import check_trackers, flat, open_trackers, settings_of
from rats.trainer.metrics import CsvLog
from tests.support import toy

TENSORBOARD = {"trackers": ("tensorboard",), "steps": 4}


def events(out: Path) -> list[Event]:
    """All events of a run's own files: records of a length, its checksum, the event, its checksum."""
    found = []
    for path in sorted((out / "trackers" / "rats").glob("events.*"), key=lambda path: path.suffix):
        data = path.read_bytes()
        while data:
            end = 12 + int.from_bytes(data[:8], "little")
            found.append(Event.FromString(data[12:end]))
            data = data[end + 4 :]
    return found


def scalars(out: Path, tag: str) -> list[tuple[int, float]]:
    return [(e.step, v.simple_value) for e in events(out) for v in e.summary.value if v.tag == tag]


def tracked(out: Path, steps: int, resume: bool = False) -> list[dict[str, str]]:
    """A toy run with TensorBoard, a look and a sheet at the steps 0 and 2; the rows of its metrics.csv."""
    chosen = toy.settings(**(TENSORBOARD | {"steps": steps}))
    given = toy.objective(chosen)
    run = toy.run_of(given, out, resume)
    run.open_log(CsvLog(out / PANEL_FILE, ["step", "panel", "alarm"]))
    for step in (0, 2):
        run.logs[PANEL_FILE].append({"step": step, "panel": -0.5 * step, "alarm": int(step > 0)})
        (out / "samples").mkdir(exist_ok=True)
        Image.new("RGB", (8, 4)).save(out / "samples" / f"{step:06d}.png")
    trackers = open_trackers(chosen.train, out, {"lr": 0.1, "nfe": (2, 3)}, run.state.step)
    with run.with_callbacks(trackers):
        toy.train_on(given, run)
    trackers.close()
    return run.logs["metrics.csv"].rows()


def test_tensorboard_has_every_row_every_look_and_every_sheet(tmp_path):
    rows = tracked(tmp_path, steps=4)
    losses = scalars(tmp_path, "train/loss_total")
    assert [step for step, _ in losses] == [0, 1, 2, 3]
    assert [value for _, value in losses] == pytest.approx([float(row["loss_total"]) for row in rows])
    assert scalars(tmp_path, "panel/panel") == [(0, 0.0), (2, -1.0)] and scalars(tmp_path, "panel/alarm")[1] == (2, 1.0)
    sheets = [(e.step, v.image) for e in events(tmp_path) for v in e.summary.value if v.tag == "samples"]
    assert [(step, image.width, image.height) for step, image in sheets] == [(0, 8, 4), (2, 8, 4)]
    assert [step for step, _ in scalars(tmp_path, "train/grad_shape")] == [0, 3]  # a cell that is empty is no number


def test_a_run_that_goes_on_logs_from_its_checkpoint_and_hides_what_was_there(tmp_path):
    tracked(tmp_path, steps=2)
    tracked(tmp_path, steps=4, resume=True)
    assert [step for step, _ in scalars(tmp_path, "train/loss_total")] == [0, 1, 2, 3]
    assert [step for step, _ in scalars(tmp_path, "panel/panel")] == [0, 2]
    starts = [event.step for event in events(tmp_path) if event.session_log.status == event.session_log.START]
    assert starts == [2]  # TensorBoard drops what an earlier file has at this step and after it
    tracked(tmp_path, steps=2)
    assert [step for step, _ in scalars(tmp_path, "train/loss_total")] == [0, 1]  # a new start is a new run


@pytest.mark.parametrize("name, package", [("wandb", "wandb"), ("tensorboard", "tensorboardX"), ("dvclive", "dvclive")])
def test_a_missing_package_is_named_with_the_line_that_installs_it(name, package, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda package: None)
    with pytest.raises(ConfigError, match=rf"train.trackers has {name}: `pip install {package}`"):
        check_trackers(toy.settings(trackers=(name,)).train)


def test_there_are_no_trackers_by_default_and_none_on_other_ranks(tmp_path):
    assert open_trackers(toy.settings().train, tmp_path, {}) is None
    assert open_trackers(toy.settings(**TENSORBOARD).train, tmp_path, {}, is_main=False) is None
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_goes_on_is_the_same_run_to_a_tracker_that_knows_runs(tmp_path):
    def given(name: str, step: int) -> dict[str, Any]:
        return settings_of(name, tmp_path / "rats", "abc", step)

    assert given("wandb", 0) == given("wandb", 50) and given("wandb", 0)["id"] == "abc"
    assert given("trackio", 0)["name"] == given("trackio", 50)["name"] == "rats-abc"
    assert [given("dvclive", step)["resume"] for step in (0, 50)] == [False, True]


def test_parameters_are_flattened_to_plain_values():
    assert flat({"train": {"lr": 0.1, "gate": {"tau": None}}, "nfe": (3, 5)}) == {
        **{"train.lr": 0.1, "train.gate.tau": "None"},
        "nfe": "(3, 5)",
    }
