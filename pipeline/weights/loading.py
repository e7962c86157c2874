"""Loads components of a diffusers folder and single files; dtypes, devices, and silencing of other libraries."""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import transformers
import transformers.utils.logging as transformers_logging
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from rats.pipeline.weights.hashes import read_json
from rats.schemas.errors import ConfigError, DataError, reason
from rats.schemas.params import ComputeParams, ModelParams

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def torch_dtype(name: str) -> torch.dtype:
    """The dtype called `name`; ConfigError when there is none."""
    if name not in DTYPES:
        raise ConfigError(f"unknown dtype '{name}': use one of {', '.join(DTYPES)}")
    return DTYPES[name]


def torch_device(name: str) -> torch.device:
    """The device called `name`; ConfigError when this machine or this torch has none."""
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"unknown device '{name}': use cpu or cuda") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"compute.device is '{name}', but torch sees no CUDA device here: use cpu")
    return device


def load_component(cls: Any, folder: Path, model: ModelParams, compute: ComputeParams) -> Any:
    """A module of `cls` from a diffusers component's folder, on the device, in the model's dtype, in eval mode.

    Raises DataError when it does not load whole.
    """
    settings = {"torch_dtype": torch_dtype(model.dtype), "output_loading_info": True, **_renaming(cls)}
    try:
        with quiet_loading():
            module, info = cls.from_pretrained(folder, **settings)
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise DataError(
            f"{folder} does not load as {cls.__name__} ({reason(error)}): fetch or export it again"
        ) from error
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise DataError(f"{folder} lacks {len(missing)} weights, {missing[0]} first: fetch or export it again")
    return module.to(torch_device(compute.device)).eval()


def _renaming(cls: Any) -> dict[str, Any]:
    """Lets transformers 4 read a CLIPTextModel of transformers 5, whose names have no prefix."""
    if cls.__name__ != "CLIPTextModel" or not _transformers_4():
        return {}
    return {"key_mapping": {r"^(embeddings|encoder|final_layer_norm)\.": r"text_model.\1."}}


def load_tokenizer(cls: Any, folder: Path) -> Any:
    """A tokenizer of `cls` from a diffusers component's folder."""
    settings = folder / "tokenizer_config.json"
    # transformers 5 writes an empty list, in place of which transformers 4 wants a mapping
    empty = _transformers_4() and settings.is_file() and read_json(settings).get("extra_special_tokens") == []
    return cls.from_pretrained(folder, **({"extra_special_tokens": {}} if empty else {}))


def _transformers_4() -> bool:
    return transformers.__version__.startswith("4.")


def save_component(module: Any, folder: Path) -> None:
    """`module.save_pretrained(folder)`, for a network or a whole pipeline, without the paths of this machine."""
    module.save_pretrained(folder)
    for path in (path for name in ("config.json", "model_index.json") for path in folder.rglob(name)):
        config = json.loads(path.read_text())
        config.pop("_name_or_path", None)
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def outline_component(cls: Any, folder: Path) -> Any:
    """A module of `cls` whose parameters have shapes and no values."""
    with torch.device("meta"):
        return cls.from_config(cls.load_config(folder))


def read_state(path: Path) -> dict[str, Tensor]:
    """Tensors of a .safetensors file or of a .pt file (never unpickled beyond tensors), on the CPU.

    A .pt file may hold them directly or under "state_dict". Raises DataError when it is damaged or holds code.
    """
    try:
        state = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, SafetensorError, pickle.UnpicklingError) as error:
        raise DataError(f"{path} is damaged or holds more than tensors ({reason(error)}): get it anew") from error
    inner = state.get("state_dict")
    return inner if isinstance(inner, dict) else state


def load_state(module: nn.Module, state: dict[str, Tensor], path: Path) -> None:
    """Loads all of `module` from `state`. Extra keys in `state` are ignored; missing ones are a DataError."""
    wanted = set(module.state_dict())
    missing = sorted(wanted - set(state))
    if missing:
        raise DataError(f"{path} lacks {len(missing)} weights, {missing[0]} first: it is no checkpoint of this kind")
    try:
        module.load_state_dict({key: state[key] for key in wanted})
    except RuntimeError as error:
        last = str(error).splitlines()[-1].strip()
        raise DataError(f"{path} does not fit its configuration ({last}): take both from one source") from error


def quiet_imports() -> AbstractContextManager[None]:
    """Silences transformers' warnings while modules are imported that try to import torchvision."""
    return _errors_only(transformers_logging)


def quiet_notices() -> AbstractContextManager[None]:
    """Silences diffusers' notices about experimental features."""
    import diffusers.utils.logging as diffusers_logging

    return _errors_only(diffusers_logging)


@contextmanager
def _errors_only(logging: ModuleType) -> Iterator[None]:
    """Lets a library log errors only. diffusers and transformers have the same interface for it."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


@contextmanager
def quiet_loading() -> Iterator[None]:
    """No progress bars of diffusers and transformers while weights load: our own progress is on stderr."""
    import diffusers.utils.logging as diffusers_logging

    modules = (diffusers_logging, transformers_logging)
    enabled = [module.is_progress_bar_enabled() for module in modules]
    for module in modules:
        module.disable_progress_bar()
    try:
        yield
    finally:
        for module, was_enabled in zip(modules, enabled, strict=True):
            if was_enabled:
                module.enable_progress_bar()
