"""Prompts drawn from a table: distinct ones, in an order that the table's own does not decide."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

from rats.pipeline.prompts.columns import texts
from rats.pipeline.prompts.hub import fetch_files, hub_table
from rats.pipeline.prompts.select import exists, selected
from rats.pipeline.prompts.tables import Table, open_table
from rats.pipeline.weights.hub import is_hub_id
from rats.schemas.errors import ConfigError
from rats.schemas.identity import prompt_id
from rats.schemas.params import PromptSource


def drawn_rows(source: PromptSource) -> list[tuple[str, str]]:
    """Distinct prompts and their concepts, in an order that depends on `seed` and the prompts alone.

    So order and repeats of the table do not matter, and a larger `count` starts with the prompts of a smaller one.

    Raises:
        ConfigError: the table is not there or cannot be read, has no such column, or one that is no text; a hub id
            without a revision; fewer prompts than asked for.
    """
    concepts: dict[str, str] = {}
    for text, concept in _rows(source):
        if text:  # a repeated prompt gets the first of its concepts by name, so that the table's order does not matter
            concepts[text] = min(concept or text, concepts.get(text, concept or text))
    if not concepts:
        raise ConfigError(f"{source} has no prompts: every cell of column {source.column!r} is empty")
    rows = sorted(concepts.items(), key=lambda row: _lot(source.seed, row[0]))
    end = None if source.count is None else source.skip + source.count
    if len(rows) < (end or source.skip + 1):
        raise ConfigError(f"{source} has {len(rows):,} distinct prompts, too few for skip and count: lower them")
    return rows[source.skip : end]


def _lot(seed: int, text: str) -> bytes:
    return hashlib.sha256(f"{seed} {prompt_id(text)}".encode()).digest()


def _rows(source: PromptSource) -> Iterator[tuple[str, str]]:
    """Normalised prompt and concept of each row; empty cells are empty texts."""
    names = [name for name in (source.column, source.concept) if name is not None]
    for table in _tables(source):
        for _, cells in texts(table, names):
            yield cells[0], cells[-1]


def _tables(source: PromptSource) -> Iterator[Table]:
    local = Path(source.path)
    if exists(local):
        yield from (open_table(path, source.field) for path in selected(source, local))
        return
    if not is_hub_id(source.path):
        raise ConfigError(f"no file, folder or hub id {source}: check prompts: in params.yaml")
    if source.revision is None:
        raise ConfigError(f"{source}: set revision to a commit of that hub repository, for its branches move")
    if source.files is None:
        yield hub_table(source)
        return
    yield from (open_table(path, source.field) for path in selected(source, fetch_files(source)))
