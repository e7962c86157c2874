"""Prompt files: `.txt` with a prompt a line, or `.csv` with the columns prompt, concept, kind; else `datasets`."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rats.pipeline.prompt_tables import drawn_rows
from rats.schemas.errors import ConfigError
from rats.schemas.identity import normalise, prompt_id, sample_key
from rats.schemas.manifest import PlannedSample
from rats.schemas.params import PromptSource

_COLUMNS = ["prompt", "concept", "kind"]


@dataclass(frozen=True)
class Prompt:
    """A normalised prompt; prompts of one `concept` are not independent, `kind` is free text for reports."""

    text: str
    concept: str
    kind: str = ""

    @property
    def id(self) -> str:
        """The prompt's part of a sample's identity."""
        return prompt_id(self.text)


def read_prompts(source: str | Path | PromptSource) -> list[Prompt]:
    """The prompts of a file, in its order, or of a larger table, as they are drawn from it.

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


def planned(prompts: Iterable[Prompt], noises_per_prompt: int) -> list[PlannedSample]:
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
