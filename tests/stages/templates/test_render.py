"""Text from outside is shown on a card letter by letter, whatever Markdown or HTML would make of it."""

from __future__ import annotations

import pytest
from markdown_it import MarkdownIt

from rats.stages.templates.render import Markdown, code, literal

HOSTILE = [
    "<script>alert(1)</script>",
    "![x](http://evil.example/a.png)",
    "[terms](javascript:alert(1))",
    "a | b || c",
    "`x` ``y`` \\`z",
    "**bold** __bold__ _slanted_ *slanted* ~~gone~~",
    "<!-- gone --> &lt;b&gt; &#60;",
    "a\\|b\\\\|c \\",
    "# heading\n\n---\n\n- list",
    "\x1b[2Jcleared\x07",
    "$x^2$ <http://evil.example>",
]


def cell(text: str) -> tuple[list[str], str]:
    """Kinds of the parts, and the text that is shown, of a table's cell."""
    tokens = (
        MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(f"| a | b |\n|---|---|\n| {text} | 7 |\n")
    )
    rows = [token for token in tokens if token.type == "inline"]
    assert len(rows) == 4 and rows[3].content == "7"
    parts = rows[2].children or []
    return sorted({part.type for part in parts}), "".join(part.content for part in parts)


def shown(text: str) -> str:
    return " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())


@pytest.mark.parametrize("text", HOSTILE)
def test_a_text_is_letters_and_nothing_else(text: str):
    kinds, seen = cell(literal(text))
    assert seen == shown(text)
    assert set(kinds) <= {"text", "text_special"}


@pytest.mark.parametrize("text", [text for text in HOSTILE if "|" not in text])
def test_code_is_code_and_nothing_else(text: str):
    kinds, seen = cell(code(text))
    assert (kinds, seen.strip()) == (["code_inline"], shown(text))


def test_names_stay_as_they_are_and_what_is_markdown_is_not_escaped_again():
    for name in ("black-forest-labs/FLUX.1-dev", "image_reward", "hps_v2.1 (5.2, 7 %)"):
        assert literal(name) == name
    assert literal(literal("a*b")) == literal("a*b") == "a\\*b" and literal(0.37) == 0.37
    assert isinstance(code("a"), Markdown)
