"""Which family draws as the pipeline that a model_index.json names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rats.pipeline.families.base import Family
from rats.pipeline.weights.folder import INDEX
from rats.schemas.errors import ConfigError, DataError, brief
from rats.schemas.params import ModelParams
from rats.schemas.plugins import FAMILIES, load_plugin, plugins_in


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
        way_out = f"set model.family: {fitting}" if fitting else "name a pipeline of an installed family (rats doctor)"
        drawn = f"model.family {model.family} draws as a {cls.pipeline_class.__name__}"
        raise ConfigError(f"{model.path} is a {brief(name)}, and {drawn}: {way_out}")
    cls.check_index(index)
