"""Bounds on the memory that a file from somebody else may take, held before it is taken.

A few kilobytes can say that they unfold to gigabytes, or unfold to them. A file is refused for what it says of itself
and for more than a real one needs, before a library believes it.
"""

from __future__ import annotations

from pathlib import Path

MAX_HEADER = 1 << 22
"""The most bytes of a safetensors header: 3 s for the library. That of the largest model read here has 0.2 MB."""

_FREE, _RATIO = 1 << 24, 100


def unfolded(size: int) -> int:
    """The most bytes in memory that `size` packed bytes may unfold to. Real files reach 50 times their size."""
    return _FREE + _RATIO * size


def bounded(data: bytes) -> bytes:
    """The bytes of a safetensors file, once its header is known to be small. Raises ValueError."""
    _check_header(data[:8], MAX_HEADER)
    return data


def bounded_file(path: Path) -> Path:
    """The same for a file that is not read yet. Raises ValueError or OSError."""
    with open(path, "rb") as file:
        _check_header(file.read(8), MAX_HEADER)
    return path


def _check_header(start: bytes, most: int) -> None:
    if (length := int.from_bytes(start, "little")) > most:
        raise ValueError(f"a header of {length} bytes, at most {most}")
