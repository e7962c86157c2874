"""Rows of one model as a Parquet file, checked against its hash before it is parsed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ValidationError

from rats.pipeline.bounds import unfolded
from rats.pipeline.files.pages import check_texts, open_parquet, page_sizes
from rats.pipeline.files.places import Place
from rats.pipeline.files.reading import hash_bytes
from rats.schemas.errors import DataError, brief, reason
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
    with open_parquet(pa.BufferReader(data), len(data)) as file:
        about = file.metadata
    if not about.schema.to_arrow_schema().equals(schema):
        raise ValueError(f"columns {brief(about.schema.names)}")
    _check_size(about, data)
    texts = [field.name for field in schema if field.type == pa.string()]  # pyarrow fails on a name that is not there
    with open_parquet(pa.BufferReader(data), len(data), read_dictionary=texts) as file:
        # pyarrow's pool threads would hold `data`, and one that lets go of it while Python ends aborts the process
        table = file.read(use_threads=False)
    check_texts([chunk for name in texts for chunk in table[name].chunks], len(data))
    return table.cast(schema)


def _check_size(about: Any, data: bytes) -> None:
    """Every row has a hash of its own in the file; pages are counted by what they say themselves."""
    unpacked = sum(size for _, size in page_sizes(about, lambda at, length: data[at : at + length]))
    if about.num_rows > len(data) or unpacked > unfolded(len(data)):
        raise ValueError(f"{about.num_rows} rows, {unpacked} bytes in a file of {len(data)}")
