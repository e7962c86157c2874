"""What weights are: content hashes of components, schedulers and rewards. Never imports torch."""

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


def component_hashes(folder: Path, transformer: str | None = None) -> dict[str, str]:
    """Hashes of a diffusers folder's components that hold weights or vocabularies, by component name.

    `transformer`: the folder whose network replaces the pipeline's. Raises ConfigError when one of transformer, vae,
    text_encoder, tokenizer is missing.
    """
    names = sorted(path.name for path in folder.iterdir() if path.is_dir() and path.name.startswith(HASHED_COMPONENTS))
    missing = [name for name in HASHED_COMPONENTS if name not in names]
    if missing:
        raise ConfigError(f"no folder '{missing[0]}' in {folder}: model.path must name a whole diffusers pipeline")
    network = network_folder(folder, transformer)
    return {name: hash_path(network if name == NETWORK else folder / name) for name in names}


def network_folder(folder: Path, transformer: str | None) -> Path:
    """Where the network of the pipeline in `folder` lies: there, or where `model.transformer` says."""
    if transformer is None:
        return folder / NETWORK
    if not (Path(transformer) / "config.json").is_file():
        raise ConfigError(
            f"no network in {transformer}: model.transformer names the folder of a whole one, such as "
            "runs/rats/student; adapters are merged into one by `rats export`"
        )
    return Path(transformer)


def scheduler_hash(folder: Path) -> str:
    """sha256 of the scheduler's configuration as canonical JSON, without the version that wrote it."""
    config = read_json(folder / "scheduler" / "scheduler_config.json")
    config.pop("_diffusers_version", None)
    return hashlib.sha256(json.dumps(config, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


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


def check_weights(folder: Path, expected: Mapping[str, str], transformer: str | None = None) -> None:
    """Holds a folder's weights and vocabularies against a recipe's: another node may have others in the same place.

    `transformer` as in `component_hashes`. Raises ConfigError when a component differs.
    """
    found = component_hashes(folder, transformer)
    if other := sorted(name for name, value in expected.items() if found.get(name) != value):
        raise ConfigError(
            f"{folder / other[0]} holds other weights than the shard set's recipe names: "
            "give every worker the same model, or start the rollout again for the new one"
        )
