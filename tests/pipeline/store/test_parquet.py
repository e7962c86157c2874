"""Tables of rows: what is of another schema is refused by its columns."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rats.pipeline.files.local import LocalPlace
from rats.pipeline.files.reading import hash_bytes
from rats.pipeline.store.parquet import encode_rows, read_rows
from rats.schemas.errors import DataError
from rats.schemas.manifest import ScoreRow


def test_a_table_whose_text_column_has_another_name_is_refused(tmp_path: Path) -> None:
    data = encode_rows(ScoreRow, [ScoreRow(key=f"{i:032x}", score=i / 7) for i in range(3)])
    table = pq.read_table(pa.BufferReader(data))
    path = tmp_path / "a.parquet"
    pq.write_table(table.rename_columns([{"key": "cle"}.get(name, name) for name in table.column_names]), path)
    with pytest.raises(DataError, match="not a table of this format .*'cle'"):
        read_rows(LocalPlace(path), ScoreRow, hash_bytes(path.read_bytes()))
