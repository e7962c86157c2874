"""Plain values from YAML text and from `--set train.alpha=2`, before any model checks them."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Hashable, Sequence
from typing import Any

import yaml

from rats.schemas.errors import ConfigError, brief, reason

_DEEP = re.compile(r"[\[{]{100}")
"""Such deep nesting is refused: PyYAML takes seconds for some thousand brackets before it fails."""


_BOOL = r"true|True|TRUE|false|False|FALSE"
_INT = r"[-+]?(?:0b[01_]+|0o[0-7_]+|0x[0-9a-fA-F_]+|[0-9_]+)"
_FLOAT = (
    r"[-+]?(?:[0-9][0-9_]*(?:\.[0-9_]*(?:[eE][-+]?[0-9]+)?|[eE][-+]?[0-9]+)"
    r"|\.[0-9_]+(?:[eE][-+][0-9]+)?|\.(?:inf|Inf|INF))|\.(?:nan|NaN|NAN)"
)
_PLAIN = {"bool": (_BOOL, "tTfF"), "float": (_FLOAT, "-+.0123456789"), "int": (_INT, "-+0123456789")}
"""How plain values are written, and how they begin, in YAML 1.2 as DVC reads it: 0100 is a hundred, off a word."""

_BASES = {"0b": 2, "0o": 8, "0x": 16}


class _Loader(yaml.SafeLoader):
    """PyYAML's, of YAML 1.1, with the booleans and numbers of YAML 1.2, and no repeated keys."""

    # in place of, not beside, those of YAML 1.1
    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag.rpartition(":")[2] not in _PLAIN]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        twice = sorted(key for key, count in Counter(keys).items() if count > 1)
        if twice:
            raise yaml.YAMLError(f"line {node.start_mark.line + 1}: key {brief(twice[0])} is there twice")
        return super().construct_mapping(node, deep)

    def construct_int(self, node: yaml.ScalarNode) -> int:
        """No leading zero makes an octal number, no colon one of base 60."""
        text = self.construct_scalar(node).replace("_", "")
        sign, digits = (-1 if text.startswith("-") else 1), text.lstrip("+-")
        base = _BASES.get(digits[:2])
        return sign * (int(digits[2:], base) if base else int(digits))


for _name, (_pattern, _first) in _PLAIN.items():
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", re.compile(f"(?:{_pattern})$"), list(_first))
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_int)


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
    if not all(parts):
        raise ConfigError(f"--set {text!r} names no key; write for instance --set train.alpha=2")
    if parts[0] == "variants" and len(parts) > 3:  # below a variant's name a dotted key is one key
        parts = [*parts[:2], ".".join(parts[2:])]
    set_at(values, parts, _value(value, f"--set {text}"), f"--set {dotted}")


def _value(text: str, where: str) -> Any:
    """The value of a flag, all of it: " #" begins a comment in a file, and is text here.

    Raises:
        ConfigError: no YAML, or something after the end of a quoted or bracketed value.
    """
    value = parse(text, where)
    node = yaml.compose(text, _Loader)
    rest = text.strip() if node is None else text[node.end_mark.index :].strip()
    if not rest:
        return value
    if node is None or (isinstance(node, yaml.ScalarNode) and node.style is None):
        return text.strip()
    raise ConfigError(f"{where}: YAML ends before {brief(rest)}; put the whole value in quotes")


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


def scalar(value: str) -> str:
    """A text as YAML of one line, in quotes where a reader of YAML 1.1 or 1.2 would take it for something else."""
    plain = yaml.safe_dump(value, width=math.inf, allow_unicode=True).removesuffix("\n...\n").removesuffix("\n")
    if plain == value and parse(plain, "value") == value:
        return value
    return yaml.safe_dump(value, width=math.inf, allow_unicode=True, default_style='"').removesuffix("\n")
