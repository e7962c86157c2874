"""Whether the parts of a pipeline fit each other, by their configurations: before a weight is read."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rats.pipeline.weights.hashes import read_json
from rats.pipeline.weights.opening import check_config, opening
from rats.schemas.errors import ConfigError, DataError, brief


@dataclass(frozen=True)
class Size:
    """A number of a configuration, under the name that an error gives it."""

    name: str
    value: int

    def __rmul__(self, factor: int) -> Size:
        """So many times the number."""
        return Size(f"{factor} x {self.name}", factor * self.value)

    def __add__(self, other: Size) -> Size:
        """The sum of both."""
        return Size(f"{self.name} + {other.name}", self.value + other.value)


Fit = tuple[Size, Size]
"""Two numbers that must be equal."""


class PartConfig:
    """The configuration of one component. `config["in_channels"]` is a `Size`."""

    def __init__(self, name: str, path: Path, values: Mapping[str, Any]) -> None:
        """`values`: what the file `path` says, over the class's defaults."""
        self.name, self.path, self.values = name, path, values

    def __getitem__(self, field: str) -> Size:
        """The positive integer that `field` holds. Raises DataError when it holds none."""
        return Size(f"{self.name}'s {field}", self._whole(field, self.values.get(field)))

    def must_state(self, *fields: str) -> None:
        """Raises DataError for a field that the file leaves out and whose default would be another model's."""
        stated = read_json(self.path)
        stated |= stated.get("text_config") or {}  # of a whole CLIP model, the text encoder's part
        if missing := [field for field in fields if field not in stated]:
            raise DataError(f"{self.path} lacks {missing[0]}, whose default is another model's: fetch it again")

    def total(self, field: str) -> Size:
        """The sum of a list of numbers."""
        return Size(f"the sum of {self.name}'s {field}", sum(self._list(field)))

    def count(self, field: str) -> Size:
        """The length of a list."""
        return Size(f"the length of {self.name}'s {field}", len(self._list(field, whole=False)))

    def _list(self, field: str, whole: bool = True) -> list[Any]:
        values = self.values.get(field)
        if not isinstance(values, list | tuple):
            raise DataError(f"{self.path}: {field} is {brief(values)}, not a list: fetch or export it again")
        return [self._whole(field, value) for value in values] if whole else list(values)

    def _whole(self, field: str, value: Any) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
            raise DataError(f"{self.path}: {field} is {brief(value)}, no positive number: fetch or export it again")
        return value


def part_configs(classes: Mapping[str, Any], folders: Mapping[str, Path]) -> dict[str, PartConfig]:
    """The components' configurations by name. Raises ConfigError for a component of another class."""
    return {name: _part_config(name, cls, folders[name]) for name, cls in classes.items()}


def check_fit(fits: Iterable[Fit]) -> None:
    """Raises ConfigError for the first two numbers that differ."""
    for found, wanted in fits:
        if found.value != wanted.value:
            raise ConfigError(
                f"the model's parts do not fit: {found.name} is {found.value}, {wanted.name} is {wanted.value}; "
                "take all parts from one pipeline"
            )


def _part_config(name: str, cls: Any, folder: Path) -> PartConfig:
    check_config(cls, folder)
    path = folder / "config.json"
    with opening(path, f"the configuration of a {cls.__name__}"):
        if hasattr(cls, "config_class"):  # transformers, where hidden_size is d_model or n_embd too
            return PartConfig(name, path, _Attributes(cls.config_class.from_pretrained(folder).get_text_config()))
        defaults = {key: one.default for key, one in inspect.signature(cls.__init__).parameters.items()}
        return PartConfig(name, path, defaults | read_json(path))


class _Attributes(dict[str, Any]):
    """The attributes of a transformers configuration, which has several names for one."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config

    def get(self, field: str, default: Any = None) -> Any:
        return getattr(self.config, field, default)
