"""Prompts out of the tables that `datasets` reads: own files, folders of them, and the hub's."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rats.pipeline.weights import is_hub_id
from rats.schemas.errors import ConfigError, brief, nearest
from rats.schemas.identity import normalise, prompt_id
from rats.schemas.params import PromptSource

BUILDERS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".csv": "csv", ".txt": "text"}
"""The format that `datasets` calls a file's, by its ending."""


def drawn_rows(source: PromptSource) -> list[tuple[str, str]]:
    """Distinct prompts and their concepts, in an order that depends on `seed` and the prompts alone.

    So neither the order nor the repeats of the table matter, and a larger `count` begins with a smaller one's.

    Raises:
        ConfigError: `datasets` is not installed, the table is not there or cannot be read, or has no such column; a
            hub id without a revision; fewer prompts than asked for.
    """
    concepts: dict[str, str] = {}
    for text, concept in _rows(source):
        if text:  # of a repeated prompt's concepts the first by name, whatever the table's order
            concepts[text] = min(concept or text, concepts.get(text, concept or text))
    rows = sorted(concepts.items(), key=lambda row: _lot(source.seed, row[0]))
    end = None if source.count is None else source.skip + source.count
    if len(rows) < (end or source.skip + 1):
        raise ConfigError(f"{source} has {len(rows):,} distinct prompts, too few for skip and count: lower them")
    return rows[source.skip : end]


def _lot(seed: int, text: str) -> bytes:
    return hashlib.sha256(f"{seed} {prompt_id(text)}".encode()).digest()


def _rows(source: PromptSource) -> Iterator[tuple[str, str]]:
    """Normalised prompt and concept of each row; empty cells are empty texts."""
    table = _table(source)
    columns = [name for name in (source.column, source.concept) if name is not None]
    for name in columns:
        if name not in table.column_names:
            raise ConfigError(
                f"{source} has no column {brief(name)}{nearest(name, table.column_names)}; it has "
                f"{', '.join(table.column_names[:12])}"
            )
    # several thousand rows at a time: all of a table's images would be decoded otherwise
    for part in table.select_columns(columns).iter(10_000):
        cells = [[normalise(str(cell or "")) for cell in part[name]] for name in columns]
        yield from zip(cells[0], cells[-1] if source.concept else cells[0], strict=True)


def _table(source: PromptSource) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ConfigError(f"{source} is read by datasets: pip install 'rats[datasets]' ({error})") from None
    with _quiet(datasets):
        try:
            return datasets.load_dataset(**_where(source))
        except Exception as error:  # a dozen kinds, of four libraries: all mean the same here
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise ConfigError(
                f"cannot read prompts from {source} ({type(error).__name__}: {reason}): check path, files and split"
            ) from None


def _where(source: PromptSource) -> dict[str, Any]:
    """What `datasets.load_dataset` is called with."""
    local = Path(source.path)
    if local.exists():
        found = sorted(local.glob(source.files or "**/*")) if local.is_dir() else [local]
        files = [str(path) for path in found if path.suffix.lower() in BUILDERS]
        return {"path": _builder(source, files), "data_files": files, "split": "train"}
    if not is_hub_id(source.path):
        raise ConfigError(f"no file, folder or hub id {source}: check prompts: in params.yaml")
    if source.revision is None:
        raise ConfigError(f"{source}: set revision to a commit of that hub repository, for its branches move")
    if source.files is None:
        return {"path": source.path, "revision": source.revision, "split": source.split}
    files = [f"hf://datasets/{source.path}@{source.revision}/{source.files}"]
    return {"path": _builder(source, files), "data_files": files, "split": "train"}


def _builder(source: PromptSource, files: list[str]) -> str:
    kinds = {BUILDERS.get(Path(name).suffix.lower(), "") for name in files}
    if len(kinds) != 1 or "" in kinds:
        raise ConfigError(
            f"{source}: {len(files)} files of {len(kinds)} formats; name some of one of {', '.join(BUILDERS)} by files:"
        )
    return kinds.pop()


@contextmanager
def _quiet(datasets: Any) -> Iterator[None]:
    """No progress bars while a table is read: our own progress is on stderr."""
    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()
