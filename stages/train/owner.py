"""A run folder belongs to one process: it holds a lock for as long as it trains, and says who it is.

On one machine the system's own lock decides, which a dead process has no more. Between machines, where the file system
may not carry that lock, `owner.json` decides: its time is renewed every minute.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path

import psutil
from pydantic import ValidationError

from rats.pipeline.files.atomic import atomic_write, file_lock
from rats.pipeline.files.leftovers import is_alive
from rats.schemas.errors import RetryLaterError
from rats.schemas.run import Owner

LOCK, OWNER = "owner.lock", "owner.json"
LOOK = 1.0
"""Seconds between two looks at the parent."""
BEAT, SILENT = 60.0, 900.0
"""Seconds between two signs of life, and after how many without one an owner on another machine counts as gone."""
PATIENCE = 60.0
"""Seconds that a new process waits for one whose parent has gone: it is saving, and about to end."""
log = logging.getLogger(__name__)


@contextmanager
def owned(out: Path, force: bool = False, is_main: bool = True) -> Iterator[Callable[[], None]]:
    """Own the folder `out` inside the block; yields a check that raises RetryLaterError once somebody has taken it.

    Of several ranks the main one owns. On each, SIGTERM comes when the process that started it has gone.

    Args:
        out: The run's folder; made if it is not there.
        force: Take it from an owner on another machine, who is known to be gone.
        is_main: Whether this rank writes.

    Raises:
        RetryLaterError: another process owns it.
        CannotCreateError: it cannot be written.
    """
    over = threading.Event()
    with ExitStack() as stack:
        mine = _take(out, force, stack) if is_main else None
        watch = threading.Thread(target=_watch, args=(over, out, mine), daemon=True)
        watch.start()
        try:
            yield lambda: _check(out, mine)
        finally:
            over.set()
            watch.join()
            if mine is not None and read_owner(out) == mine:
                (out / OWNER).unlink(missing_ok=True)


def _take(out: Path, force: bool, stack: ExitStack) -> Owner:
    if not stack.enter_context(file_lock(out / LOCK, 0.0)):
        holder = read_owner(out)
        if not _is_ending(holder) or not stack.enter_context(file_lock(out / LOCK, PATIENCE)):
            raise _refusal(out, holder, "wait for its end, stop it, or train into another folder (--out)")
    _refuse_elsewhere(out, force)
    started_by = ancestors()
    mine = Owner(
        process=os.getpid(),
        host=socket.gethostname(),
        since=f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC",
        parent=started_by[-1].pid if started_by else None,
        token=uuid.uuid4().hex,
    )
    atomic_write(out / OWNER, mine.model_dump_json().encode())
    return mine


def read_owner(out: Path) -> Owner | None:
    """Who says that the folder is theirs; None: nobody, or nothing that can be read."""
    try:
        return Owner.model_validate_json((out / OWNER).read_bytes())
    except (OSError, ValidationError):
        return None


def _is_ending(holder: Owner | None) -> bool:
    """An orphan on this machine: it has noticed, or will within a second."""
    if holder is None or holder.parent is None or holder.host != socket.gethostname():
        return False
    return not is_alive(holder.parent)


def _refuse_elsewhere(out: Path, force: bool) -> None:
    """The lock is ours; but an owner on another machine may not see it."""
    holder = read_owner(out)
    if holder is None or holder.host == socket.gethostname():
        return
    silent = _silence(out)
    if not force and silent < SILENT:
        way_out = f"wait for its end; if it is gone, wait {SILENT - silent:.0f} s more, or take the folder by --force"
        raise _refusal(out, holder, way_out)
    log.warning("%s: taken from process %d on %s, silent for %.0f s", out, holder.process, holder.host, silent)


def _silence(out: Path) -> float:
    """Seconds since the owner's last sign of life, by the clock of the file system: machines differ in theirs."""
    touched = out / f".{OWNER}.now"
    touched.touch()
    now = touched.stat().st_mtime
    touched.unlink(missing_ok=True)
    return now - (out / OWNER).stat().st_mtime


def _refusal(out: Path, holder: Owner | None, way_out: str) -> RetryLaterError:
    who = "another process"
    if holder is not None:
        who = f"process {holder.process} on {holder.host}, since {holder.since}"
    return RetryLaterError(f"{out} belongs to {who}", way_out)


def _check(out: Path, mine: Owner | None) -> None:
    holder = read_owner(out)
    if mine is not None and holder is not None and holder != mine:
        raise _refusal(out, holder, "it was taken from this run, which ends here; its checkpoints stay")


def _watch(over: threading.Event, out: Path, mine: Owner | None) -> None:
    """Signs of life, and an end when those who started us have gone."""
    started_by, beats = ancestors(), 0
    while not over.wait(LOOK):
        if any(map(_is_gone, started_by)):
            log.warning("the process that started this run has gone: it saves and ends")
            os.kill(os.getpid(), signal.SIGTERM)
            return
        beats += 1
        if mine is not None and beats * LOOK >= BEAT and read_owner(out) == mine:
            os.utime(out / OWNER)
            beats = 0


def ancestors() -> list[psutil.Process]:
    """Whose end is ours: the parent, and above a shell that waits for us (`sh -c`, as DVC starts one) its parent.

    Nobody's, where the user has asked for it: by nohup, or by a session of our own that is not torchrun's.
    """
    in_own_session = os.getsid(0) == os.getpid() and "LOCAL_RANK" not in os.environ
    if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN or in_own_session:
        return []
    found: list[psutil.Process] = []
    for process in psutil.Process().parents():
        if process.pid == 1:
            break
        found.append(process)
        if not _is_waiting_shell(process):
            break
    return found


def _is_waiting_shell(process: psutil.Process) -> bool:
    try:
        words = process.cmdline()
    except psutil.Error:
        return False
    return bool(words) and words[0].endswith("sh") and "-c" in words


def _is_gone(process: psutil.Process) -> bool:
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
