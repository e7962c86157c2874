"""Reads plain files and hashes them; links and devices are refused."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from blake3 import blake3

from rats.pipeline.files import places
from rats.pipeline.files.places import Place
from rats.schemas.errors import DataError, StorageError

_CHUNK = 1 << 20
"""Read at once: small enough that a second hash of a piece finds it in the processor's cache."""


def read_regular(path: Place, remedy: str) -> bytes:
    """All bytes of a plain file; links and devices are refused."""
    if not isinstance(path, Path):
        return places.read(path, remedy)
    with open_regular(path, remedy) as file:
        try:
            return file.read()
        except OSError as error:
            raise StorageError(f"cannot read {path}: {error.strerror}; {remedy}") from None


def open_regular(path: Place, remedy: str) -> Any:
    """An unbuffered binary reader of a plain file that is no link (a link could lead out of the folder)."""
    if not isinstance(path, Path):
        with places.reading(path, remedy):
            return path.fs.open(path.path, "rb")
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise DataError(f"{path} is missing; {remedy}") from None
    except OSError as error:
        raise DataError(f"cannot open {path}: {error.strerror} (a link is refused); {remedy}") from None
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise DataError(f"{path} is not a plain file; {remedy}")
    return os.fdopen(handle, "rb", buffering=0)


def refuse_linked_folders(root: Place, remedy: str) -> None:
    """DataError when a folder of a set is a link: `open_regular` looks at a path's last part only."""
    if not isinstance(root, Path):
        return
    for path in [*root.glob("*"), *root.glob("scores/*")]:
        if path.is_symlink() and path.is_dir():
            raise DataError(f"{path} is a link to another folder (a link is refused); {remedy}")


def hash_bytes(data: bytes) -> str:
    """blake3, 64 hex digits."""
    return blake3(data).hexdigest()


def hash_file(path: Place, remedy: str) -> tuple[str, int]:
    """blake3 and size of a plain file, read in pieces."""
    digest, size = blake3(), 0
    for piece in _pieces(path, remedy):
        digest.update(piece)
        size += len(piece)
    return digest.hexdigest(), size


def hash_ranges(path: Place, ranges: Sequence[tuple[int, int]], remedy: str) -> tuple[str, list[str]]:
    """blake3 of a whole plain file and of each (offset, length) in it, reading once.

    A range that reaches beyond the file's end is hashed as far as the file goes.
    """
    whole, parts, start = blake3(), [blake3() for _ in ranges], 0
    order = sorted(range(len(ranges)), key=lambda i: ranges[i])
    first = 0
    for piece in _pieces(path, remedy):
        whole.update(piece)
        end = start + len(piece)
        while first < len(order) and sum(ranges[order[first]]) <= start:
            first += 1
        for i in order[first:]:
            offset, length = ranges[i]
            if offset >= end:
                break
            parts[i].update(piece[max(0, offset - start) : max(0, offset + length - start)])
        start = end
    return whole.hexdigest(), [part.hexdigest() for part in parts]


def _pieces(path: Place, remedy: str) -> Iterator[memoryview]:
    """A file's bytes in order, in one buffer that is used again: allocating would cost as much as hashing."""
    buffer = memoryview(bytearray(_CHUNK))
    with open_regular(path, remedy) as file:
        while count := _read_into(file, buffer, path, remedy):
            yield buffer[:count]


def _read_into(file: Any, buffer: memoryview, path: Place, remedy: str) -> int:
    try:
        return file.readinto(buffer)
    except OSError as error:
        raise StorageError(f"cannot read {path}: {error}; {remedy}") from None
