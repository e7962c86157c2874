"""A place in an object store, through fsspec.

An object store has no rename, no links and no locks. Instead: an object appears whole when its single upload ends, so
nothing has to be renamed. The document that describes it is written after it, so that what a killed writer left is
never read. And where a local store uses a lock, a name is taken by the store's own conditional write (`create`).
"""

from __future__ import annotations

import errno
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, TypeVar

from upath.extensions import ProxyUPath

from rats.pipeline.files import cache
from rats.pipeline.files.atomic import read_only, storage_errors
from rats.pipeline.files.local import LocalPlace
from rats.schemas.errors import CannotCreateError, DataError, RatsError, StorageError, reason

Item = TypeVar("Item")
Result = TypeVar("Result")

REQUESTS = 32
"""Remote requests at once. Each one waits tens of milliseconds and needs no processor."""


class RemotePlace(ProxyUPath):
    """An fsspec location as a `places.Place`."""

    has_locks = False

    @property
    def local(self) -> None:
        """None: it has no local path."""

    def open_plain(self) -> Any:
        """Opens the object. Object stores have no links."""
        with _reading(self):
            return self.fs.open(self.path, "rb")

    def read(self) -> bytes:
        """One request."""
        with _reading(self):
            return self.fs.cat_file(self.path)

    def read_range(self, start: int, end: int) -> bytes:
        """One request for these bytes only."""
        with _reading(self):
            return self.fs.cat_file(self.path, start=start, end=end)

    def cached(self, name: str, read: Callable[[], bytes], is_whole: Callable[[bytes], bool]) -> bytes:
        """Through the local cache (`files.cache`)."""
        return cache.shared().get(name, read, is_whole)

    def sizes(self) -> dict[str, int]:
        """One request."""
        try:
            entries: list[Any] = self.fs.ls(self.path, detail=True)
        except FileNotFoundError:
            return {}
        return {entry["name"].rpartition("/")[2]: entry["size"] for entry in entries if entry["type"] == "file"}

    def refuse_links(self) -> None:
        """Does nothing: object stores have no links."""

    def write(self, data: bytes) -> None:
        """Writes an object by one upload. If that fails, the old object is still there."""
        with _writing(self):
            self.fs.pipe_file(self.path, data)

    def create(self, data: bytes) -> bool:
        """Of several writers at once, exactly one succeeds."""
        with _writing(self):
            try:
                self.fs.pipe_file(self.path, data, mode="create")
            except FileExistsError:
                return False
            return True

    @contextmanager
    def temporary(self) -> Iterator[LocalPlace]:
        """A file in a temporary folder of this machine."""
        with storage_errors(self), tempfile.TemporaryDirectory(prefix="rats-") as folder:
            yield LocalPlace(folder, self.name)

    def put(self, temporary: Path) -> None:
        """One upload, whose size is checked afterwards."""
        with _writing(self):
            self.fs.put_file(str(temporary), self.path)
            there, here = self.fs.size(self.path), temporary.stat().st_size
            if there != here:
                raise StorageError(f"{self} has {there} of {here} bytes", "run the same command again")

    def lock(self, seconds: float) -> AbstractContextManager[bool]:
        """Always acquired: object stores have no locks, and `create` is atomic."""
        return nullcontext(True)

    def concurrently(self, function: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
        """Many at once, since each item is a request."""
        with ThreadPoolExecutor(REQUESTS) as pool:
            return list(pool.map(function, items))

    def free(self) -> None:
        """None: unknown."""

    def copy_to(self, target: Path) -> None:
        """A download."""
        target.parent.mkdir(parents=True, exist_ok=True)
        with _reading(self):
            self.fs.get_file(self.path, str(target))
        read_only(target)

    def is_copied_to(self, target: Path) -> bool:
        """Compares documents byte by byte, other files by size, since the documents have their hashes."""
        if self.suffix != ".json":
            return target.stat().st_size == self.stat().st_size
        return target.read_bytes() == self.read()


@contextmanager
def _reading(place: RemotePlace) -> Iterator[None]:
    """Turns the errors of remote file systems into RatsErrors."""
    try:
        yield
    except RatsError:
        raise
    except FileNotFoundError:
        raise DataError(f"{place} is missing") from None
    except Exception as error:
        raise StorageError(f"cannot read {place}: {reason(error)}", "run the same command again") from error


@contextmanager
def _writing(place: RemotePlace) -> Iterator[None]:
    """As `_reading`, for writes."""
    try:
        yield
    except RatsError:
        raise
    except Exception as error:
        denied = isinstance(error, PermissionError) or getattr(error, "errno", None) == errno.EACCES
        if denied or isinstance(error, FileNotFoundError):
            raise CannotCreateError(
                f"cannot create {place}: {reason(error)}", "check the bucket and your rights"
            ) from error
        raise StorageError(f"cannot write {place}: {reason(error)}", "run the same command again") from error
