"""Where weights lie and what they are: folders, hub revisions and content hashes. Never imports torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from pathlib import Path

from rats.schemas.errors import ConfigError, DataError

CHUNK = 1 << 20
_CACHED: ContextVar[bool] = ContextVar("cached", default=False)
"""Whether the hub itself is left alone."""

HASHED_COMPONENTS = ("transformer", "vae", "text_encoder", "tokenizer")
"""Prefixes: `text_encoder` stands for `text_encoder_2` too."""

NETWORK = "transformer"
"""The component that samples, and the only one that training changes."""

PIPELINE_PATTERNS = ("model_index.json", "*/*.json", "*/*.safetensors", "*/*.txt", "*/*.jinja", "*/*.model")
"""What a diffusers folder needs; leaves out the single-file copies at the top of hub repositories."""

SMALL_FILES = ("*.json", "*.txt")
"""What a checkpoint needs beside it: configuration and vocabulary."""

VARIANTS = ["*.fp16.*", "*.fp32.*", "*.non_ema.*"]
"""Second copies of the same weights, which nothing here loads."""

DECODER_PATTERNS = ("model_index.json", "vae/*.json", "vae/*.safetensors")
"""What decoding stored latents needs of it."""


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


def resolve(path: str | Path, revision: str | None = None, patterns: Sequence[str] | None = None) -> Path:
    """A local file or folder as it is, or the snapshot of a hub repository, whose folder is named by its commit.

    `patterns` limits what a hub download fetches. Raises ConfigError when there is neither.
    """
    local = Path(path)
    if local.exists():
        return local
    if not is_hub_id(str(path)):
        raise ConfigError(f"no model at '{path}' (looked in {Path.cwd()}): give a folder or a hub id like org/name")
    return _download(str(path), revision, patterns)


@contextmanager
def only_cached() -> Iterator[None]:
    """Nothing is fetched in this block: a hub repository is what the cache has of it, or a ConfigError."""
    token = _CACHED.set(True)
    try:
        yield
    finally:
        _CACHED.reset(token)


def weights_bytes(folder: Path) -> int:
    """Bytes of a component's files of weights. Raises ConfigError when one that its index names is not there."""
    for index in folder.glob("*.index.json"):
        for name in sorted(set(read_json(index).get("weight_map", {}).values())):
            if not (folder / name).is_file():
                raise ConfigError(f"no file {folder / name}, which {index.name} names: fetch the model again")
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def find_checkpoint(path: Path, names: Sequence[str]) -> Path:
    """The file itself, or the first of `names` that the folder has. Raises ConfigError when it has none of them."""
    if path.is_file():
        return path
    found = [path / name for name in names if (path / name).is_file()]
    if not found:
        raise ConfigError(f"no {' or '.join(names)} in {path}: give the folder of such a checkpoint or the file itself")
    return found[0]


def resolve_checkpoint(path: str, revision: str | None, names: Sequence[str]) -> tuple[Path, str | None]:
    """A local file or folder as it is, or a checkpoint of a hub repository; and the hub's commit.

    On a hub, `path` is `org/name` or `org/name/file`: that file, else the first of `names` that is there, comes with
    the small files beside it. Raises ConfigError when there is none.
    """
    parts = path.split("/")
    repository, file = "/".join(parts[:2]), "/".join(parts[2:])
    if Path(path).exists() or not is_hub_id(repository):
        return resolve(path), revision
    wanted = [file] if file else list(names)
    for name in wanted:
        snapshot = resolve(repository, revision, (name, *SMALL_FILES))
        revision = snapshot.name  # one commit, however many names are tried
        if (snapshot / name).is_file():
            return snapshot / name, revision
    raise ConfigError(f"hub repository '{repository}' has no {' or '.join(wanted)} (commit {revision})")


def absolute_if_local(path: str) -> str:
    """A local path from the root on, since a worker may stand elsewhere; a hub id as it is."""
    return str(Path(path).absolute()) if Path(path).exists() else path


def pinned(path: str, revision: str | None, patterns: Sequence[str] | None = None) -> str | None:
    """The commit that a hub repository is at now, so that every worker takes the same; a local path's as given."""
    return revision if Path(path).exists() else resolve(path, revision, patterns).name


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


def is_hub_id(path: str) -> bool:
    """`org/name`, unless `org` is a folder here: then a missing folder is meant."""
    organisation, _, name = path.partition("/")
    return bool(organisation and name) and "/" not in name and path[0] not in "./~" and not Path(organisation).is_dir()


def _download(repository: str, revision: str | None, patterns: Sequence[str] | None) -> Path:
    from huggingface_hub import snapshot_download

    revised, cached = (f" at revision {revision}" if revision else ""), _CACHED.get()
    try:
        download = partial(snapshot_download, revision=revision, local_files_only=cached, ignore_patterns=VARIANTS)
        return Path(download(repository, allow_patterns=list(patterns) if patterns else None))
    except Exception as error:  # the hub raises a dozen kinds, of three libraries: all mean the same here
        if cached:
            raise ConfigError(
                f"'{repository}'{revised} is no local folder and not in the hub's cache: the first command that needs "
                f"it fetches it, or `hf download {repository}` now (a gated one after `hf auth login`)"
            ) from error
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(
            f"no local folder '{repository}' and no such hub repository{revised} in reach ({reason}): "
            "check the name, the network and `hf auth login`"
        ) from error
