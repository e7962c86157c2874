"""Which family draws as the pipeline that a model_index.json names."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

from diffusers import pipelines

from rats.pipeline.families.base import Family
from rats.pipeline.weights.folder import INDEX
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


def check_index(model: ModelParams, cls: type[Family], index: Mapping[str, Any]) -> None:
    """Raises ConfigError when `index`, a model_index.json, is of another pipeline than the family's."""
    name = index.get("_class_name")
    if index and name is None:
        raise DataError(f"the {INDEX} of {model.path} names no pipeline (_class_name): fetch or export it again")
    if name not in (None, cls.pipeline_class.__name__):
        fitting = family_for_index(index)
        if fitting is None:
            raise ConfigError(f"{model.path}: {no_family(index)}")
        drawn = f"model.family {model.family} draws as a {cls.pipeline_class.__name__}"
        raise ConfigError(f"{model.path} is a {brief(name)}, and {drawn}: set model.family: {fitting}")
    _check_libraries(model, cls, index)
    cls.check_index(index)


def no_family(index: Mapping[str, Any]) -> str:
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
