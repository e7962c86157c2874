"""Rows of prompt files as they are written: no type is guessed, nothing is cached."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from rats.pipeline.bounds import unfolded
from rats.pipeline.files.pages import check_texts, open_parquet, page_sizes
from rats.pipeline.prompts.cells import kind_of
from rats.pipeline.prompts.json_rows import DOCUMENT, json_values
from rats.pipeline.prompts.text import LINE_ENDS, PACKED, known_format, read_bytes, read_text, unreadable
from rats.schemas.errors import ConfigError, brief

Row = Mapping[str, Any]
Numbered = tuple[int, Row]

ONE_COLUMN = "text"
"""What the only column of a text file and of a list of texts is called; `prompt` names it too."""

_BATCH = 1000
"""Rows of a Parquet file at once: all of a table's pictures would fill the memory."""


@dataclass(frozen=True)
class Table:
    """A file's rows.

    Attributes:
        where: The file, for errors.
        unit: What rows are counted in, from 1: "line", "row" or `DOCUMENT`.
        columns: Their names, as they are written.
        read: The numbered rows, of which the named columns count.
        is_list: Whether it is a list of texts, whose one column has no name of its own.
        inner: Of a JSON document that is one mapping: its lists by key, with the columns that their rows have.
    """

    where: str
    unit: str
    columns: list[str]
    read: Callable[[Sequence[str]], Iterable[Numbered]]
    is_list: bool = False
    inner: Mapping[str, Sequence[str]] | None = None


def open_table(path: Path, field: str | None = None) -> Table:
    """The table in a file, by the ending of its name; `field` is where the rows of a JSON document lie in it.

    Raises:
        ConfigError: another ending, a file that cannot be read, `field` of another format.
    """
    kind = known_format(path)
    if field is not None and kind != "json":
        raise ConfigError(f"{path}: field: says where rows lie in a .json file; name columns by column:")
    if kind == "json":
        return _open_json(path, field)
    if kind == "parquet":
        return _open_parquet(path)
    return _open_lines(path) if kind == "text" else _open_csv(path, "," if kind == "csv" else "\t")


def _open_lines(path: Path) -> Table:
    lines = LINE_ENDS.split(read_text(path))
    return _one_column(path, "line", list(enumerate(lines, start=1)))


def _one_column(path: Path, unit: str, values: list[tuple[int, Any]]) -> Table:
    rows = [(number, {ONE_COLUMN: value}) for number, value in values]
    return Table(str(path), unit, [ONE_COLUMN], lambda _: rows, is_list=True)


def _open_csv(path: Path, delimiter: str) -> Table:
    (_, header), *rows = _csv_rows(path, delimiter) or [(1, [])]
    names = [name.strip() for name in header]
    return Table(str(path), "line", names, lambda _: (_named(path, names, *row) for row in rows))


def _csv_rows(path: Path, delimiter: str) -> list[tuple[int, list[str]]]:
    """Rows that are not blank, each with the number of its first line: a quoted cell may hold line ends."""
    text, start, rows = read_text(path), 1, []
    # newline="": line ends stay as they are in quoted cells
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    limit = csv.field_size_limit(len(text) + 1)  # other columns may hold pictures
    try:
        for row in reader:
            if any(cell.strip() for cell in row):
                rows.append((start, row))
            start = reader.line_num + 1
    except csv.Error as error:
        raise ConfigError(f"{path}, line {start}: {error}; quote prompts that hold commas or quotes") from None
    finally:
        csv.field_size_limit(limit)
    return rows


def _named(path: Path, names: Sequence[str], number: int, row: list[str]) -> Numbered:
    """Cells by column; a short row's last ones are empty."""
    if len(row) > len(names):
        raise ConfigError(
            f"{path}, line {number}: {brief(row)} is not {','.join(names)[:200]}; quote prompts that hold commas"
        )
    return number, dict(zip(names, [*row, *[""] * (len(names) - len(row))], strict=True))


def _open_json(path: Path, field: str | None) -> Table:
    unit, values = json_values(path, field)
    mappings = [isinstance(value, dict) for _, value in values]
    if not any(mappings):
        return _one_column(path, unit, values)
    if not all(mappings):
        odd = values[mappings.index(not mappings[0])]
        raise ConfigError(f"{path}, {unit} {odd[0]}: {kind_of(odd[1])} is of another kind than the rows before it")
    columns = list(dict.fromkeys(name for _, row in values for name in row))
    return Table(str(path), unit, columns, lambda _: values, inner=_inner(values[0][1]) if unit == DOCUMENT else None)


def _inner(document: Row) -> dict[str, list[str]]:
    lists = {key: value for key, value in document.items() if isinstance(value, list) and value}
    return {key: list(value[0]) if isinstance(value[0], dict) else [] for key, value in lists.items()}


def _open_parquet(path: Path) -> Table:
    try:
        with _parquet(path) as file:
            columns = file.schema_arrow.names
    except (OSError, pa.ArrowException) as error:
        raise unreadable(path, error) from None
    return Table(str(path), "row", columns, partial(_parquet_rows, path))


def _parquet(path: Path) -> pq.ParquetFile:
    source = _source(path)
    return open_parquet(source, source.size())


def _source(path: Path) -> pa.NativeFile:
    """Read in place where it is not packed; opened by us, since pyarrow takes some names for URLs."""
    packed = path.suffix.lower() in PACKED
    with open(path, "rb") as file:
        head = file.read(4)
    if packed or head != b"PAR1":  # what is no Parquet is small, or named by mistake: its error says which
        return pa.BufferReader(read_bytes(path))
    return pa.OSFile(str(path))


def _parquet_rows(path: Path, names: Sequence[str]) -> Iterator[Numbered]:
    number = 0
    try:
        with _source(path) as source, _bounded(source, names) as file:
            # no pool thread of pyarrow may hold a buffer of Python's when the process ends: that aborts it
            for batch in file.iter_batches(batch_size=_BATCH, columns=list(names), use_threads=False):
                check_texts(batch.columns, source.size())
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except (OSError, ValueError, pa.ArrowException) as error:
        raise unreadable(path, error) from None


def _bounded(source: pa.NativeFile, names: Sequence[str]) -> pq.ParquetFile:
    """Raises ValueError for a page that unfolds to more than real texts do: one page is in memory at a time."""

    def read(at: int, length: int) -> bytes:
        source.seek(at)
        return source.read(length)

    about = open_parquet(source, source.size()).metadata
    for packed, size in page_sizes(about, read, names):
        if size > unfolded(packed):
            raise ValueError(f"a page of {packed} bytes would unfold to {size}")
    leaves = {about.schema.column(i).path for i in range(about.num_columns)}
    # a text that many rows share is in memory once until it is known how much they are together
    return open_parquet(source, source.size(), read_dictionary=[name for name in names if name in leaves])
