"""Where a store lies: a local folder, or any fsspec location ("s3://bucket/store", "gs://...", "memory://...").

An object store has no rename, no links and no locks. What stands in for them: an object appears whole when its one
upload ends, so nothing has to be renamed; the document that vouches for it comes after it, so a killed writer leaves
nothing that is believed; and a name that must be taken once is created with the store's own condition "only if there
is none" (`create`), where a local store uses a lock.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from upath import UPath
from upath.registry import available_implementations

from rats.schemas.errors import CannotCreateError, ConfigError, DataError, RatsError, StorageError

Place = Path | UPath
Item = TypeVar("Item")
Result = TypeVar("Result")

REQUESTS = 32
"""Remote requests at once: each waits tens of milliseconds and costs nothing."""

EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs"}
"""The extra of this package that brings a protocol's file system."""


def open_place(text: str | Path | UPath) -> Place:
    """The place that `text` names: a URL with "://", else a local path.

    Raises:
        ConfigError: a protocol that fsspec does not know, or whose package is not installed.
    """
    if isinstance(text, Path | UPath) or "://" not in text:
        return text if isinstance(text, UPath) else Path(text)
    protocol, _, rest = text.partition("://")
    if protocol in ("file", "local"):
        return Path(rest)
    if protocol not in available_implementations():
        raise ConfigError(f"{text}: unknown protocol {protocol!r}; use a folder, s3://, gs:// or another of fsspec's")
    try:
        # a cached listing would hide what other workers have written
        place = UPath(text, use_listings_cache=False)
        place.fs  # noqa: B018  (imports the file system)
        return place
    except ImportError as error:
        extra = f"'rats[{EXTRAS[protocol]}]'" if protocol in EXTRAS else "its fsspec package"
        raise ConfigError(f"{text} needs {extra}: pip install {extra} ({error})") from None


def is_remote(place: Place) -> bool:
    """Whether the place is not on a local file system."""
    return not isinstance(place, Path)


def absolute(place: Place) -> Place:
    """The place as a worker in another folder finds it."""
    return place.absolute() if isinstance(place, Path) else place


def concurrently(place: Place, function: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    """`function` of every item, in order: many at once where each is a request to a remote `place`."""
    if not is_remote(place):
        return [function(item) for item in items]
    with ThreadPoolExecutor(REQUESTS) as pool:
        return list(pool.map(function, items))


def read(place: UPath, remedy: str, start: int | None = None, end: int | None = None) -> bytes:
    """An object's bytes, or those from `start` to before `end`.

    Raises:
        DataError: there is no such object; `remedy` ends the text.
        StorageError: the store cannot be reached.
    """
    with reading(place, remedy):
        return place.fs.cat_file(place.path, start=start, end=end)


def write(place: UPath, data: bytes) -> None:
    """One upload: the object is there whole, or as it was before."""
    with writing(place):
        place.fs.pipe_file(place.path, data)


def upload(file: Path, place: UPath) -> None:
    """As `write`, of a local file."""
    with writing(place):
        place.fs.put_file(str(file), place.path)
        if (size := place.fs.size(place.path)) != file.stat().st_size:
            raise StorageError(f"{place} has {size} of {file.stat().st_size} bytes; run the same command again")


def create(place: UPath, data: bytes) -> bool:
    """Write an object unless there is one; says whether it did. Of several at once, exactly one does."""
    with writing(place):
        try:
            place.fs.pipe_file(place.path, data, mode="create")
        except FileExistsError:
            return False
        return True


@contextmanager
def reading(place: UPath, remedy: str) -> Iterator[None]:
    """Turns a remote file system's errors, of a dozen libraries, into ours."""
    try:
        yield
    except RatsError:
        raise
    except FileNotFoundError:
        raise DataError(f"{place} is missing; {remedy}") from None
    except Exception as error:
        raise StorageError(f"cannot read {place}: {_reason(error)}; run the same command again") from error


@contextmanager
def writing(place: UPath) -> Iterator[None]:
    """As `reading`, for writes."""
    try:
        yield
    except RatsError:
        raise
    except Exception as error:
        denied = isinstance(error, PermissionError) or getattr(error, "errno", None) == errno.EACCES
        if denied or isinstance(error, FileNotFoundError):
            raise CannotCreateError(
                f"cannot create {place}: {_reason(error)}; check the bucket and your rights"
            ) from error
        raise StorageError(f"cannot write {place}: {_reason(error)}; run the same command again") from error


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def matching(folder: Place, pattern: str) -> list[Place]:
    """What matches below a folder, by name; nothing when there is none."""
    found: list[Place] = list(folder.glob(pattern))
    return sorted(found, key=str)


def download(place: UPath, file: Path, remedy: str) -> None:
    """An object as a local file."""
    with reading(place, remedy):
        place.fs.get_file(place.path, str(file))


def sizes(folder: Place) -> dict[str, int]:
    """Size by name of the files directly in a folder; empty when there is none. One request."""
    if isinstance(folder, Path):
        return {path.name: path.lstat().st_size for path in folder.iterdir()} if folder.is_dir() else {}
    try:
        entries: list[Any] = folder.fs.ls(folder.path, detail=True)
    except FileNotFoundError:
        return {}
    return {entry["name"].rpartition("/")[2]: entry["size"] for entry in entries if entry["type"] == "file"}
