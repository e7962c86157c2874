"""A prompt file's format by its name, and its bytes as text: unpacked, decoded, and refused where it is none."""

from __future__ import annotations

import codecs
import gzip
import io
import re
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa

from rats.pipeline.bounds import unfolded
from rats.schemas.errors import ConfigError, plain

FORMATS = {
    ".txt": "text",
    ".csv": "csv",
    ".tsv": "tsv",
    ".json": "json",
    ".jsonl": "json",
    ".ndjson": "json",
    ".parquet": "parquet",
}
"""What a file is, by its ending."""

LINE_ENDS = re.compile(r"\r\n|\n|\r")
"""Nothing else: prompts may hold the line separators of Unicode."""

_LFS = b"version https://git-lfs.github.com/spec/"
"""How the small file begins that git leaves where a large one belongs."""

_MARKS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",  # before UTF-16, whose mark it begins with
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


PACKED: dict[str, Callable[[bytes], Any]] = {
    ".gz": lambda data: gzip.GzipFile(fileobj=io.BytesIO(data)),
    ".zst": lambda data: pa.CompressedInputStream(pa.BufferReader(data), "zstd"),
}
"""How a file is unpacked, by its last ending: a stream of its bytes."""


def format_of(name: str) -> str | None:
    """One of the values of `FORMATS`, by a file's name, packed or not; None of any other file."""
    path = Path(name.lower())
    if path.suffix in PACKED:
        path = path.with_suffix("")
    return FORMATS.get(path.suffix)


def known_format(path: Path) -> str:
    """The same; ConfigError of a file that is neither a text of prompts nor a table."""
    if found := format_of(path.name):
        return found
    raise unreadable(path, f"its name ends in none of {', '.join(FORMATS)} (each also with {' or '.join(PACKED)})")


def unreadable(path: Path | str, reason: object) -> ConfigError:
    """The error of a file that cannot be read, in one line."""
    return ConfigError(
        f"cannot read prompts from {plain(str(path))}: {plain(str(reason))}; check prompts: in params.yaml"
    )


def read_bytes(path: Path) -> bytes:
    """A file's bytes, unpacked. ConfigError where they cannot be had."""
    try:
        if not path.is_file():  # a pipe would be waited for
            raise unreadable(path, "it is no file" if path.exists() else "there is no such file")
        data = path.read_bytes()
    except OSError as error:
        raise unreadable(path, error) from None
    if data.startswith(_LFS):
        raise unreadable(path, "it is a pointer of git LFS, not the file: fetch that by `git lfs pull`")
    unpack = PACKED.get(path.suffix.lower())
    try:
        return _unpacked(unpack(data), unfolded(len(data))) if unpack else data
    except (OSError, EOFError, ValueError, zlib.error, pa.ArrowException) as error:
        raise unreadable(path, f"it cannot be unpacked ({error})") from None


def _unpacked(stream: Any, most: int) -> bytes:
    with stream:
        data = stream.read(most + 1)
    if len(data) > most:
        raise ValueError(f"to more than {most} bytes: unpack it yourself")
    return data


def read_text(path: Path) -> str:
    """A file's text: UTF-8, or UTF-16 or UTF-32 with their marks. ConfigError where it is no text."""
    data = read_bytes(path)
    encoding = next((name for mark, name in _MARKS.items() if data.startswith(mark)), "utf-8")
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        raise unreadable(path, f"{error}: save it as UTF-8") from None
    if "\0" in text:
        raise unreadable(path, "it holds NUL, so it is no text in UTF-8: save it as such")
    if text.lstrip()[:14].lower().startswith(("<!doctype html", "<html")):
        raise unreadable(path, "it is a web page, not the file that it should lead to: download that")
    return text
