"""A place on this machine: plain files and folders, with the operating system's locks and links."""

from __future__ import annotations

import filecmp
import os
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path, PosixPath
from typing import Any, TypeVar

from rats.pipeline.files.atomic import file_lock, link_or_copy, put, read_only, storage_errors, temporary_path
from rats.schemas.errors import DataError, StorageError

Item = TypeVar("Item")
Result = TypeVar("Result")


class LocalPlace(PosixPath):
    """A local path as a `places.Place`."""

    __slots__ = ()

    has_locks = True

    @property
    def local(self) -> Path:
        """Itself."""
        return self

    def open_plain(self) -> Any:
        """Opens a regular file. Links are refused, since they could lead out of the folder."""
        try:
            handle = os.open(self, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except FileNotFoundError:
            raise DataError(f"{self} is missing") from None
        except OSError as error:
            raise DataError(f"cannot open {self}: {error.strerror} (a link is refused)") from None
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            os.close(handle)
            raise DataError(f"{self} is not a plain file")
        return os.fdopen(handle, "rb", buffering=0)

    def read(self) -> bytes:
        """All bytes."""
        with self.open_plain() as file:
            try:
                return file.read()
            except OSError as error:
                raise StorageError(f"cannot read {self}: {error.strerror}") from None

    def read_range(self, start: int, end: int) -> bytes:
        """Fewer bytes if the file was cut. Never allocates more than the file's size."""
        with self.open_plain() as file:
            try:
                return _read_range(file, start, end)
            except (OSError, OverflowError) as error:
                raise StorageError(f"cannot read {self}: {error}", "check the disk") from None

    def cached(self, name: str, read: Callable[[], bytes], is_whole: Callable[[bytes], bool]) -> bytes:
        """As `read`: local files are not cached."""
        return read()

    def sizes(self) -> dict[str, int]:
        """Includes links and hidden files."""
        return {path.name: path.lstat().st_size for path in self.iterdir()} if self.is_dir() else {}

    def refuse_links(self) -> None:
        """Checks the folders, since `open_plain` checks only the last part of a path."""
        for path in [*self.glob("*"), *self.glob("scores/*")]:
            if path.is_symlink() and path.is_dir():
                raise DataError(f"{path} is a link to another folder (a link is refused)")

    def write(self, data: bytes) -> None:
        """Writes under a temporary name, then renames."""
        with storage_errors(self, len(data)), temporary_path(self) as temporary:
            temporary.write_bytes(data)
            self.put(temporary)

    def create(self, data: bytes) -> bool:
        """Not atomic: the caller must hold a lock."""
        if self.exists():
            return False
        self.write(data)
        return True

    @contextmanager
    def temporary(self) -> Iterator[LocalPlace]:
        """A temporary file in the same folder, so that `put` only renames."""
        with storage_errors(self), temporary_path(self) as path:
            yield LocalPlace(path)

    def put(self, temporary: Path) -> None:
        """It is read-only from here on; the file is synced to the disk when this returns."""
        read_only(temporary)
        put(temporary, self)

    def lock(self, seconds: float) -> AbstractContextManager[bool]:
        """A lock among the processes of this machine. It is released if its holder dies."""
        return file_lock(self, seconds)

    def concurrently(self, function: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
        """One after the other, since a local disk needs no waiting."""
        return [function(item) for item in items]

    def free(self) -> int:
        """Free bytes of the disk with the nearest existing parent folder."""
        here = self.absolute()
        return shutil.disk_usage(next(folder for folder in (here, *here.parents) if folder.exists())).free

    def copy_to(self, target: Path) -> None:
        """A hardlink where the file system allows it."""
        link_or_copy(self, target)
        read_only(target)

    def is_copied_to(self, target: Path) -> bool:
        """Whether both are names of one file, or, where that cannot be, have the same content."""
        return os.path.samefile(self, target) or filecmp.cmp(self, target, shallow=False)


def _read_range(file: Any, start: int, end: int) -> bytes:
    file.seek(0, os.SEEK_END)
    length = max(0, min(end, file.tell()) - start)
    file.seek(start)
    pieces = [file.read(length)]  # a plain file gives all at once, save beyond 2 GiB or after a signal
    while pieces[-1] and (left := length - sum(map(len, pieces))):
        pieces.append(file.read(left))
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)
