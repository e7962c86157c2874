"""Plain values from YAML text and from `--set train.alpha=2`, before any model checks them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Hashable, Sequence
from typing import Any

import yaml

from rats.schemas.errors import ConfigError, brief, reason

_DEEP = re.compile(r"[\[{]{100}")
"""Such deep nesting is refused: PyYAML takes seconds for some thousand brackets before it fails."""


class _Loader(yaml.SafeLoader):
    """YAML 1.2's idea of a boolean (so that `form: off` is a word, as DVC reads it), and no repeated keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        twice = sorted(key for key, count in Counter(keys).items() if count > 1)
        if twice:
            raise yaml.YAMLError(f"line {node.start_mark.line + 1}: key {brief(twice[0])} is there twice")
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:bool" or first in "tTfF"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def parse(text: str, where: str) -> Any:
    """The value of a YAML text; `where` begins the error."""
    if _DEEP.search(text):
        raise ConfigError(f"{where} is not YAML: a hundred brackets in a row")
    try:
        return yaml.load(text, _Loader)  # a SafeLoader: it makes plain data only
    except (yaml.YAMLError, RecursionError, ValueError, LookupError, TypeError, AttributeError) as error:
        # PyYAML raises the last three for `!!int ""`, `!!omap x` and `!!timestamp x`
        raise ConfigError(f"{where} is not YAML: {reason(error, 300)}") from None


def override(values: dict[str, Any], text: str) -> None:
    """Apply "train.alpha=2" in place."""
    dotted, equals, value = text.partition("=")
    if not equals:
        raise ConfigError(f"--set {text!r} has no '='; write for instance --set train.alpha=2")
    parts = dotted.strip().split(".")
    if parts[0] == "variants" and len(parts) > 3:  # below a variant's name a dotted key is one key
        parts = [*parts[:2], ".".join(parts[2:])]
    set_at(values, parts, parse(value, f"--set {text}"), f"--set {dotted}")


def set_at(values: Any, parts: Sequence[str], value: Any, where: str) -> None:
    """Write `value` at a dotted place, making blocks on the way; digits step into lists."""
    *parents, last = parts
    for part in parents:
        values = _step(values, part, where)
    if isinstance(values, list) and last.isdigit() and int(last) < len(values):
        values[int(last)] = value
    elif isinstance(values, dict):
        values[last] = value
    else:
        raise ConfigError(f"{where}: there is no {last!r} below a plain value")


def _step(values: Any, part: str, where: str) -> Any:
    if isinstance(values, dict):
        if values.get(part) is None:
            values[part] = {}
        return values[part]
    if isinstance(values, list) and part.isdigit() and int(part) < len(values):
        return values[int(part)]
    raise ConfigError(f"{where}: there is no block {part!r}")
