"""Rows of one model as a Parquet file, checked against its hash before it is parsed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ValidationError

from rats.pipeline.atomic import atomic_write
from rats.pipeline.sealed import hash_bytes, read_regular
from rats.schemas.errors import DataError
from rats.schemas.manifest import IndexRow, ScoreRow

_Row = TypeVar("_Row", bound=BaseModel)

_SCHEMAS: dict[type[BaseModel], Any] = {
    IndexRow: pa.schema(
        [
            ("key", pa.string()),
            ("prompt_id", pa.string()),
            ("prompt", pa.string()),
            ("noise_index", pa.int64()),
            ("shard", pa.string()),
            ("offset", pa.int64()),
            ("length", pa.int64()),
            ("blake3", pa.string()),
            ("status", pa.string()),
        ]
    ),
    ScoreRow: pa.schema(
        [("key", pa.string()), ("score", pa.float64()), ("status", pa.string()), ("error", pa.string())]
    ),
}


def write_rows(path: Path, model: type[_Row], rows: Sequence[_Row]) -> str:
    """Write the rows atomically; returns the file's blake3."""
    table = pa.Table.from_pylist([row.model_dump() for row in rows], schema=_SCHEMAS[model])
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    data = sink.getvalue().to_pybytes()
    atomic_write(path, data)
    return hash_bytes(data)


def read_rows(path: Path, model: type[_Row], blake3: str, remedy: str) -> list[_Row]:
    """Rows of the file whose hash is `blake3`; `remedy` ends the error.

    Raises:
        DataError: missing, damaged, or of another schema.
    """
    data = read_regular(path, remedy)
    if (found := hash_bytes(data)) != blake3:
        raise DataError(f"{path} is damaged (blake3 {found[:12]}, recorded {blake3[:12]}); {remedy}")
    try:
        table = pq.read_table(pa.BufferReader(data))
        if not table.schema.equals(_SCHEMAS[model]):
            raise ValueError(f"columns {table.schema.names}")
        return [model.model_validate(row) for row in table.to_pylist()]
    except (pa.ArrowException, ValidationError, ValueError) as error:
        raise DataError(f"{path} is not a table of this format ({str(error)[:120]}); {remedy}") from None
