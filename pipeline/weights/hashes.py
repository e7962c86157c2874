"""Content hashes of components and rewards. Never imports torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

from rats.schemas.errors import ConfigError, DataError

CHUNK = 1 << 20


NETWORK = "transformer"
"""The component that predicts velocities, and the only one that training changes."""


SMALL_FILES = ("*.json", "*.txt")
"""Patterns of the small files that a checkpoint needs: configuration and vocabulary."""


def hash_files(paths: Iterable[Path], root: Path) -> str:
    """sha256 over (name relative to `root`, content) of the files, sorted by name."""
    total = hashlib.sha256()
    for name, path in sorted((path.relative_to(root).as_posix(), path) for path in paths):
        total.update(f"{name}\0{hash_content(path)}\n".encode())
    return total.hexdigest()


def hash_content(path: Path) -> str:
    """sha256 of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def hash_path(path: Path) -> str:
    """Hash of a file, or of all files below a folder. Hidden files, which the hub's client writes, are left out."""
    if path.is_file():
        return hash_files([path], path.parent)
    files = (file for file in path.rglob("*") if file.is_file())
    return hash_files((f for f in files if not any(p.startswith(".") for p in f.relative_to(path).parts)), path)


def adapter_fingerprint(adapter: str, version: int, weights: Iterable[Path], folder: Path) -> str:
    """Fingerprint of a reward: adapter, version of formula and preprocessing, weights, small files beside them.

    `folder`: its top-level .json and .txt files (configuration, vocabulary) are hashed too.
    """
    beside = (path for pattern in SMALL_FILES for path in folder.glob(pattern))
    parts = [adapter, str(version), hash_files({*weights, *beside}, folder)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def read_json(path: Path) -> dict:
    """A JSON object from `path`. Raises ConfigError when there is no file, DataError when it is no JSON object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"no file {path}: is this folder complete?") from error
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is not readable as JSON ({error}); fetch it again") from error
    if not isinstance(value, dict):
        raise DataError(f"{path} must hold a JSON object, not a {type(value).__name__}; fetch it again")
    return value
