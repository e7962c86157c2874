"""Atomic writes of local files and folders: temporary name, fsync, rename.

A final name never holds a partial file. What killed processes left in a folder is removed when a process first writes
into it: once, because listing a folder of a million files takes longer than a write. In a remote store, a single
upload does what the rename does here (`remote`).
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory

from filelock import FileLock, Timeout

from rats.pipeline.files.leftovers import is_abandoned, temporary_name
from rats.schemas.errors import CannotCreateError, RatsError, StorageError

_FULL = (errno.ENOSPC, errno.EDQUOT)
_CANNOT = (errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EROFS, errno.EISDIR, errno.EEXIST)


def atomic_write(path: Path, data: bytes) -> None:
    """Write a whole file.

    Raises:
        StorageError: the disk is full or fails; what was at `path` is still there.
        CannotCreateError: the folder cannot be written.
    """
    with storage_errors(path, len(data)), atomic_path(path) as temporary:
        temporary.write_bytes(data)


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary file name beside `path`. If the body succeeds, the file that it wrote there replaces `path`.

    Raises:
        StorageError: the disk is full or fails; what was at `path` is still there.
        CannotCreateError: the folder cannot be written.
    """
    with storage_errors(path), temporary_path(path) as temporary:
        yield temporary
        put(temporary, path)


@contextmanager
def temporary_path(path: Path) -> Iterator[Path]:
    """A temporary name beside `path`. The file is removed at the end, unless `put` moved it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(path)
    try:
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def put(temporary: Path, path: Path) -> None:
    """Move a written temporary file to `path`; it is synced to the disk when this returns."""
    sync(temporary)
    os.replace(temporary, path)
    sync(path.parent)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A temporary folder beside `path` that replaces it, synced, if the body succeeds.

    An old folder is moved aside first. For a moment there is none at `path`, but never a mixed one.
    """
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = _temporary(path)
        temporary.mkdir()
        try:
            yield temporary
            for entry in [*temporary.rglob("*"), temporary]:
                sync(entry)
            _swap(temporary, path)
            sync(path.parent)
        finally:
            remove(temporary)


def check_creatable(path: Path) -> None:
    """Finds out before hours of work whether a file or folder can be made at `path`, and its folders with it.

    For a moment there is an empty folder in the nearest one that exists: its rights alone would not say it.

    Raises:
        CannotCreateError: it cannot.
        StorageError: the disk is full or fails.
    """
    path = path.absolute()
    nearest = next(folder for folder in path.parents if os.path.lexists(folder))
    with storage_errors(path), TemporaryDirectory(prefix=".rats-", dir=nearest):
        pass


def link_or_copy(source: Path, target: Path) -> None:
    """A hardlink, its folder made where needed; a copy where the file system differs or has no links."""
    with storage_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(source, target)
        except OSError as error:
            if error.errno not in (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP):
                raise
            shutil.copyfile(source, target)


def read_only(path: Path) -> None:
    """Takes the right to write from everybody; the other rights stay as the umask gave them.

    For files that are named by their content: a published one is the store's own, by a second name. Nothing happens
    where the file is somebody else's, or the file system has no such rights.
    """
    with suppress(PermissionError):
        if (mode := path.stat().st_mode) & 0o222:
            path.chmod(mode & 0o555)


def _swap(temporary: Path, path: Path) -> None:
    if not path.is_dir():
        os.rename(temporary, path)
        return
    old = _temporary(path)
    os.rename(path, old)
    try:
        os.rename(temporary, path)
    except OSError:
        os.rename(old, path)
        raise
    remove(old)


def sync(path: Path) -> None:
    """Flush a file or a folder's entries to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove(path: Path) -> None:
    """Delete a file or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def storage_errors(path: object, size: int | None = None) -> Iterator[None]:
    """Turns errors of the operating system while `path` is written (`size` bytes) into RatsErrors."""
    try:
        yield
    except RatsError:
        raise
    except Exception as error:
        number = _errno(error)
        if number in _FULL:
            raise StorageError(f"disk full writing {path}", f"{_free(size)}, run the same command again") from error
        if number in _CANNOT:
            raise CannotCreateError(f"cannot create {path}: {os.strerror(number)}", "choose another folder") from error
        if isinstance(error, OSError):
            raise StorageError(f"cannot write {path}: {error}", "run the same command again") from error
        raise


def _errno(error: BaseException) -> int:
    """The system's error number. Errors of safetensors (Rust) have it only in their text."""
    if isinstance(error, OSError) and error.errno:
        return error.errno
    text = str(error)
    known = [number for number in (*_FULL, *_CANNOT) if f"os error {number})" in text]
    return known[0] if known else 0


def _free(size: int | None) -> str:
    return f"free {size} bytes" if size else "free some space"


def _temporary(path: Path) -> Path:
    """A temporary name in the same folder."""
    _sweep(path.parent.absolute(), os.getpid())
    return path.parent / temporary_name(path.name)


@lru_cache(maxsize=4096)
def _sweep(folder: Path, process: int) -> None:
    """Removes what dead writers of this machine left in a folder. Once for each process, forked ones too."""
    with os.scandir(folder) as entries:
        stale = [entry.path for entry in entries if is_abandoned(entry.name)]
    for path in stale:
        with suppress(FileNotFoundError):  # another process is sweeping too
            remove(Path(path))


@contextmanager
def file_lock(path: Path, seconds: float) -> Iterator[bool]:
    """Holds the lock in the block. Gives whether it was acquired within `seconds`.

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
