"""What experiments hold on to: which sets, snapshots and columns the files below some folders name.

A document holds what it names, whatever kind it is: run records, checkpoints, reports, published folders and their
copies in DVC's cache are all JSON with 64 hex digits in it. So a record that is damaged, or of a later version, still
holds. What lies in git's history only is not seen.
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
from rats.pipeline.prompts import planned, read_prompts
from rats.pipeline.weights.hashes import NETWORK
from rats.schemas.canonical import sha256
from rats.schemas.errors import ConfigError, RatsError, StorageError
from rats.schemas.params import Params, Prompts, PromptSource, load_params
from rats.schemas.recipe import Recipe, fingerprint, make_recipe
from rats.schemas.yaml_values import parse
from rats.stages.rollout.rollout import read_recipe

HASH = re.compile(rb"(?<![0-9a-f])[0-9a-f]{64}(?![0-9a-f])")
PASSED_OVER = (".git", "__pycache__")
YAML = (".yaml", ".yml")
RECIPE_BYTES = 1 << 20
PARAMS_KEYS = {"model", "prompts", "train"}
"""The blocks that every parameter file has, whatever its name."""


@dataclass
class Found:
    """What lies below the roots.

    Attributes:
        names: A file that names it, by fingerprint, snapshot hash or address of a column.
        params: Parameter files.
        unreadable: Files that may be parameter files of a set here, with what is wrong with them.
    """

    names: dict[str, Path] = field(default_factory=dict)
    params: list[tuple[Path, Params]] = field(default_factory=list)
    unreadable: list[tuple[Path, str]] = field(default_factory=list)


@dataclass
class Held:
    """Why a set is kept, and what of it: all of it, or the shards with these keys."""

    by: list[str] = field(default_factory=list)
    everything: bool = False
    keys: set[str] = field(default_factory=set)


def search(roots: Sequence[Path], store: Path, wanted: Collection[str]) -> Found:
    """Read all documents and parameter files below `roots`, the store itself left out.

    Args:
        roots: Folders; links in them are followed.
        store: Its own documents hold nothing.
        wanted: The names that are looked for.

    Raises:
        ConfigError: a root that is no folder.
        StorageError: something that cannot be read, and may name what would be deleted.
    """
    about = store.stat()
    found, seen = Found(), {(about.st_dev, about.st_ino)}
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
    """JSON and YAML, and in DVC's cache, where names are hashes, what begins like JSON."""
    if path.suffix in (".json", *YAML):
        return True
    if ".dvc" not in path.parts:
        return False
    with _unknown_otherwise(path), path.open("rb") as file:
        return file.read(1) in (b"{", b"[")


def _names_in(path: Path) -> set[str]:
    """Everything in the file that looks like a hash; a recipe is named by its own."""
    with _unknown_otherwise(path), path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size == 0:
            return set()
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            names = {match.decode() for match in HASH.findall(data)}
            is_recipe = size < RECIPE_BYTES and data.find(b'"solver_version"') >= 0
            return names | {sha256(data[:])} if is_recipe else names


def _note(found: Found, path: Path, wanted: Collection[str], names: Iterable[str]) -> None:
    for name in names:
        if name in wanted:
            found.names.setdefault(name, path)


def _read_params(found: Found, path: Path, root: Path) -> None:
    """Take a parameter file, with its paths as its commands would find them; other YAML is passed over."""
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
    """Paths in the file are of the folder in which its commands are run: it is the file's, or one above it."""
    above = [folder for folder in path.absolute().parents if folder.is_relative_to(root.absolute())]
    folders = [*(above or [path.absolute().parent]), Path.cwd()]

    def found(name: str | None) -> str | None:
        if name is None:
            return None
        return next((str(folder / name) for folder in folders if (folder / name).exists()), name)

    model = params.model.model_copy(update={name: found(getattr(params.model, name)) for name in ("path", NETWORK)})
    prompts = params.prompts.model_copy(update={name: _moved(source, found) for name, source in params.prompts})
    return params.model_copy(update={"model": model, "prompts": prompts})


def _moved(source: Prompts | None, found: Callable[[str | None], str | None]) -> Prompts | None:
    return source.model_copy(update={"path": found(source.path)}) if isinstance(source, PromptSource) else found(source)


def could_make(params: Params, recipe: Recipe) -> bool:
    """Whether the two agree in all that can be known without the model: everything but weights and sigmas."""
    unknown = (recipe.weights, recipe.scheduler, recipe.sigmas, recipe.horizons, recipe.latent_shape)
    known = make_recipe(params, *unknown)
    return known == recipe and len(recipe.sigmas) == params.teacher.steps + 1


def hold(found: Found, recipes: Mapping[str, Recipe], snapshots: Mapping[str, Collection[str]]) -> dict[str, Held]:
    """What of each set is held, by fingerprint.

    Args:
        found: What lies below the roots.
        recipes: All sets of the store.
        snapshots: Hashes of each set's snapshots, by fingerprint.
    """
    held = {name: Held() for name in recipes}
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
            _hold_by(path, params, candidates, held, made)
    return held


def _hold_by(
    path: Path, params: Params, candidates: Sequence[str], held: dict[str, Held], made: dict[str, str | None]
) -> None:
    """What one parameter file would use again; all that it could mean where that cannot be told."""
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
    """The fingerprint of what a rollout would make now; None when that cannot be told from this disk."""
    if not Path(params.model.path).is_dir():  # never ask a hub: it would send the weights
        return None
    try:
        return fingerprint(read_recipe(params, Model.of(params)))
    except Exception:  # whatever is wrong with a model: nothing is deleted because of it
        return None


def _keys(params: Params) -> set[str] | None:
    """Keys of all samples that the file asks for; None when its prompts cannot be read."""
    sources = [source for _, source in params.prompts if source is not None]
    if not all(Path(str(source)).exists() for source in sources):  # nor for its prompts
        return None
    try:
        parts = [planned(read_prompts(source), params.teacher.noises_per_prompt) for source in sources]
    except RatsError:
        return None
    return {sample.key for part in parts for sample in part}


@contextmanager
def _unknown_otherwise(path: Path) -> Iterator[None]:
    """What cannot be read may name what would be deleted: then nothing is."""
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"cannot read {path} ({error.strerror}), which may name a set: make it readable, or name other folders "
            "with --root"
        ) from None
