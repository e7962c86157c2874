"""Which family draws as the pipeline that a model_index.json names."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from diffusers import pipelines

from rats.pipeline.families.base import Family
from rats.pipeline.weights.files import check_layout
from rats.pipeline.weights.folder import INDEX, ModelFolder
from rats.pipeline.weights.hashes import NETWORK
from rats.schemas.errors import ConfigError, DataError, brief, plain
from rats.schemas.params import ModelParams
from rats.schemas.plugins import FAMILIES, load_plugin, plugins_in

LIBRARIES = ("diffusers", "transformers")
"""Where the classes of all components are, besides those of single pipelines of diffusers."""


def family_for_index(index: Mapping[str, Any]) -> str | None:
    """The installed family of the pipeline in a model_index.json; None if there is none."""
    for name in plugins_in(FAMILIES):
        try:
            cls: type[Family] = load_plugin(FAMILIES, name)
        except ConfigError:  # a family that cannot be imported cannot open the model
            continue
        if cls.pipeline_class.__name__ == index.get("_class_name"):
            return name
    return None


def family_of(model: str, asked: str | None = None) -> str:
    """The family that draws the pipeline of a folder or hub id. Of a hub, model_index.json alone is fetched.

    Args:
        model: What `model.path` will be.
        asked: The family that the user names; else it follows from the hub id or from model_index.json.

    Raises:
        ConfigError: no installed family draws it; nothing says which does, and it is not asked for.
    """
    if asked is None and (known := _published(model)):
        return known
    network = load_plugin(FAMILIES, asked).network_class.__name__ if asked else None
    named = ModelParams.model_construct(path=model, family=asked or "")
    index = _index(named, network)
    _check_name(named, index)
    family = asked or family_for_index(index)
    if family is None:
        raise ConfigError(f"--model {model}: {_no_family(index)}")
    check_index(named.model_copy(update={"family": family}), load_plugin(FAMILIES, family), index)
    return family


def _published(hub_id: str) -> str | None:
    for name in plugins_in(FAMILIES):
        with suppress(ConfigError):  # one that cannot be imported here
            if hub_id in load_plugin(FAMILIES, name).published:
                return name
    return None


def _index(model: ModelParams, network: str | None) -> dict[str, Any]:
    """The model's index. Where it is not in reach: empty if the family is known, by its `network`'s class."""
    files, say = ModelFolder(model), f"say which of {', '.join(sorted(plugins_in(FAMILIES)))} by --family"
    if network is not None:
        check_layout(model, network)
    elif Path(model.path).is_file():
        raise ConfigError(f"--model {model.path} is one file of weights, no folder of a pipeline: {say}")
    try:
        has_index = (files.index_root / INDEX).is_file() or not files.is_local
    except ConfigError as error:
        if network is not None:
            return {}
        raise ConfigError(f"--model {model.path} is none of the published models: {say}, for {error}") from None
    if not has_index and network is None:
        raise ConfigError(f"--model {model.path} has no {INDEX}: {say}")
    return files.index


def check_index(model: ModelParams, cls: type[Family], index: Mapping[str, Any]) -> None:
    """Raises ConfigError when `index`, a model_index.json, is of another pipeline than the family's."""
    _check_name(model, index)
    name = index.get("_class_name")
    if name not in (None, cls.pipeline_class.__name__):
        fitting = family_for_index(index)
        if fitting is None:
            raise ConfigError(f"{model.path}: {_no_family(index)}")
        drawn = f"model.family {model.family} draws as a {cls.pipeline_class.__name__}"
        raise ConfigError(f"{model.path} is a {brief(name)}, and {drawn}: set model.family: {fitting}")
    _check_libraries(model, cls, index)
    cls.check_index(index)


def _check_name(model: ModelParams, index: Mapping[str, Any]) -> None:
    if index and index.get("_class_name") is None:
        raise DataError(f"the {INDEX} of {model.path} names no pipeline (_class_name): fetch or export it again")


def _no_family(index: Mapping[str, Any]) -> str:
    """What to say of a pipeline that no installed family draws as."""
    return f"no installed family draws as a {plain(str(index.get('_class_name')))}: docs/families.md"


def _check_libraries(model: ModelParams, cls: type[Family], index: Mapping[str, Any]) -> None:
    """Raises ConfigError for a component of a module that is not installed: a model's own code is never run."""
    for name, entry in index.items():
        library = entry[0] if isinstance(entry, list) and entry else None
        if not isinstance(library, str) or library in LIBRARIES or hasattr(pipelines, library):
            continue
        if not library.isidentifier() or find_spec(library) is None:
            known = f'["diffusers", "{cls.network_class.__name__}"]' if name == NETWORK else "a class of diffusers"
            raise ConfigError(
                f"{model.path} takes its {plain(name)} from {plain(library)}, which is not installed, and code of a "
                f"model's folder is not run: install it, or write {known} into {INDEX} where that is what it holds"
            )
