"""Hashes of plain files; links and devices are refused."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from blake3 import blake3

from rats.pipeline.files.places import Place
from rats.schemas.errors import StorageError

_CHUNK = 1 << 20
"""Bytes read at once. So few stay in the processor's cache until they are hashed a second time."""


def hash_bytes(data: bytes) -> str:
    """blake3, 64 hex digits."""
    return blake3(data).hexdigest()


def hash_file(path: Place) -> tuple[str, int]:
    """blake3 and size of a plain file, read in pieces."""
    digest, size = blake3(), 0
    for piece in _pieces(path):
        digest.update(piece)
        size += len(piece)
    return digest.hexdigest(), size


def hash_ranges(path: Place, ranges: Sequence[tuple[int, int]]) -> tuple[str, list[str]]:
    """blake3 of a whole plain file and of each (offset, length) in it, reading once.

    A range that reaches beyond the file's end is hashed as far as the file goes.
    """
    whole, parts, start = blake3(), [blake3() for _ in ranges], 0
    order = sorted(range(len(ranges)), key=lambda i: ranges[i])
    first = 0
    for piece in _pieces(path):
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


def _pieces(path: Place) -> Iterator[memoryview]:
    """A file's bytes in order, in one reused buffer: allocating new ones would cost as much as hashing."""
    buffer = memoryview(bytearray(_CHUNK))
    with path.open_plain() as file:
        while count := _read_into(file, buffer, path):
            yield buffer[:count]


def _read_into(file: Any, buffer: memoryview, path: Place) -> int:
    try:
        return file.readinto(buffer)
    except OSError as error:
        raise StorageError(f"cannot read {path}: {error}") from None
