"""Values as YAML 1.2 and DVC read them, and as `--set` and `rats init` write them."""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from dvc.utils.serialize import YAMLFileCorruptedError
from dvc.utils.serialize._yaml import parse_yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from rats.schemas.errors import ConfigError
from rats.schemas.yaml_values import override, parse, scalar

PLAIN = st.text("0123456789+-._:eExobaf", min_size=1, max_size=8)


def read(text: str) -> Any:
    return parse(text, "p.yaml")["key"]


def read_by_dvc(text: str) -> Any:
    return parse_yaml(text, "p.yaml")["key"]


def outcome(reader: Any, text: str) -> str:
    """The value and its type, or that there is none."""
    try:
        value = reader(text)
    except (ConfigError, YAMLFileCorruptedError, ValueError, OverflowError):
        return "refused"
    return f"{type(value).__name__} {value!r}"


@given(PLAIN)
@example("0100")
@example("08")
@example("0o17")
@example("1:30")
@example("1e5")
@example("1_0.5")
@example("-.inf")
@settings(max_examples=300, deadline=None)
def test_a_plain_value_is_what_dvc_takes_it_for(value: str) -> None:
    assert outcome(read, f"key: {value}") == outcome(read_by_dvc, f"key: {value}")


@pytest.mark.parametrize(
    "value", ["true", "off", "yes", "y", "~", "null", "None", ".NaN", "nan", "2024-01-05", "0x1F", "0b11", "1,000"]
)
def test_so_is_a_word(value: str) -> None:
    assert outcome(read, f"key: {value}") == outcome(read_by_dvc, f"key: {value}")


@given(st.text(st.characters(exclude_categories=["Cs", "Cc"]) | st.sampled_from("\n\t #:'\"-?*&!{}[]|>%@`~,=")))
@example("flux #1")
@example("off")
@example("1e5")
@example("0o17")
@example("a: b")
@example("2024-01-05")
@settings(max_examples=300, deadline=None)
def test_a_text_is_written_so_that_every_reader_takes_it_for_that_text(text: str) -> None:
    line = f"key: {scalar(text)}  # a comment"
    assert "\n" not in line
    assert read(line) == read_by_dvc(line) == yaml.safe_load(line)["key"] == text


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("bad #1 hands", "bad #1 hands"),
        ("#1", "#1"),
        ("5 # five", "5 # five"),
        ("'bad #1'", "bad #1"),
        ("0100", 100),
        ("[3, 5]", [3, 5]),
        ("off", "off"),
        ("", None),
        (" 7 ", 7),
    ],
)
def test_a_flags_value_is_kept_whole(text: str, value: Any) -> None:
    values: dict[str, Any] = {}
    override(values, f"teacher.any={text}")
    assert values == {"teacher": {"any": value}}


@pytest.mark.parametrize("text", ["'bad' #1", "[3] # a list", "{a: 3} #"])
def test_what_comes_after_a_quoted_value_is_not_dropped(text: str) -> None:
    with pytest.raises(ConfigError, match="put the whole value in quotes"):
        override({}, f"teacher.any={text}")


@pytest.mark.parametrize("text", ["=3", "a..b=3", ".a=3"])
def test_a_flag_without_a_key_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="names no key"):
        override({}, text)
