"""Prompts of a hub repository: its files, read like local ones, or what `datasets` makes of the whole."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from rats.pipeline.prompts.tables import Numbered, Table
from rats.pipeline.weights.hub import refuse_full_disk, telling_cause
from rats.schemas.errors import ConfigError, one_line
from rats.schemas.params import PromptSource

_BATCH = 10_000
"""Rows at once: all of a table's pictures would be decoded otherwise."""


def fetch_files(source: PromptSource) -> Path:
    """The folder of a snapshot with the files that `source.files` names.

    Raises:
        ConfigError: no such repository or revision, or no way to it.
        StorageError: the disk of the hub's cache is full.
    """
    from huggingface_hub import constants, snapshot_download

    pattern = str(source.files)
    # "**/x" of a folder matches x at the top too, the hub's patterns want the slash
    patterns = [pattern, pattern.replace("**/", "")]
    try:
        return Path(
            snapshot_download(source.path, repo_type="dataset", revision=source.revision, allow_patterns=patterns)
        )
    except Exception as error:  # the hub raises a dozen kinds, of three libraries: all mean the same here
        refuse_full_disk(error, constants.HF_HUB_CACHE)
        raise _unreadable(source, error) from None


def hub_table(source: PromptSource) -> Table:
    """One split of a repository, as `datasets` reads it by the repository's own settings.

    Raises:
        ConfigError: `datasets` is not installed, or what it says.
        StorageError: the disk of its cache is full.
    """
    try:
        import datasets
    except ImportError as error:
        raise ConfigError(f"{source} is read by datasets: pip install 'rats[datasets]' ({error})") from None
    with _quiet(datasets):
        try:
            table = datasets.load_dataset(source.path, revision=source.revision, split=source.split or "train")
        except Exception as error:  # of four libraries
            refuse_full_disk(error, str(datasets.config.HF_DATASETS_CACHE))
            raise _unreadable(source, error) from None
    return Table(str(source), "row", table.column_names, partial(_rows, table))


def _rows(table: Any, names: Sequence[str]) -> Iterator[Numbered]:
    number = 0
    for part in table.select_columns(list(dict.fromkeys(names))).iter(_BATCH):
        for cells in zip(*part.values(), strict=True):
            number += 1
            yield number, dict(zip(part, cells, strict=True))


def _unreadable(source: PromptSource, error: Exception) -> ConfigError:
    said = one_line(telling_cause(error))
    return ConfigError(f"cannot read prompts from {source} ({said}): check path, files and split")


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
