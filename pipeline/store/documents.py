"""JSON documents with a seal: the blake3 of their own content, so that damage is found before use."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from rats.pipeline.files.places import Place
from rats.pipeline.files.reading import hash_bytes
from rats.schemas.canonical import canonical_json
from rats.schemas.errors import DataError, brief, reason

_Model = TypeVar("_Model", bound=BaseModel)


def write_document(path: Place, document: BaseModel) -> None:
    """Write a document atomically, with its seal."""
    path.write(_sealed(document))


def create_document(path: Place, document: BaseModel) -> bool:
    """As `write_document`, unless the document exists; returns whether it wrote (`Place.create`)."""
    return path.create(_sealed(document))


def _sealed(document: BaseModel) -> bytes:
    content = document.model_dump(mode="json")
    return canonical_json({**content, "seal": hash_bytes(canonical_json(content))})


def read_all_documents(paths: Sequence[Place], model: type[_Model]) -> list[_Model]:
    """Many documents, in order; from a remote place many at once."""
    if not paths:
        return []
    return paths[0].concurrently(lambda path: read_document(path, model), paths)


def read_document(path: Place, model: type[_Model]) -> _Model:
    """Read a document back.

    Raises:
        DataError: missing, damaged, of an unknown format, or not what its seal says.
    """
    data = path.read()
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
        raise DataError(f"{path} is damaged ({_damage(error)})") from None


def check_version(content: Any, path: Place) -> None:
    """Refuses a later format by its version, before its unknown fields give an unclear error."""
    version = content.get("format_version", 1)
    if version != 1:
        raise DataError(f"{path} has format version {brief(version)}, this rats reads 1", "update rats")


def _damage(error: Exception) -> str:
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    return f"no {error}" if isinstance(error, KeyError) else reason(error)
