"""Locks of a local store: held by a process of this machine, let go when it dies."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from rats.pipeline.atomic import storage_errors


@contextmanager
def file_lock(path: Path, seconds: float) -> Iterator[bool]:
    """Whether the lock was got within `seconds`.

    Raises:
        CannotCreateError: the lock's folder cannot be written.
    """
    lock = FileLock(path)
    with storage_errors(path), suppress(Timeout):
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=seconds)
    try:
        yield lock.is_locked
    finally:
        lock.release()
