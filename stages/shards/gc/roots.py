"""The garbage collector's roots: which sets, snapshots and columns the files below some folders refer to.

Any document keeps what it names: run records, checkpoints, reports, published folders and their copies in DVC's cache
are all JSON with hashes of 64 hex digits. So even a damaged record, or one of a later version, keeps what it names.
Files that exist only in git's history are not seen.
"""

from __future__ import annotations

import json
import mmap
import os
import re
import stat
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from rats.pipeline.families.open import Model
from rats.pipeline.prompts import planned_samples, read_prompts
from rats.pipeline.weights.hashes import NETWORK
from rats.schemas.canonical import sha256
from rats.schemas.errors import ConfigError, RatsError, StorageError
from rats.schemas.params import Params, Prompts, PromptSource, load_params
from rats.schemas.recipe import NEUTRAL, Recipe, fingerprint, make_recipe
from rats.schemas.yaml_values import parse
from rats.stages.rollout.rollout import read_recipe

HASH = re.compile(rb"(?<![0-9a-f])[0-9a-f]{64}(?![0-9a-f])")
PASSED_OVER = (".git", "__pycache__")
YAML = (".yaml", ".yml")
RECIPE_BYTES = 1 << 20
PARAMS_KEYS = {"model", "prompts", "train"}
"""Blocks that every parameter file has, by which it is recognised."""


@dataclass
class References:
    """What the files below the roots refer to.

    Attributes:
        names: For each fingerprint, snapshot hash or column address that was found: a file that names it.
        params: Parameter files.
        unreadable: Files that may be parameter files of a set here, with what is wrong with them.
    """

    names: dict[str, Path] = field(default_factory=dict)
    params: list[tuple[Path, Params]] = field(default_factory=list)
    unreadable: list[tuple[Path, str]] = field(default_factory=list)


@dataclass
class Retained:
    """Why a set is kept (`by`), and what of it: everything, or the shards with these keys."""

    by: list[str] = field(default_factory=list)
    everything: bool = False
    keys: set[str] = field(default_factory=set)


def search(roots: Sequence[Path], store: Path, wanted: Collection[str]) -> References:
    """Reads all documents and parameter files below `roots`, except for the store itself.

    Args:
        roots: Folders; links in them are followed.
        store: Is left out, since its own documents keep nothing.
        wanted: The names to look for.

    Raises:
        ConfigError: a root that is no folder.
        StorageError: something that cannot be read, and may name what would be deleted.
    """
    about = store.stat()
    found, seen = References(), {(about.st_dev, about.st_ino)}
    for root in roots:
        if not root.is_dir():
            raise ConfigError(f"no folder {root}: name with --root where your experiments lie")
        for path, is_folder in _walk(root, seen):
            if is_folder:
                _note(found, path, wanted, [path.name])
            elif path.suffix in YAML:
                _read_params(found, path, root)
            else:
                _note(found, path, wanted, _names_in(path))
    return found


def _walk(folder: Path, seen: set[tuple[int, int]]) -> Iterator[tuple[Path, bool]]:
    """Folders (True), documents and YAML files (False), each folder once, wherever links lead."""
    with _unknown_otherwise(folder):
        about = folder.stat()
        if (about.st_dev, about.st_ino) in seen:
            return
        seen.add((about.st_dev, about.st_ino))
        names = sorted(os.listdir(folder))
    yield folder, True
    for path in (folder / name for name in names if name not in PASSED_OVER):
        mode = _mode(path)
        if stat.S_ISDIR(mode):
            yield from _walk(path, seen)
        elif stat.S_ISREG(mode) and _may_name(path):
            yield path, False


def _mode(path: Path) -> int:
    """The file's kind; 0 for a link that leads nowhere."""
    with _unknown_otherwise(path):
        try:
            return path.stat().st_mode
        except FileNotFoundError:
            return 0


def _may_name(path: Path) -> bool:
    """Whether the file may name a set: JSON, YAML, or in DVC's cache (without suffixes) what begins like JSON."""
    if path.suffix in (".json", *YAML):
        return True
    if ".dvc" not in path.parts:
        return False
    with _unknown_otherwise(path), path.open("rb") as file:
        return file.read(1) in (b"{", b"[")


def _names_in(path: Path) -> set[str]:
    """Everything in the file that looks like a hash. A recipe also names itself by its own hash."""
    with _unknown_otherwise(path), path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size == 0:
            return set()
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            names = {match.decode() for match in HASH.findall(data)}
            is_recipe = size < RECIPE_BYTES and data.find(b'"solver_version"') >= 0
            return names | {sha256(data[:])} if is_recipe else names


def _note(found: References, path: Path, wanted: Collection[str], names: Iterable[str]) -> None:
    for name in names:
        if name in wanted:
            found.names.setdefault(name, path)


