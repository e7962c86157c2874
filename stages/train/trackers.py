"""Experiment trackers, by accelerate. Their data are copies: metrics.csv and panel.csv are the reference.

A run that resumes from a checkpoint logs the steps after it again. TensorBoard hides its older values of these steps;
W&B keeps the first value of a step and drops the second; trackio and DVCLive keep both.
"""

from __future__ import annotations

import importlib
import importlib.util
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from rats.pipeline.files.atomic import atomic_write, remove
from rats.schemas.errors import ConfigError
from rats.schemas.train_params import TrainParams
from rats.stages.train.guard.panel import PANEL_FILE, SHEETS
from rats.trainer.metrics import MetricsRow
from rats.trainer.run import Run

FOLDER, PROJECT = "trackers", "rats"
PACKAGES = {
    "tensorboard": ("tensorboardX", "tensorboard"),
    "trackio": ("trackio",),
    "wandb": ("wandb",),
    "dvclive": ("dvclive",),
}
"""Packages that a tracker can use; one is enough. The first is the one that the error text suggests."""


def check_trackers(chosen: TrainParams) -> None:
    """Raise ConfigError, with the line that installs it, for a tracker whose package is not here."""
    for name in chosen.trackers:
        if not any(importlib.util.find_spec(package) for package in PACKAGES[name]):
            raise ConfigError(f"train.trackers has {name}: `pip install {PACKAGES[name][0]}`, or leave it out")


def open_trackers(
    chosen: TrainParams, out: Path, config: Mapping[str, Any], step: int = 0, is_main: bool = True
) -> Trackers | None:
    """The trackers of a run in the folder `out` that starts or resumes at `step`; None if it has none.

    `config`: the run's parameters to show, a nested mapping. Files of trackers are in `out`/trackers.

    Raises:
        ConfigError: a package that is not installed.
    """
    check_trackers(chosen)
    if not chosen.trackers or not is_main:
        return None
    from accelerate import PartialState
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    PartialState()  # accelerate's logger asks for it; a run has made it already

    identity = _identity(out / FOLDER, step)
    opened: dict[str, Any] = {}
    for name in chosen.trackers:
        tracker_class = LOGGER_TYPE_TO_CLASS[name]
        folder = [str(out / FOLDER)] if tracker_class.requires_logging_directory else []
        opened[name] = tracker_class(PROJECT, *folder, **settings_of(name, out, identity, step))
        opened[name].start()
        if step == 0:
            opened[name].store_init_configuration(flat(config))
    return Trackers(opened, out, step)


def _identity(folder: Path, step: int) -> str:
    """The id of a run for the trackers. It stays over resumes; a run that starts over gets a new one."""
    path = folder / "id"
    if step > 0 and path.is_file():
        return path.read_text()
    remove(folder)
    atomic_write(path, uuid.uuid4().hex[:12].encode())
    return path.read_text()


def settings_of(name: str, out: Path, identity: str, step: int) -> dict[str, Any]:
    """The arguments of each tracker, such that a resumed run stays one run."""
    known: dict[str, dict[str, Any]] = {
        # it names its files by the second, so a quick restart would overwrite one
        "tensorboard": {"purge_step": step or None, "filename_suffix": f".{step}"},
        "wandb": {"name": out.name, "id": identity, "resume": "allow", "dir": str(out / FOLDER)},
        "trackio": {"name": f"{out.name}-{identity}", "resume": "allow"},
        # neither an experiment of DVC's own nor a dvc.yaml: the pipeline has its own
        "dvclive": {
            "dir": str(out / FOLDER / name),
            "resume": step > 0,
            "save_dvc_exp": False,
            "dvcyaml": None,
            "report": None,
        },
    }
    return known[name]


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, str | int | float | bool]:
    """Nested parameters by dotted name. Other values than plain ones become text, which all trackers accept."""
    values: dict[str, str | int | float | bool] = {}
    for name, value in config.items():
        if isinstance(value, Mapping):
            values |= flat(value, f"{prefix}{name}.")
        else:
            values[prefix + name] = value if isinstance(value, str | int | float | bool) else str(value)
    return values


class Trackers:
    """An observer of a run, called after the panel. Logs the step's row, and new panel rows and sheets."""

    def __init__(self, opened: Mapping[str, Any], out: Path, step: int) -> None:
        """`opened`: accelerate's started trackers by name. A resumed run has logged panel and sheet of `step`."""
        self.opened, self.out = opened, out
        self._after = step if step > 0 else -1

    def __call__(self, run: Run, row: MetricsRow) -> None:
        """Logs on the main rank only. The panel row from before the first step is logged with the first step."""
        if not run.ranks.is_main:
            return
        step = run.state.step
        self._log("train", row, step - 1)
        looks = {int(look["step"]): look for look in run.logs[PANEL_FILE].rows()} if PANEL_FILE in run.logs else {}
        for at in range(self._after + 1, step + 1):
            if at in looks:
                self._log("panel", {name: float(value) for name, value in looks[at].items() if value}, at)
            if (path := self.out / SHEETS / f"{at:06d}.png").is_file():
                self._show(path, at)
        self._after = step

    def close(self) -> None:
        """Writes buffered data. A tracker may wait here for its server."""
        for tracker in self.opened.values():
            tracker.finish()

    def _log(self, group: str, row: MetricsRow, step: int) -> None:
        values = {f"{group}/{name}": value for name, value in row.items() if isinstance(value, int | float)}
        for tracker in self.opened.values():
            tracker.log(values, step=step)

    def _show(self, path: Path, step: int) -> None:
        with Image.open(path) as picture:
            for name, tracker in self.opened.items():
                show(name, tracker, picture.convert("RGB"), step)


def show(name: str, tracker: Any, picture: Image.Image, step: int) -> None:
    """Logs a sheet. Accelerate logs images for TensorBoard and W&B only."""
    if name == "tensorboard":
        tracker.log_images({SHEETS: np.asarray(picture)[None]}, step=step, dataformats="NHWC")
    elif name == "wandb":
        tracker.log_images({SHEETS: [picture]}, step=step)
    elif name == "trackio":
        tracker.log({SHEETS: importlib.import_module(name).Image(picture)}, step=step)
    else:
        tracker.tracker.log_image(f"{SHEETS}/{step:06d}.png", picture)
