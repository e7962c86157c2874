"""Prompt files: `.txt` with a prompt a line, or `.csv` with the columns prompt, concept, kind; else `datasets`."""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rats.pipeline.weights.hub import is_hub_id
from rats.schemas.errors import ConfigError, brief, nearest, one_line
from rats.schemas.identity import normalise, prompt_id, sample_key
from rats.schemas.manifest import PlannedSample
from rats.schemas.params import PromptSource

_COLUMNS = ["prompt", "concept", "kind"]


@dataclass(frozen=True)
class Prompt:
    """A normalised prompt. Prompts of one `concept` are not independent; `kind` is a free label for reports."""

    text: str
    concept: str
    kind: str = ""

    @property
    def id(self) -> str:
        """The prompt's part of a sample's identity."""
        return prompt_id(self.text)


def read_prompts(source: str | Path | PromptSource) -> list[Prompt]:
    """The prompts of a file, in its order, or those that are drawn from a larger table.

    A folder and a .parquet, .jsonl or .json file are tables too, with a column `prompt`.

    Raises:
        ConfigError: a missing, unreadable or empty file, a wrong column, a prompt that is there twice (in a table it
            is one prompt); what `prompt_tables.drawn_rows` raises.
    """
    if not isinstance(source, PromptSource) and _is_table(Path(source)):
        source = PromptSource(path=str(source))
    if isinstance(source, PromptSource):
        return [Prompt(text, concept) for text, concept in drawn_rows(source)]
    path = Path(source)
    lines = _read(path).splitlines()
    numbered = list(_from_csv(path, lines) if path.suffix.lower() == ".csv" else _from_text(lines))
    if not numbered:
        raise ConfigError(f"{path} has no prompts; write one a line")
    _refuse_repeats(path, numbered)
    return [prompt for _, prompt in numbered]


def planned_samples(prompts: Iterable[Prompt], noises_per_prompt: int) -> list[PlannedSample]:
    """Every prompt with every noise index."""
    return [
        PlannedSample(key=sample_key(prompt.id, i), prompt_id=prompt.id, prompt=prompt.text, noise_index=i)
        for prompt in prompts
        for i in range(noises_per_prompt)
    ]


def _is_table(path: Path) -> bool:
    return path.is_dir() or path.suffix.lower() in (".parquet", ".jsonl", ".json")


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read prompts from {path}: {error}; check prompts: in params.yaml") from None


def _from_text(lines: Sequence[str]) -> Iterator[tuple[int, Prompt]]:
    for number, line in enumerate(lines, start=1):
        if text := normalise(line):
            yield number, Prompt(text, concept=text)


def _from_csv(path: Path, lines: Sequence[str]) -> Iterator[tuple[int, Prompt]]:
    reader = csv.reader(lines, strict=True)
    try:
        header = next(reader, [])
        if header != _COLUMNS[: len(header)] or not header:
            raise ConfigError(f"{path}: line 1 is {header}, expected the columns {','.join(_COLUMNS)}")
        for row in reader:
            if any(row):
                yield reader.line_num, _from_row(path, reader.line_num, row)
    except csv.Error as error:
        raise ConfigError(f"{path}, line {reader.line_num}: {error}; quote prompts that hold commas") from None


def _from_row(path: Path, number: int, row: list[str]) -> Prompt:
    cells = [normalise(cell) for cell in row]
    if not cells[0] or len(cells) > len(_COLUMNS):
        raise ConfigError(f"{path}, line {number}: {row} is not {','.join(_COLUMNS)}; quote prompts that hold commas")
    text, concept, kind = (*cells, "", "")[:3]
    return Prompt(text, concept or text, kind)


def _refuse_repeats(path: Path, numbered: Sequence[tuple[int, Prompt]]) -> None:
    first: dict[str, int] = {}
    for number, prompt in numbered:
        if prompt.id in first:
            raise ConfigError(f"{path}, line {number}: {prompt.text!r} is on line {first[prompt.id]} already; drop one")
        first[prompt.id] = number


BUILDERS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".csv": "csv", ".txt": "text"}
"""The format that `datasets` calls a file's, by its ending."""


def drawn_rows(source: PromptSource) -> list[tuple[str, str]]:
    """Distinct prompts and their concepts, in an order that depends on `seed` and the prompts alone.

    So order and repeats of the table do not matter, and a larger `count` starts with the prompts of a smaller one.

    Raises:
        ConfigError: `datasets` is not installed, the table is not there or cannot be read, or has no such column; a
            hub id without a revision; fewer prompts than asked for.
    """
    concepts: dict[str, str] = {}
    for text, concept in _rows(source):
        if text:  # a repeated prompt gets the first of its concepts by name, so that the table's order does not matter
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
            raise ConfigError(
                f"cannot read prompts from {source} ({one_line(error)}): check path, files and split"
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