def _read_params(found: References, path: Path, root: Path) -> None:
    """Reads a parameter file and resolves its paths. Other YAML files are ignored."""
    with _unknown_otherwise(path):
        text = path.read_bytes().decode(errors="replace")
    if not all(key in text for key in PARAMS_KEYS):
        return
    ours = True  # until it is known not to be
    try:
        values = parse(text, str(path))
        ours = isinstance(values, dict) and values.keys() >= PARAMS_KEYS
        if ours:
            found.params.append((path, _anchored(load_params(path), path, root)))
    except RatsError as error:
        if ours:
            found.unreadable.append((path, str(error)))


def _anchored(params: Params, path: Path, root: Path) -> Params:
    """Resolves relative paths. They start from the folder in which commands are run: the file's, or one above it."""
    above = [folder for folder in path.absolute().parents if folder.is_relative_to(root.absolute())]
    folders = [*(above or [path.absolute().parent]), Path.cwd()]

    def found(name: str | None) -> str | None:
        if name is None:
            return None
        return next((str(folder / name) for folder in folders if (folder / name).exists()), name)

    loras = tuple(lora.model_copy(update={"path": found(lora.path)}) for lora in params.model.loras)
    model = params.model.model_copy(update={name: found(getattr(params.model, name)) for name in ("path", NETWORK)})
    model = model.model_copy(update={"loras": loras})
    prompts = params.prompts.model_copy(update={name: _moved(source, found) for name, source in params.prompts})
    return params.model_copy(update={"model": model, "prompts": prompts})


def _moved(source: Prompts | None, found: Callable[[str | None], str | None]) -> Prompts | None:
    return source.model_copy(update={"path": found(source.path)}) if isinstance(source, PromptSource) else found(source)


def could_make(params: Params, recipe: Recipe) -> bool:
    """Whether both agree in everything that is known without the model: all but weights and sigmas."""
    unknown = (recipe.weights, recipe.scheduler, recipe.sigmas, recipe.horizons, recipe.latent_shape)
    perhaps_ignored = NEUTRAL.keys() - {"negative_prompt"}  # whether a model reads these is unknown too
    known = make_recipe(params, *unknown, ignored=perhaps_ignored)
    return known == recipe.effective(perhaps_ignored) and len(recipe.sigmas) == params.teacher.steps + 1


def retained(
    found: References, recipes: Mapping[str, Recipe], snapshots: Mapping[str, Collection[str]]
) -> dict[str, Retained]:
    """What is kept of each set, by fingerprint.

    Args:
        found: The references below the roots.
        recipes: All sets of the store.
        snapshots: Hashes of each set's snapshots, by fingerprint.
    """
    held = {name: Retained() for name in recipes}
    for name, why in held.items():
        named = [found.names[word] for word in (name, *sorted(snapshots[name])) if word in found.names]
        why.by += [f"named in {path}" for path in sorted(set(named))]
        for path, error in found.unreadable:
            why.by.append(f"{path} may mean it: {error}")
            why.everything = True
    made: dict[str, str | None] = {}
    for path, params in found.params:
        candidates = [name for name, recipe in recipes.items() if could_make(params, recipe)]
        if candidates:
            _retain(path, params, candidates, held, made)
    return held


def _retain(
    path: Path, params: Params, candidates: Sequence[str], held: dict[str, Retained], made: dict[str, str | None]
) -> None:
    """Keeps what one parameter file would reuse; if that is unknown, every set that it could mean."""
    identity = json.dumps(params.model_dump(mode="json", include={"model", "teacher", "compute"}), sort_keys=True)
    if identity not in made:  # hashing a model takes a while, and variants of one file share it
        made[identity] = _made_by(params)
    name = made[identity]
    keys = _keys(params) if name else None
    for candidate in candidates if name is None else {name} & set(candidates):
        held[candidate].by.append(f"{path} makes it" if name else f"{path} may mean it: its model cannot be read here")
        if keys is None:
            held[candidate].everything = True
        else:
            held[candidate].keys |= keys


def _made_by(params: Params) -> str | None:
    """The fingerprint of the set that a rollout would make now; None if it cannot be determined from local files."""
    if not Path(params.model.path).is_dir():  # a hub id is never resolved: that would download the weights
        return None
    try:
        return fingerprint(read_recipe(params, Model.of(params)))
    except Exception:  # any error of a model: the set is then unknown, and nothing is deleted
        return None


def _keys(params: Params) -> set[str] | None:
    """Keys of all samples of the file's prompts; None if these cannot be read."""
    sources = [source for _, source in params.prompts if source is not None]
    if not all(Path(str(source)).exists() for source in sources):  # prompts are not downloaded either
        return None
    try:
        parts = [planned_samples(read_prompts(source), params.teacher.noises_per_prompt) for source in sources]
    except RatsError:
        return None
    return {sample.key for part in parts for sample in part}


@contextmanager
def _unknown_otherwise(path: Path) -> Iterator[None]:
    """Turns an unreadable file into an error: it may name what would be deleted."""
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"cannot read {path} ({error.strerror}), which may name a set: make it readable, or name other folders "
            "with --root"
        ) from None
