"""What weights are: content hashes of components and rewards. Never imports torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from rats.schemas.errors import ConfigError, DataError

CHUNK = 1 << 20


HASHED_COMPONENTS = ("transformer", "vae", "text_encoder", "tokenizer")
"""Prefixes: `text_encoder` stands for `text_encoder_2` too."""


NETWORK = "transformer"
"""The component that samples, and the only one that training changes."""


SMALL_FILES = ("*.json", "*.txt")
"""What a checkpoint needs beside it: configuration and vocabulary."""


def hash_files(paths: Iterable[Path], root: Path) -> str:
    """sha256 over (name relative to `root`, content) of the files, sorted by name."""
    total = hashlib.sha256()
    for name, path in sorted((path.relative_to(root).as_posix(), path) for path in paths):
        total.update(f"{name}\0{_hash_file(path)}\n".encode())
    return total.hexdigest()


def _hash_file(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def hash_path(path: Path) -> str:
    """Hash of a file, or of all files below a folder; hidden ones (a hub's bookkeeping) left out."""
    if path.is_file():
        return hash_files([path], path.parent)
    files = (file for file in path.rglob("*") if file.is_file())
    return hash_files((f for f in files if not any(p.startswith(".") for p in f.relative_to(path).parts)), path)


def hash_paths(paths: Mapping[str, Path]) -> dict[str, str]:
    """`hash_path` of several, by name."""
    return {name: hash_path(path) for name, path in paths.items()}


def adapter_fingerprint(adapter: str, version: int, weights: Iterable[Path], folder: Path) -> str:
    """Identity of a reward: adapter, its version (of preprocessing and formula), weights, and the small files beside.

    `folder`: its top-level .json and .txt files (configuration, vocabulary) count too.
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


def weights_bytes(folder: Path) -> int:
    """Bytes of a component's files of weights. Raises ConfigError when one that its index names is not there."""
    for index in folder.glob("*.index.json"):
        for name in sorted(set(read_json(index).get("weight_map", {}).values())):
            if not (folder / name).is_file():
                raise ConfigError(f"no file {folder / name}, which {index.name} names: fetch the model again")
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))
