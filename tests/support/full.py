"""A disk that is full from the n-th write on: every call that could need room below a folder may fail."""

from __future__ import annotations

import builtins
import errno
import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

NEVER = 10**9


class Disk:
    """Counts what writes below `folder` and fails from call number `room` on, or at that call alone if `once`."""

    def __init__(self, folder: Path, room: int = NEVER, number: int = errno.ENOSPC, once: bool = False) -> None:
        self.folder, self.room, self.number, self.once = str(folder.resolve()), room, number, once
        self.calls: list[str] = []

    def take(self, name: str, path: Any = None) -> None:
        """One call; raises as the system would."""
        if path is not None and not str(os.path.realpath(os.fsdecode(path))).startswith(self.folder):
            return
        self.calls.append(name)
        count = len(self.calls)
        if count == self.room or (count > self.room and not self.once):
            raise OSError(self.number, os.strerror(self.number), None if path is None else os.fsdecode(path))

    def open(self, real: Callable[..., Any], path: Any, mode: str = "r", *more: Any, **options: Any) -> Any:
        """`open`, whose file may be refused at the beginning or in the middle of a write."""
        if isinstance(path, int) or not set(mode) & set("wax+"):
            return real(path, mode, *more, **options)
        self.take(f"open {mode}", path)
        return _File(self, path, mode.replace("b", "")) if "b" in mode else real(path, mode, *more, **options)

    @contextmanager
    def limited(self) -> Iterator[Disk]:
        """While this is open, the disk has no more room than said."""
        with mock.patch.multiple(os, **{name: self._counted(name) for name in COUNTED}):
            for module in (builtins, io):
                real = module.open
                mock.patch.object(module, "open", lambda *a, _real=real, **k: self.open(_real, *a, **k)).start()
            try:
                yield self
            finally:
                mock.patch.stopall()

    def _counted(self, name: str) -> Callable[..., Any]:
        real, place = getattr(os, name), COUNTED[name]

        def call(*arguments: Any, **options: Any) -> Any:
            writes = name != "open" or arguments[1] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            if writes and not (name == "mkdir" and os.path.isdir(arguments[0])):
                self.take(name, arguments[place] if place is not None else _name_of(arguments[0]))
            return real(*arguments, **options)

        return call


COUNTED = {"open": 0, "mkdir": 0, "rename": 1, "replace": 1, "link": 1, "write": None, "fsync": None, "sendfile": None}
"""Functions of `os`, and which argument is the path that needs room; None: the first is an open file."""


def _name_of(handle: int) -> str:
    return os.readlink(f"/proc/self/fd/{handle}") if os.path.exists("/proc/self/fd") else "/"


class _File(io.FileIO):
    """An unbuffered file whose last write before the disk is full leaves half of its bytes."""

    def __init__(self, disk: Disk, path: Any, mode: str) -> None:
        super().__init__(path, mode)
        self.disk, self.path = disk, path

    def write(self, data: Any) -> int:
        """All bytes, or half of them and an error."""
        try:
            self.disk.take("write", self.path)
        except OSError:
            super().write(bytes(data)[: len(bytes(data)) // 2])
            raise
        return super().write(data)
