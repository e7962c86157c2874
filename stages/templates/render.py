"""Fills in the templates of this folder; pictures and plots as a page takes them."""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image

from rats.schemas.errors import plain
from rats.schemas.yaml_values import scalar
from rats.stages.measure.pictures import Picture

PageData = dict[str, Any]

_SPECIAL = re.compile(r"[\\`*\[\]<>|~$&]|(?<![^\W_])_|_(?![^\W_])")
"""What Markdown takes for more than letters: not an underscore inside a name."""
_LONGEST = 2000
"""Characters of a text on a card."""


def plot(svgs: Sequence[str], legend: Sequence[tuple[str, str, bool]], caption: str) -> PageData:
    """Panels and their legend (name, colour, dashed) as `figure.html.j2` takes them."""
    sources = [data_uri("image/svg+xml", svg.encode()) for svg in svgs]
    return {"sources": sources, "legend": legend, "caption": caption}


def data_uri(kind: str, content: bytes) -> str:
    """A file inside the page."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def png(picture: Picture) -> str:
    """A picture as a data URI."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG", optimize=True)
    return data_uri("image/png", buffer.getvalue())


def render(template: str, context: PageData) -> str:
    """A template of this folder, filled in; a value that it misses is an error.

    Pages (`.html.j2`) and cards (`.md.j2`) escape every text that is not `Markdown` already: prompts and names may hold
    anything. In YAML a text goes through the filter `yaml`.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=template.endswith(".html.j2"),
        keep_trailing_newline=True,
        undefined=StrictUndefined,
        finalize=literal if template.endswith(".md.j2") else None,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["yaml"] = scalar
    return environment.get_template(template).render(context)


class Markdown(str):
    """Text that is Markdown, which cards take as it is."""


def literal(value: Any) -> Any:
    """A text as Markdown that shows it letter by letter, on one line; other values as they are."""
    if not isinstance(value, str) or isinstance(value, Markdown):
        return value
    return Markdown(_SPECIAL.sub(r"\\\g<0>", plain(value, _LONGEST)))


def code(text: str) -> Markdown:
    """Text as Markdown shows it letter by letter in a fixed pitch, on one line of a table."""
    flat = plain(text, _LONGEST).replace("|", "\\|")
    if "`" not in flat:
        return Markdown(f"`{flat}`")
    fence = "`" * (1 + flat.count("`"))  # longer than any run of them inside
    return Markdown(f"{fence} {flat} {fence}")


def quoted(text: str) -> Markdown:
    """A text as Python code has it, inside a block of code."""
    return Markdown(json.dumps(plain(text, _LONGEST)))
