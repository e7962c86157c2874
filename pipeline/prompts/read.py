"""The prompts of a file, in its order, or as they are drawn from a table."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rats.pipeline.prompts.columns import PROMPT, texts, way_out
from rats.pipeline.prompts.draw import drawn_rows
from rats.pipeline.prompts.select import exists
from rats.pipeline.prompts.tables import Table, open_table
from rats.pipeline.prompts.text import format_of, unreadable
from rats.pipeline.weights.hub import is_hub_id
from rats.schemas.errors import ConfigError, brief
from rats.schemas.identity import prompt_id, sample_key
from rats.schemas.manifest import PlannedSample
from rats.schemas.params import PromptSource

_COLUMNS = (PROMPT, "concept", "kind")
_SHOWN = 5
"""Repeats that an error lists; of more it gives the number."""


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
    """The prompts of a .txt, .csv or .tsv file, in its order, or of a table, as they are drawn from it.

    A folder and a .parquet, .jsonl, .ndjson or .json file are tables too, with a column `prompt`. A file may be packed
    (.gz, .zst). Columns of a .csv and .tsv other than prompt, concept and kind do not count.

    Raises:
        ConfigError: a missing, unreadable or empty file, a wrong column, a prompt that is there twice (in a table it
            is one prompt); what `draw.drawn_rows` raises.
    """
    if not isinstance(source, PromptSource) and _is_table(Path(source)):
        source = PromptSource.model_construct(path=str(source))
    if isinstance(source, PromptSource):
        return [Prompt(text, concept) for text, concept in drawn_rows(source)]
    path = Path(source)
    if not exists(path):
        raise unreadable(source, f"there is no such file{_meant(str(source))}")
    table = open_table(path)
    numbered = list(_lines(table) if table.is_list else _rows(table))
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
    return format_of(path.name) in ("json", "parquet") or (exists(path) and path.is_dir())


def _meant(name: str) -> str:
    if "://" in name:
        return " here: download what is at that URL"
    return f", and a data set of the hub is {{path: {name}, revision: COMMIT}}" if is_hub_id(name) else ""


def _lines(table: Table) -> Iterator[tuple[int, Prompt]]:
    for number, (text,) in texts(table, [PROMPT]):
        if text:
            yield number, Prompt(text, concept=text)


def _rows(table: Table) -> Iterator[tuple[int, Prompt]]:
    _check_header(table)
    names = [name for name in _COLUMNS if name in table.columns]
    for number, cells in texts(table, names):
        row = dict(zip(names, cells, strict=True))
        text, about = row[PROMPT], [cell for cell in cells[1:] if cell]
        if text:
            yield number, Prompt(text, row.get("concept") or text, row.get("kind", ""))
        elif about:
            raise ConfigError(f"{table.where}, line {number}: there is no prompt, only {brief(about)}")


def _check_header(table: Table) -> None:
    """A column `prompt`; a misspelt concept or kind would be left out without a word."""
    said = f"{table.where}: line 1 is {brief(table.columns)}, expected the columns {','.join(_COLUMNS)}"
    if PROMPT not in table.columns:
        raise ConfigError(f"{said}; {way_out(table, PROMPT)}" if table.columns else said)
    for name in set(table.columns) - set(_COLUMNS):
        if close := difflib.get_close_matches(name.lower(), _COLUMNS, n=1, cutoff=0.8):
            raise ConfigError(f"{said}: rename {name!r}, did you mean {close[0]!r}?")


def _refuse_repeats(path: Path, numbered: Sequence[tuple[int, Prompt]]) -> None:
    first: dict[str, int] = {}
    repeats = []
    for number, prompt in numbered:
        if prompt.id in first:
            repeats.append(f"line {number}: {brief(prompt.text)} is on line {first[prompt.id]} already")
        first.setdefault(prompt.id, number)
    if repeats:
        more = f"; and {len(repeats) - _SHOWN} more" if len(repeats) > _SHOWN else ""
        raise ConfigError(f"{path}, {'; '.join(repeats[:_SHOWN])}{more}: drop the repeats")
