"""From plain values to a block of `params.yaml`, or to one line about the first that is wrong."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, TypeVar, get_args

from pydantic import ValidationError

from rats.schemas.blocks import Block
from rats.schemas.errors import ConfigError, brief, nearest, plain

_KIND = re.compile(r"(constrained-|function-|dict\[|literal\[|[A-Z]|(str|float|int)$)")
"""What pydantic puts into a place for a kind that it tried there."""

_MEANT = {
    "string_type": "a text is meant: put it in quotes",
    "tuple_type": "a list is meant, in brackets",
    "dict_type": "a block of keys and values is meant",
    "finite_number": "a finite number is meant",
}
"""In place of pydantic's words, which name the kinds of Python."""

_Model = TypeVar("_Model", bound=Block)


def validate(model: type[_Model], values: Any, where: str) -> _Model:
    """The block of these values; a ConfigError that begins with `where` and names the first that is wrong."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise ConfigError(f"{where}: {_explain(model, error)}") from None


def _explain(model: type[Block], error: ValidationError) -> str:
    first = error.errors()[0]
    dotted = _dotted(first["loc"])
    others = {_dotted(one["loc"]) for one in error.errors()} - {dotted}
    more = f" (and {len(others)} more)" if others else ""
    if first["type"] == "extra_forbidden":
        return f"unknown key {_unknown(model, first['loc'])}{more}"
    if first["type"] == "missing":
        return f"{brief(dotted)} is missing{more}"
    said = plain(first["msg"].removeprefix("Value error, "))
    if first["type"] == "model_type":
        said = f"expected keys such as {', '.join(fields_at(model, first['loc'])[:4])}"
    return f"{dotted[:120]} = {brief(first['input'])}: {_MEANT.get(first['type'], said)}{more}"


def _unknown(model: type[Block], place: Sequence[int | str]) -> str:
    """The key, which may look like the name of a kind, and the nearest one."""
    *above, key = place
    dotted = ".".join(part for part in (_dotted(above), str(key)) if part)
    return f"{brief(dotted)}{nearest(str(key).lower(), fields_at(model, above))}"


def _dotted(place: Sequence[int | str]) -> str:
    """A place without the names of the kinds that pydantic tried there."""
    return ".".join(str(part) for part in place if not _KIND.match(str(part)))


def fields_at(model: type[Block], place: Sequence[int | str]) -> list[str]:
    """Field names of the block at `place` below `model`."""
    for part in place:
        if isinstance(part, str) and part in model.model_fields:
            model = _block_of(model.model_fields[part].annotation) or model
    return list(model.model_fields)


def _block_of(annotation: Any) -> type[Block] | None:
    if isinstance(annotation, type) and issubclass(annotation, Block):
        return annotation
    return next((block for part in get_args(annotation) if (block := _block_of(part))), None)
