"""Where a store lies: a local folder, or any fsspec location ("s3://bucket/store", "gs://...", "memory://...").

The rest of the program uses only `Place`. Code for local files alone (runs, checkpoints, models, reports) uses
pathlib.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol, Self, TypeVar

from upath.registry import available_implementations

from rats.pipeline.files.local import LocalPlace
from rats.pipeline.files.remote import RemotePlace
from rats.pipeline.project import real_folder
from rats.schemas.errors import ConfigError

Item = TypeVar("Item")
Result = TypeVar("Result")

EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs"}
"""The extra of this package that installs a protocol's file system."""


class Place(Protocol):
    """A file or folder of a store. `LocalPlace` and `RemotePlace` implement it.

    Attributes:
        has_locks: Whether `lock` excludes other processes. If not, only `create` is atomic between processes.
    """

    has_locks: bool

    # as of pathlib

    @property
    def name(self) -> str: ...
    @property
    def stem(self) -> str: ...
    @property
    def suffix(self) -> str: ...
    @property
    def parent(self) -> Self: ...
    def __truediv__(self, name: str, /) -> Self: ...
    def absolute(self) -> Self: ...
    def exists(self) -> bool: ...
    def is_dir(self) -> bool: ...
    def iterdir(self) -> Iterator[Self]: ...
    def glob(self, pattern: str) -> Iterator[Self]: ...
    def stat(self) -> Any: ...

    # our own

    @property
    def local(self) -> Path | None:
        """The local path; None for a remote place."""

    def open_plain(self) -> Any:
        """An unbuffered binary reader of a plain file.

        Raises:
            DataError: it is missing, a link or a device.
            StorageError: the store cannot be reached.
        """

    def read(self) -> bytes:
        """All bytes of a plain file; raises as `open_plain`."""

    def read_range(self, start: int, end: int) -> bytes:
        """The bytes from `start` to before `end`, fewer where the file ends earlier; raises as `open_plain`."""

    def cached(self, name: str, read: Callable[[], bytes], is_whole: Callable[[bytes], bool]) -> bytes:
        """As `read`. A remote file is kept in the local cache under `name`, if `is_whole` accepts its bytes."""

    def sizes(self) -> dict[str, int]:
        """Size by name of the files directly in a folder; empty when there is none."""

    def refuse_links(self) -> None:
        """DataError when a folder of the set that lies here is a link."""

    def write(self, data: bytes) -> None:
        """Writes a file atomically. A local one is then read-only: nothing in a set ever changes.

        Raises:
            StorageError: the disk is full or fails, or the store cannot be reached.
            CannotCreateError: a missing right, or something in the way.
        """

    def create(self, data: bytes) -> bool:
        """As `write`, unless the file exists already. Returns whether it wrote."""

    def temporary(self) -> AbstractContextManager[LocalPlace]:
        """A local name to write a large file under, removed at the end; errors of the body are those of `write`."""

    def put(self, temporary: Path) -> None:
        """Make the file written under `temporary` the one at this place."""

    def lock(self, seconds: float) -> AbstractContextManager[bool]:
        """Holds a lock in the block. Gives whether it was acquired within `seconds`."""

    def concurrently(self, function: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
        """`function` of every item, in order. For a remote place, many calls run at once."""

    def free(self) -> int | None:
        """Bytes that can still be written here; None if unknown."""

    def copy_to(self, target: Path) -> None:
        """Make a local file with this content, its folder made where needed."""

    def is_copied_to(self, target: Path) -> bool:
        """Whether `target` is what `copy_to` makes."""


def open_place(text: str | Path | Place) -> Place:
    """The place that `text` names: a URL with "://", else a local path.

    Raises:
        ConfigError: a protocol that fsspec does not know, or whose package is not installed.
    """
    if isinstance(text, Path):
        return LocalPlace(text)
    if not isinstance(text, str):
        return text
    if "://" not in text:
        return LocalPlace(text)
    protocol, _, rest = text.partition("://")
    return LocalPlace(rest) if protocol in ("file", "local") else _open_remote(text, protocol)


def open_store(path: str) -> Place:
    """The place of `store.path`. A relative path starts in the project itself, also in one of its copies.

    So an experiment in a worktree of git, or of `dvc exp run --temp` or `--queue`, reuses what the project has; a store
    that the copy has of its own comes first.
    """
    place, here = open_place(path), Path.cwd()
    if place.local is None or place.local.exists() or (real := real_folder(here)) == here:
        return place
    return LocalPlace(real / place.local)


def _open_remote(url: str, protocol: str) -> RemotePlace:
    if protocol not in available_implementations():
        raise ConfigError(f"{url}: unknown protocol {protocol!r}", "use a folder, s3://, gs:// or another of fsspec's")
    try:
        # a cached listing would hide what other workers have written
        place = RemotePlace(url, use_listings_cache=False)
        place.fs  # noqa: B018  (imports the file system)
        return place
    except ImportError as error:
        extra = f"'rats[{EXTRAS[protocol]}]'" if protocol in EXTRAS else "its fsspec package"
        raise ConfigError(f"{url} needs {extra}: pip install {extra} ({error})") from None


def matching(folder: Place, pattern: str) -> list[Place]:
    """The paths below a folder that match, sorted by name; none if the folder does not exist."""
    found: list[Place] = list(folder.glob(pattern))
    return sorted(found, key=str)
