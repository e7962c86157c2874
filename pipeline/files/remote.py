"""A place in an object store, through fsspec.

An object store has no rename, no links and no locks. What stands in for them: an object appears whole when its one
upload ends, so nothing has to be renamed; the document that vouches for it comes after it, so a killed writer leaves
nothing that is believed; and a name that must be taken once is created with the store's own condition "only if there
is none" (`create`), where a local store uses a lock.
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
from rats.pipeline.files.atomic import storage_errors
from rats.pipeline.files.local import LocalPlace
from rats.schemas.errors import CannotCreateError, DataError, RatsError, StorageError, reason

Item = TypeVar("Item")
Result = TypeVar("Result")

REQUESTS = 32
"""Remote requests at once: each waits tens of milliseconds and costs nothing."""


class RemotePlace(ProxyUPath):
    """An fsspec location that answers what `places.Place` asks."""

    has_locks = False

    @property
    def local(self) -> None:
        """None: the operating system does not know it."""

    def open_plain(self) -> Any:
        """The object: there are no links."""
        with _reading(self):
            return self.fs.open(self.path, "rb")

    def read(self) -> bytes:
        """One request."""
        with _reading(self):
            return self.fs.cat_file(self.path)

    def read_range(self, start: int, end: int) -> bytes:
        """One request, of these bytes alone."""
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
        """There are none."""

    def write(self, data: bytes) -> None:
        """One upload: the object is there whole, or as it was before."""
        with _writing(self):
            self.fs.pipe_file(self.path, data)

    def create(self, data: bytes) -> bool:
        """Of several at once, exactly one does."""
        with _writing(self):
            try:
                self.fs.pipe_file(self.path, data, mode="create")
            except FileExistsError:
                return False
            return True

    @contextmanager
    def temporary(self) -> Iterator[LocalPlace]:
        """In a temporary folder of this machine."""
        with storage_errors(self), tempfile.TemporaryDirectory(prefix="rats-") as folder:
            yield LocalPlace(folder, self.name)

    def put(self, temporary: Path) -> None:
        """One upload, whose size is looked at afterwards."""
        with _writing(self):
            self.fs.put_file(str(temporary), self.path)
            there, here = self.fs.size(self.path), temporary.stat().st_size
            if there != here:
                raise StorageError(f"{self} has {there} of {here} bytes", "run the same command again")

    def lock(self, seconds: float) -> AbstractContextManager[bool]:
        """Always got: `create` decides between two."""
        return nullcontext(True)

    def concurrently(self, function: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
        """Many at once, since each item is a request."""
        with ThreadPoolExecutor(REQUESTS) as pool:
            return list(pool.map(function, items))

    def free(self) -> None:
        """None: nobody can know."""

    def copy_to(self, target: Path) -> None:
        """A download."""
        target.parent.mkdir(parents=True, exist_ok=True)
        with _reading(self):
            self.fs.get_file(self.path, str(target))

    def is_copied_to(self, target: Path) -> bool:
        """Byte by byte for a document, by size for the rest: the documents hold the hashes of all that is larger."""
        if self.suffix != ".json":
            return target.stat().st_size == self.stat().st_size
        return target.read_bytes() == self.read()


@contextmanager
def _reading(place: RemotePlace) -> Iterator[None]:
    """Turns a remote file system's errors, of a dozen libraries, into ours."""
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
