"""From a cell of a table to a prompt's text. What is no text is refused by name, never written out as Python does."""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any

from rats.schemas.errors import ConfigError, brief, nearest
from rats.schemas.identity import normalise

_PLAIN = (str, int, float, Decimal, datetime.date, datetime.time)
"""What is written as text without a choice to make; `datetime` is a `date`."""

_PICTURE = {"bytes", "path"}
"""The keys of a picture in the tables of `datasets`."""

_USUAL = ("prompt", "text", "caption", "content", "value")
"""Keys under which published tables have texts in a cell."""


def cell_text(value: Any, where: str, column: str) -> str:
    """The normalised text of a cell; empty of None and NaN, which stand for missing ones.

    Args:
        value: Text, a number or a date.
        where: The file and row, for errors.
        column: As the user names it, for errors.

    Raises:
        ConfigError: a list, a mapping, bytes, a picture, true or false; half a character (a lone surrogate).
    """
    if value is None or (isinstance(value, float) and value != value):
        return ""
    if isinstance(value, bool) or not isinstance(value, _PLAIN):
        raise ConfigError(f"{where}: column {column!r} holds {kind_of(value)}, not text; {_way_out(value, column)}")
    text = str(value)
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ConfigError(f"{where}: {brief(text)} holds half a character (a lone surrogate): write it anew") from None
    return normalise(text)


def step_into(value: Any, parts: Sequence[str], name: str, where: str) -> Any:
    """What lies at a dotted place below a cell: keys of mappings, numbers of list items; None below a missing one.

    `name` is the whole place, as the user writes it, `where` the file and row: both for errors.

    Raises:
        ConfigError: a mapping without that key, or nothing to step into.
    """
    for part in parts:
        if value is None:
            return None
        if isinstance(value, Mapping) and part in value:
            value = value[part]
        elif isinstance(value, list | tuple) and part.isdigit():
            value = value[int(part)] if int(part) < len(value) else None
        else:
            hint = nearest(part, value) if isinstance(value, Mapping) else f", it holds {kind_of(value)}"
            raise ConfigError(f"{where}: there is no {part!r} for {name}{hint}")
    return value


def kind_of(value: Any) -> str:
    """A value in an error's words: never as Python writes it, however large it is."""
    if isinstance(value, bool):
        return "true or false"
    if _is_picture(value):
        return "a picture"
    if isinstance(value, Mapping):
        return f"a mapping ({', '.join(str(key) for key in list(value)[:6])})"
    if isinstance(value, list | tuple):
        return f"a list of {len(value)}"
    return "bytes" if isinstance(value, bytes) else f"a {type(value).__name__}"


def _is_picture(value: Any) -> bool:
    of_datasets = isinstance(value, Mapping) and set(value) == _PICTURE
    return of_datasets or "Image" in type(value).__name__


def _way_out(value: Any, column: str) -> str:
    """How the text is named that lies deeper in a cell."""
    place, inner = column, value
    while isinstance(inner, Mapping | list | tuple) and inner and not _is_picture(inner):
        part = _text_key(inner) if isinstance(inner, Mapping) else 0
        place, inner = f"{place}.{part}", inner[part]
    if place == column or not isinstance(inner, str):
        return "name another one by column:"
    return f"name what counts in it, such as column: {place}"


def _text_key(value: Mapping[Any, Any]) -> Any:
    """The key of what reads like a prompt: of a chat's message `content`, not the `role`."""
    texts = [key for key, text in value.items() if isinstance(text, str)]
    return next((key for key in _USUAL if key in texts), (texts or list(value))[0])
