"""Values of a JSON file, a document or a value a line: numbers as they are written."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from rats.pipeline.prompts.cells import kind_of, step_into
from rats.pipeline.prompts.text import LINE_ENDS, read_text, unreadable
from rats.schemas.errors import ConfigError

DOCUMENT = "document"
"""What the only row of a document is called that is no list."""


_parse_json = partial(
    json.loads,
    parse_int=str,  # numbers as they are written: 1.50 stays 1.50
    parse_float=str,
    parse_constant=lambda _: None,  # pandas writes NaN for a missing cell
)


def json_values(path: Path, field: str | None) -> tuple[str, list[tuple[int, Any]]]:
    """What rows are counted in, and their numbered values: items of a list, or a value a line.

    The list is the whole document or lies at `field` in it; a document that is no list is its only value.

    Raises:
        ConfigError: no JSON; no list at `field`.
    """
    text = read_text(path)
    if not text.strip():
        return "row", []
    try:
        value = _parse_json(text)
    except json.JSONDecodeError as error:
        if not error.msg.startswith("Extra data"):  # what follows a first value may be the lines after it
            raise _broken(path, error.lineno, error) from None
        if field is not None:
            raise ConfigError(f"{path} has a value a line, so no field: leave it out") from None
        return "line", list(_json_lines(path, text))
    except RecursionError:
        raise unreadable(path, "it is nested too deep") from None
    if field is not None:
        value = step_into(value, field.split("."), field, str(path))
        if not isinstance(value, list):
            raise ConfigError(f"{path}: field: {field} is {kind_of(value)}, not a list of rows")
    if isinstance(value, list):
        return "row", list(enumerate(value, start=1))
    return "line" if _is_lines(path) else DOCUMENT, [(1, value)]


def _is_lines(path: Path) -> bool:
    """Of files with one line nothing else tells."""
    return not {".jsonl", ".ndjson"}.isdisjoint(suffix.lower() for suffix in path.suffixes[-2:])


def _json_lines(path: Path, text: str) -> Iterator[tuple[int, Any]]:
    # a JSON text may hold line separators of Unicode as they are: only these three end a line
    for number, line in enumerate(LINE_ENDS.split(text), start=1):
        if line.strip():
            try:
                yield number, _parse_json(line)
            except json.JSONDecodeError as error:
                raise _broken(path, number, error) from None
            except RecursionError:
                raise unreadable(path, f"line {number} is nested too deep") from None


def _broken(path: Path, number: int, error: json.JSONDecodeError) -> ConfigError:
    return unreadable(path, f"line {number} is no JSON ({error.msg}, column {error.colno})")
