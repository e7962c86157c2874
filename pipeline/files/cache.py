"""A local cache of data from remote stores. Its size is bounded, and its files are checked at every use.

`RATS_CACHE_DIR` names the folder (default: ~/.cache/rats), `RATS_CACHE_GIB` its size (default: 20; 0: no cache).
Several processes may share it.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

from rats.pipeline.files.atomic import atomic_write
from rats.schemas.errors import ConfigError, RatsError

DEFAULT_GIB = 20.0
_SLACK = 0.05
"""The share of the limit that may be written before the folder's size is measured again."""


class Cache:
    """Files by name, the least recently used removed first.

    Attributes:
        folder: Where they lie.
        limit: In bytes. One process never exceeds it; each of several may exceed it by a twentieth for a moment.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        """Creates nothing yet."""
        self.folder, self.limit = Path(folder), limit
        self._written = self._room = 0

    def get(self, name: str, fetch: Callable[[], bytes], is_whole: Callable[[bytes], bool]) -> bytes:
        """The cached bytes of that name if they are valid, else those of `fetch`, which are then cached if valid."""
        path = self.folder / name[:2] / name
        data = _read(path)
        if data is not None and is_whole(data):
            os.utime(path)
            return data
        data = fetch()
        if is_whole(data):
            self._keep(path, data)
        return data

    def _keep(self, path: Path, data: bytes) -> None:
        """Makes room first, so that the limit always holds. A cache that cannot be written is no error."""
        if len(data) > self.limit:
            return
        if self._written + len(data) > self._room:
            self._room, self._written = self._make_room(len(data)), 0
        try:
            atomic_write(path, data)
            self._written += len(data)
        except RatsError:
            self._room = 0

    def _make_room(self, wanted: int) -> int:
        """Removes the least recently used files until `wanted` bytes and some slack fit; returns how many fit now."""
        files = sorted((stat.st_mtime_ns, stat.st_size, path) for path, stat in self._files())
        used = sum(size for _, size, _ in files)
        room = max(wanted, int(self.limit * _SLACK))
        for _, size, path in files:
            if used + room <= self.limit:
                break
            path.unlink(missing_ok=True)
            used -= size
        return max(room, 0)

    def _files(self) -> list[tuple[Path, os.stat_result]]:
        found = []
        for path in self.folder.glob("??/*"):
            try:
                found.append((path, path.stat()))
            except FileNotFoundError:
                continue  # another process made room
        return found


@lru_cache(maxsize=1)
def shared() -> Cache:
    """The cache of this process, as the environment variables describe it."""
    text = os.environ.get("RATS_CACHE_GIB", str(DEFAULT_GIB))
    try:
        limit = int(float(text) * 2**30)
    except (ValueError, OverflowError):
        limit = -1
    if limit < 0:
        raise ConfigError(f"RATS_CACHE_GIB is {text!r}: give a number of GiB, 0 for no cache")
    folder = os.environ.get("RATS_CACHE_DIR") or os.path.join(os.path.expanduser("~"), ".cache", "rats")
    return Cache(Path(folder), limit)


def _read(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except OSError:
        return None
