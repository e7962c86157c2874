"""What every block of `params.yaml` is made of."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator

from rats.schemas.identity import LARGEST_SEED

Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Seed = Annotated[int, Field(ge=0, le=LARGEST_SEED)]

_LARGEST = 3.4e38
"""Of float32, in which it is computed: what is larger is an infinity there."""

_WHOLE = range(-(2**63), 2**63)
"""What other readers of YAML and JSON hold as a whole number."""

_VARIABLE = re.compile(r"\$[{A-Za-z_]")
_LONGEST_NAME = 255
"""Bytes of a file's name, on every common file system."""


def _path(text: str) -> str:
    """A path with the home folder in place of ~.

    Raises:
        ValueError: a variable of the shell; what no file can be called.
    """
    if _VARIABLE.search(text):
        raise ValueError("variables of the shell are not filled in: write the path out (~ is the home folder)")
    if not text or "\n" in text or "\0" in text or any(len(os.fsencode(p)) > _LONGEST_NAME for p in text.split("/")):
        raise ValueError("no file can be called so: name a file or folder")
    return os.path.expanduser(text)


PathText = Annotated[str, AfterValidator(_path)]
"""A path, a hub id or a URL, as it is written; only ~ is filled in."""


class Block(BaseModel):
    """Base of all blocks: immutable, no unknown keys, finite numbers."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @field_validator("*")
    @classmethod
    def _is_finite(cls, value: Any) -> Any:
        for number in _numbers(value):
            if isinstance(number, float) and not -_LARGEST <= number <= _LARGEST:
                raise ValueError("a finite number is meant, of at most 3.4e38")
            if isinstance(number, int) and number not in _WHOLE:
                raise ValueError("a whole number of at most 64 bits is meant")
        return value


def _numbers(value: Any) -> Iterator[int | float]:
    """The value, or those in a list or mapping; blocks look at their own."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, tuple) else (value,)
    return (one for one in inner if isinstance(one, int | float))
