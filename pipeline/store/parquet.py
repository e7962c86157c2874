"""Rows of one model as a Parquet file, checked against its hash before it is parsed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import BaseModel, ValidationError

from rats.pipeline.files.places import Place
from rats.pipeline.files.reading import hash_bytes
from rats.schemas.errors import DataError, reason
from rats.schemas.manifest import IndexRow, ScoreRow

_Row = TypeVar("_Row", bound=BaseModel)

_UNFOLDS = 1000
"""The largest allowed ratio of bytes in memory to bytes on disk. Real files reach 50, with many noises a prompt."""

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


def encode_rows(model: type[_Row], rows: Sequence[_Row]) -> bytes:
    """The rows as a Parquet file; the same rows give the same bytes."""
    table = pa.Table.from_pylist([row.model_dump() for row in rows], schema=_SCHEMAS[model])
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    return sink.getvalue().to_pybytes()


def read_rows(path: Place, model: type[_Row], blake3: str) -> list[_Row]:
    """Rows of the file whose hash is `blake3`.

    Raises:
        DataError: missing, damaged, or of another schema.
    """
    data = path.read()
    if (found := hash_bytes(data)) != blake3:
        raise DataError(f"{path} is damaged (blake3 {found[:12]}, recorded {blake3[:12]})")
    try:
        return [model.model_validate(row) for row in _table(data, _SCHEMAS[model]).to_pylist()]
    except (pa.ArrowException, OSError, ValidationError, ValueError) as error:  # pyarrow's damage is an OSError
        raise DataError(f"{path} is not a table of this format ({reason(error)})") from None


def _table(data: bytes, schema: Any) -> Any:
    """Parses a Parquet file. Raises ValueError if it would take far more memory than its size."""
    about = pq.read_metadata(pa.BufferReader(data))
    if not about.schema.to_arrow_schema().equals(schema):
        raise ValueError(f"columns {about.schema.names}")
    size = sum(about.row_group(group).total_byte_size for group in range(about.num_row_groups))
    if about.num_rows > len(data) or size > _UNFOLDS * len(data):
        raise ValueError(f"{about.num_rows} rows, {size} bytes in a file of {len(data)}")
    texts = [field.name for field in schema if field.type == pa.string()]
    # pyarrow's pool threads would hold `data`, and one that lets go of it while Python ends aborts the process
    table = pq.ParquetFile(pa.BufferReader(data), read_dictionary=texts).read(use_threads=False)
    if (size := sum(_text_bytes(table[name]) for name in texts)) > _UNFOLDS * len(data):
        raise ValueError(f"{size} bytes of text in a file of {len(data)}")
    return table.cast(schema)


def _text_bytes(column: Any) -> int:
    """Total length of the texts in a dictionary-encoded column."""
    lengths = [pc.take(pc.binary_length(chunk.dictionary), chunk.indices) for chunk in column.chunks]
    return sum(pc.sum(chunk).as_py() or 0 for chunk in lengths)
