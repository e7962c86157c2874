"""Which checkpoint a run resumes from, and how it is told to stop."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from rats.schemas.errors import ConfigError, DataError
from rats.trainer.checkpoint import Checkpoints, RunIdentity, SavedCheckpoint, read_checkpoint

log = logging.getLogger(__name__)


def requested_checkpoint(resume: str | None, checkpoints: Checkpoints, steps: int) -> SavedCheckpoint | None:
    if resume is None:
        return None
    if resume == "latest":
        return checkpoints.newest(at_most=steps)
    if not Path(resume).is_dir():
        raise ConfigError(f"no checkpoint at {resume}: use --resume latest, or a folder such as RUN/checkpoints/000050")
    saved = read_checkpoint(Path(resume))
    if saved.state.step > steps:
        raise ConfigError(
            f"checkpoint {resume} has {saved.state.step} steps, train.steps is {steps}: raise train.steps"
        )
    return saved


def matching_checkpoint(
    saved: SavedCheckpoint | None, identity: RunIdentity, resume: str | None
) -> SavedCheckpoint | None:
    """The checkpoint if it is of the same shards and settings. If not: an error if it was named, else None."""
    if saved is None or saved.identity == identity:
        return saved
    names = ("snapshot", "recipe", "settings")
    other = next(name for name in names if getattr(saved.identity, name) != getattr(identity, name))
    was, now = (getattr(found, other)[:12] for found in (saved.identity, identity))
    reason = f"checkpoint {saved.path} is of another {other} ({was}, now {now})"
    if resume != "latest":
        raise DataError(f"{reason}: start over without --resume, or restore what it was trained with")
    log.warning("%s; starting over", reason)
    return None


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
