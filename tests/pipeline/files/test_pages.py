"""The sizes of a Parquet file's pages are what the pages say, whatever its footer says."""

from __future__ import annotations

import gzip
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rats.pipeline import bounds
from rats.pipeline.bounds import unfolded
from rats.pipeline.files.local import LocalPlace
from rats.pipeline.files.pages import open_parquet, page_sizes
from rats.pipeline.files.reading import hash_bytes
from rats.pipeline.prompts import read_prompts
from rats.pipeline.store.parquet import encode_rows, read_rows
from rats.schemas.errors import ConfigError, DataError
from rats.schemas.manifest import ScoreRow

LONG = 2_700_000
"""Letters of one text that take a few hundred bytes on disk: more than may unfold from them in these tests."""


@pytest.fixture(autouse=True)
def little(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few bytes that any file may take."""
    monkeypatch.setattr(bounds, "_FREE", 1 << 20)


def parquet(table: pa.Table, **settings: object) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, **settings)
    return sink.getvalue().to_pybytes()


def forged(data: bytes, number: int) -> bytes:
    """With the footer's largest number, in Thrift's zigzag varint, replaced by a nought of as many bytes."""
    left, digits = number << 1, []
    while left:
        left, digit = divmod(left, 128)
        digits.append(digit | (128 if left else 0))
    start = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    assert bytes(digits) in data[start:]
    nought = b"\x80" * (len(digits) - 1) + b"\0"
    return data[:start] + data[start:].replace(bytes(digits), nought)


def bomb() -> bytes:
    """A table of scores with one text of 2.7 MB, and a footer that does not say so."""
    row = ScoreRow(key="a" * 64, score=None, status="failed", error="x" * LONG)
    data = encode_rows(ScoreRow, [row])
    about = pq.ParquetFile(pa.BufferReader(data)).metadata.row_group(0)
    data = forged(data, about.column(3).total_uncompressed_size)
    return forged(data, about.total_byte_size)


@pytest.mark.parametrize("version", ["1.0", "2.0"])
@pytest.mark.parametrize("codec", ["none", "zstd", "snappy", "gzip"])
def test_pages_say_what_an_honest_footer_says(version: str, codec: str):
    rows = range(7000)
    table = pa.table(
        {
            "text": [f"{i * 37 % 1009} " * (i % 90) for i in rows],
            "number": [i * 0.37 for i in rows],
            "flag": [i % 3 == 0 for i in rows],
            "texts": [[f"{i}"] * (i % 4) if i % 5 else None for i in rows],
        }
    )
    data = parquet(table, compression=codec, data_page_version=version, data_page_size=5000, row_group_size=2300)
    about = open_parquet(pa.BufferReader(data), len(data)).metadata
    pages = list(page_sizes(about, lambda at, length: data[at : at + length]))
    columns = [about.row_group(group).column(i) for group in range(4) for i in range(4)]
    assert len(pages) > 20
    # what the footer counts is pages with their headers
    for which, name in ((0, "total_compressed_size"), (1, "total_uncompressed_size")):
        headers = sum(getattr(column, name) for column in columns) - sum(page[which] for page in pages)
        assert 15 * len(pages) < headers < 150 * len(pages)
    some = list(page_sizes(about, lambda at, length: data[at : at + length], ["text"]))
    assert 0 < len(some) < len(pages)


def test_a_table_that_unfolds_to_more_than_it_says_is_refused(tmp_path: Path):
    data = bomb()
    assert unfolded(len(data)) < LONG
    (tmp_path / "a.parquet").write_bytes(data)
    with pytest.raises(DataError, match=f"1 rows, {str(LONG)[:3]}[0-9]+ bytes in a file of {len(data)}"):
        read_rows(LocalPlace(tmp_path / "a.parquet"), ScoreRow, hash_bytes(data))


def test_a_footer_has_no_more_items_than_bytes(tmp_path: Path):
    data = encode_rows(ScoreRow, [ScoreRow(key="a" * 64, score=0.37, status="ok", error=None)])
    start = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    # field 2, the schema, as a list of 900,000 structs
    footer = b"\x15\x0a\x19\xfc" + b"\xa0\xf7\x36" + b"\0" * 3000
    data = data[:start] + footer + len(footer).to_bytes(4, "little") + b"PAR1"
    (tmp_path / "a.parquet").write_bytes(data)
    with pytest.raises(DataError, match="Exceeded size limit"):
        read_rows(LocalPlace(tmp_path / "a.parquet"), ScoreRow, hash_bytes(data))


@pytest.mark.parametrize("texts", [["x" * LONG], ["y" * 3_000] * 900], ids=["one long", "one shared by all"])
def test_prompts_that_unfold_to_too_much_are_refused(tmp_path: Path, texts: list[str]):
    path = tmp_path / "a.parquet"
    path.write_bytes(parquet(pa.table({"prompt": texts}), compression="zstd"))
    assert path.stat().st_size < 30_000
    with pytest.raises(ConfigError, match=re.escape(str(path))):
        read_prompts(path)


def test_packed_prompts_are_unpacked_no_further_than_real_ones(tmp_path: Path):
    path = tmp_path / "a.txt.gz"
    path.write_bytes(gzip.compress(b"a fox\n" * LONG))
    with pytest.raises(ConfigError, match=f"to more than {unfolded(path.stat().st_size)} bytes: unpack it yourself"):
        read_prompts(path)
