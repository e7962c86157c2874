"""JSON documents that carry the blake3 of their own content, so that damage is found before use."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from blake3 import blake3
from pydantic import BaseModel, ValidationError

from rats.pipeline import places
from rats.pipeline.atomic import atomic_write, create
from rats.pipeline.places import Place
from rats.schemas.canonical import canonical_json
from rats.schemas.errors import DataError, StorageError, brief

_Model = TypeVar("_Model", bound=BaseModel)
_CHUNK = 1 << 20
"""Read at once: small enough that a second hash of a piece finds it in the processor's cache."""


def write_sealed(path: Place, document: BaseModel) -> None:
    """Write a document atomically, with its seal."""
    atomic_write(path, _sealed(document))


def create_sealed(path: Place, document: BaseModel) -> bool:
    """As `write_sealed`, unless there is one already; says whether it wrote (`atomic.create`)."""
    return create(path, _sealed(document))


def _sealed(document: BaseModel) -> bytes:
    content = document.model_dump(mode="json")
    return canonical_json({**content, "seal": hash_bytes(canonical_json(content))})


def read_all_sealed(paths: Sequence[Place], model: type[_Model], remedy: str) -> list[_Model]:
    """Many documents, in order; from a remote place many at once."""
    if not paths:
        return []
    return places.concurrently(paths[0], lambda path: read_sealed(path, model, remedy), paths)


def read_sealed(path: Place, model: type[_Model], remedy: str) -> _Model:
    """Read a document back; `remedy` ends the error.

    Raises:
        DataError: missing, damaged, of an unknown format, or not what its seal says.
    """
    data = read_regular(path, remedy)
    try:
        content = json.loads(data)
        if canonical_json(content) != data:
            raise ValueError("it was changed by hand")
        check_version(content, path)
        seal = content.pop("seal")
        if seal != hash_bytes(canonical_json(content)):
            raise ValueError("its content does not match its seal")
        return model.model_validate_json(canonical_json(content))
    except (ValidationError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        reason = _reason(error)
        raise DataError(f"{path} is damaged ({reason}); {remedy}") from None


def check_version(content: Any, path: Place) -> None:
    """Refuse a later format by name, before its unknown fields do."""
    version = content.get("format_version", 1)
    if version != 1:
        raise DataError(f"{path} has format version {brief(version)}, this rats reads 1; update rats")


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


def _reason(error: Exception) -> str:
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    return f"no {error}" if isinstance(error, KeyError) else " ".join(str(error).split())[:200]
