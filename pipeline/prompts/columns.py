"""Which column of a table is meant, and the texts in it."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence

from rats.pipeline.prompts.cells import cell_text, step_into
from rats.pipeline.prompts.json_rows import DOCUMENT
from rats.pipeline.prompts.tables import ONE_COLUMN, Table
from rats.schemas.errors import ConfigError, brief

PROMPT = "prompt"
_USUAL = (PROMPT, "caption", "text")
"""Names by which published tables call such a column, more or less: prompt_en, Prompts, captions."""


_UNKNOWN = "NAME"


def texts(table: Table, names: Sequence[str]) -> Iterator[tuple[int, list[str]]]:
    """The number of each row and its normalised texts in these columns; a dotted name leads into a cell.

    Raises:
        ConfigError: no such column, or twice; a cell that is no text.
    """
    if not table.columns:
        return
    places = [_place(table, name) for name in names]
    for number, row in table.read([head for head, _ in places]):
        where = f"{table.where}, {table.unit} {number}"
        cells = [
            step_into(row.get(head), parts, name, where) for (head, parts), name in zip(places, names, strict=True)
        ]
        yield number, [cell_text(cell, where, name) for cell, name in zip(cells, names, strict=True)]


def _place(table: Table, name: str) -> tuple[str, list[str]]:
    """The column that a name begins with, and the parts after it: the whole name first, then up to a dot."""
    if table.is_list and name in (PROMPT, ONE_COLUMN):
        return ONE_COLUMN, []
    words = name.split(".")
    for end in range(len(words), 0, -1):
        head = ".".join(words[:end])
        if table.columns.count(head) > 1:
            raise ConfigError(f"{table.where} has {table.columns.count(head)} columns {head!r}: rename all but one")
        if head in table.columns:
            if table.unit == DOCUMENT and end == len(words):
                _refuse_columns_of_a_document(table, head)
            return head, words[end:]
    raise missing_column(table, name)


def _refuse_columns_of_a_document(table: Table, head: str) -> None:
    """Pandas writes a table as one mapping of columns: they are not one row's cells."""
    if head in (table.inner or {}):
        raise ConfigError(f"{table.where} is one mapping, whose {head!r} is a list: say field: {head} beside the path")
    for _, row in table.read([head]):
        if isinstance(row[head], Mapping):
            raise ConfigError(f"{table.where} is one mapping: write a list of rows (pandas: orient='records')")


def missing_column(table: Table, name: str) -> ConfigError:
    """The error that names what is there, and how to say which of it is meant."""
    close = difflib.get_close_matches(name, table.columns, n=1)
    hint = f", did you mean {close[0]!r}?" if close else ""
    there = f"it has {', '.join(table.columns[:12])[:300]}"
    return ConfigError(f"{table.where} has no column {brief(name)}{hint}; {there}: {way_out(table, name)}")


def way_out(table: Table, name: str) -> str:
    """How to say which column is meant, with the likeliest one; or what else is wrong."""
    if mark := _other_mark(table):
        return f"its cells are separated by {mark!r}, save it with commas as .csv, or with tabs as .tsv"
    for key, columns in (table.inner or {}).items():
        if (column := _likely(columns, name)) != _UNKNOWN:
            return f"its rows may lie deeper, say field: {key} and column: {column} beside its path"
    return other_column(table.where, _likely(table.columns, name))


def _other_mark(table: Table) -> str | None:
    """What separates the cells of a spreadsheet's CSV in countries with a decimal comma."""
    only = table.columns[0] if len(table.columns) == 1 and table.unit == "line" else ""
    return next((mark for mark in ";\t|," if mark in only), None)


def other_column(path: str, column: str) -> str:
    """How a column is named, in a parameter file and to `rats init`."""
    return f"say column: {column} beside its path under prompts:, or rats init --prompts {path} --column {column}"


def _likely(columns: Sequence[str], name: str) -> str:
    by_lower = {column.lower(): column for column in columns}
    for word in (name.lower(), *_USUAL):
        if close := difflib.get_close_matches(word, by_lower, n=1):
            return by_lower[close[0]]
    return _UNKNOWN
