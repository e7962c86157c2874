"""JSON documents that carry the blake3 of their own content, so that damage is found before use."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any, TypeVar

from blake3 import blake3
from pydantic import BaseModel, ValidationError

from rats.pipeline.atomic import atomic_write
from rats.schemas.canonical import canonical_json
from rats.schemas.errors import DataError, StorageError

_Model = TypeVar("_Model", bound=BaseModel)
_CHUNK = 1 << 22


def write_sealed(path: Path, document: BaseModel) -> None:
    """Write a document atomically, with its seal."""
    content = document.model_dump(mode="json")
    atomic_write(path, canonical_json({**content, "seal": hash_bytes(canonical_json(content))}))


def read_sealed(path: Path, model: type[_Model], remedy: str) -> _Model:
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


def check_version(content: Any, path: Path) -> None:
    """Refuse a later format by name, before its unknown fields do."""
    version = content.get("format_version", 1)
    if version != 1:
        raise DataError(f"{path} has format version {version!r}, this rats reads 1; update rats")


def read_regular(path: Path, remedy: str) -> bytes:
    """All bytes of a plain file; links and devices are refused."""
    with open_regular(path, remedy) as file:
        try:
            return file.read()
        except OSError as error:
            raise StorageError(f"cannot read {path}: {error.strerror}; {remedy}") from None


def open_regular(path: Path, remedy: str) -> Any:
    """An unbuffered binary reader of a plain file that is no link (a link could lead out of the folder)."""
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


def hash_bytes(data: bytes) -> str:
    """blake3, 64 hex digits."""
    return blake3(data).hexdigest()


def hash_file(path: Path, remedy: str) -> tuple[str, int]:
    """blake3 and size of a plain file, read in pieces."""
    digest, size = blake3(), 0
    with open_regular(path, remedy) as file:
        while piece := file.read(_CHUNK):
            digest.update(piece)
            size += len(piece)
    return digest.hexdigest(), size


def _reason(error: Exception) -> str:
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    return f"no {error}" if isinstance(error, KeyError) else " ".join(str(error).split())[:200]
