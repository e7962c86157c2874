"""Which checkpoint a run resumes from, and how it is told to stop."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from rats.schemas.errors import ConfigError, DataError, brief
from rats.trainer.checkpoint import Change, Checkpoints, RunIdentity, SavedCheckpoint, read_checkpoint
from rats.trainer.run import METRICS

log = logging.getLogger(__name__)


RESULTS = ("run.json", "student", METRICS)
"""What `dvc repro` deletes before it runs the stage again."""
OWN = (
    *RESULTS,
    *("checkpoints", "panel.csv", "panel_samples.csv", "samples", "generations", "trackers", "validation.safetensors"),
)
"""All that a run writes into its folder, but for its lock."""


@dataclass(frozen=True)
class Request:
    """Which run is asked for: its folder, what it goes on from, and whether what is there may make room."""

    out: Path
    resume: str | None = None
    force: bool = False

    @property
    def latest(self) -> bool:
        """Whether the checkpoint is to be found."""
        return self.resume == "latest"

    def refuse_room(self, checkpoints: Checkpoints) -> None:
        """Raise ConfigError for a run that could be lost: one that has finished, or has something to go on from."""
        places = (*checkpoints.paths()[:1], self.out / "run.json", self.out / "student")
        found = [path for path in places if path.exists()]
        if found and not self.force:
            can_go_on = "go on with it (--resume latest), " if checkpoints.paths() else ""
            raise ConfigError(f"{self.out} has a run already ({found[0].name})", can_go_on + self.ways_out)

    @property
    def ways_out(self) -> str:
        """How to begin where a run is."""
        return f"train into another folder (--out), or start over by --force, which moves it to {self.out}/replaced"


@dataclass(frozen=True)
class Begin:
    """How a run begins: from a checkpoint, or None, at its first step; `changes` are settings that it goes on with."""

    saved: SavedCheckpoint | None
    changes: tuple[Change, ...] = ()


def requested_checkpoint(request: Request, checkpoints: Checkpoints, steps: int) -> SavedCheckpoint | None:
    """The checkpoint that is meant; None: the run starts at its first step.

    Raises:
        ConfigError: there is a run that would have to make room, and nobody said so; no such checkpoint.
        DataError: a damaged checkpoint that was named; no whole one among several.
    """
    if request.resume is None:
        request.refuse_room(checkpoints)
        return None
    if request.latest:
        return _newest(request, checkpoints, steps)
    path = Path(request.resume)
    if not path.is_dir():
        raise ConfigError(f"no checkpoint at {path}: use --resume latest, or a folder such as RUN/checkpoints/000050")
    saved = read_checkpoint(path)
    if saved.state.step > steps:
        raise ConfigError(f"checkpoint {path} has {saved.state.step} steps, train.steps is {steps}: raise train.steps")
    if not is_of(saved, checkpoints):
        request.refuse_room(checkpoints)
    return saved


def is_of(saved: SavedCheckpoint, checkpoints: Checkpoints) -> bool:
    """Whether it is one of these, and no checkpoint of another run's."""
    return saved.path.resolve().parent == checkpoints.folder.resolve()


def _newest(request: Request, checkpoints: Checkpoints, steps: int) -> SavedCheckpoint | None:
    saved, later = checkpoints.newest(at_most=steps), checkpoints.after(steps)
    if request.force or is_cleared(request.out):
        return saved
    if later:
        last = int(later[0].name)
        raise ConfigError(
            f"{request.out} has been trained for {last} steps, train.steps is {steps}",
            f"set train.steps to {last} or more, train into another folder (--out), or go back by --force, which "
            f"moves the later checkpoints to {request.out}/replaced",
        )
    if saved is None and checkpoints.paths():
        raise DataError(f"no checkpoint in {checkpoints.folder} can be read", request.ways_out)
    if saved is None:
        request.refuse_room(checkpoints)
    return saved


def is_cleared(out: Path) -> bool:
    """Whether its results were taken away and its checkpoints not: `dvc repro` does so before it runs a stage."""
    return not any((out / name).exists() for name in RESULTS)


def decide(saved: SavedCheckpoint | None, now: RunIdentity, older: str, request: Request) -> Begin:
    """Go on from the checkpoint that was asked for, if it belongs to what is trained now.

    Args:
        saved: That checkpoint; None begins at the first step.
        now: What is trained now.
        older: The hash that rats 0.1 would give these settings.
        request: What was asked for; by `force` a run goes on with other settings, never with other shards.

    Raises DataError for one of another run; where results were cleared away, as `dvc repro` does, a new run begins.
    """
    if saved is None:
        return Begin(None)
    shards, settings = _other_shards(saved, now), _other_settings(saved, now, older)
    differs = shards or settings
    if differs is None:
        return Begin(saved)
    if request.force and shards is None:
        log.warning("going on with other settings: %s", settings)
        return Begin(saved, _changes(saved, now))
    if request.latest and is_cleared(request.out) and not request.force:
        log.warning("checkpoint %s is of another run (%s): a new one begins", saved.path, differs)
        return Begin(None)
    by_force = "go on by --force" if shards is None else "start over by --force without --resume"
    raise DataError(
        f"checkpoint {saved.path} is of another run ({differs})",
        f"restore what it was trained with, train into another folder (--out), or {by_force}",
    )


def _other_shards(saved: SavedCheckpoint, now: RunIdentity) -> str | None:
    for name in ("recipe", "snapshot"):
        was, new = getattr(saved.identity, name), getattr(now, name)
        if was != new:
            return f"{name} {was[:12]}, now {new[:12]}"
    return None


def _other_settings(saved: SavedCheckpoint, now: RunIdentity, older: str) -> str | None:
    known = saved.identity.values is not None
    if saved.identity.settings in (now.settings, now.settings if known else older):
        return None
    if not known:
        return "written by an older rats with other settings, which it does not name"
    told = [f"{change.field} {brief(change.was)}, now {brief(change.now)}" for change in _changes(saved, now)]
    return "; ".join(told[:4]) + (f"; and {len(told) - 4} more" if len(told) > 4 else "")


def _changes(saved: SavedCheckpoint, now: RunIdentity) -> tuple[Change, ...]:
    """Every setting that differs, from the checkpoint's step on."""
    step, was = saved.state.step, saved.identity.values
    if was is None:
        return (Change(step, "settings", saved.identity.settings, now.settings),)
    return tuple(Change(step, *found) for found in differences(was, now.values or {}))


def differences(was: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Dotted name and both values of all that differs; None stands for what is not there."""
    for name in sorted({*was, *now}):
        old, new = was.get(name), now.get(name)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            yield from differences(old, new, f"{prefix}{name}.")
        elif old != new:
            yield prefix + name, old, new


@contextmanager
def stop_flag() -> Iterator[Callable[[], bool]]:
    """A function that returns true after SIGTERM. A second SIGTERM ends the process at once, with exit code 143."""
    asked = threading.Event()

    def handler(number: int, frame: FrameType | None) -> None:
        if asked.is_set():
            raise SystemExit(128 + number)
        asked.set()

    if threading.current_thread() is not threading.main_thread():  # only the main thread may set a handler
        yield asked.is_set
        return
    before = signal.signal(signal.SIGTERM, handler)
    try:
        yield asked.is_set
    finally:
        signal.signal(signal.SIGTERM, before)
