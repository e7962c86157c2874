"""Loads components of a diffusers folder and single files; dtypes, devices, and silencing of other libraries."""

from __future__ import annotations

import json
import pickle
import re
import warnings
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import transformers
import transformers.utils.logging as transformers_logging
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from rats.pipeline.bounds import bounded_file
from rats.pipeline.weights.files import weight_files
from rats.pipeline.weights.hashes import read_json
from rats.pipeline.weights.opening import check_config, check_headers, opening, said
from rats.pipeline.weights.vocabulary import check_files, check_vocabulary
from rats.schemas.errors import ConfigError, DataError, brief, reason
from rats.schemas.params import ComputeParams, ModelParams

META = "meta"
"""torch's device of tensors with shapes and no values."""
ATTENTION = {"sdpa": "native"}
"""The names that diffusers has for the values of `compute.attention`."""
HARMLESS = r"|".join(
    (
        r"(^|\.)position_ids$",  # counted, not trained; saved by old releases
        r"(^|\.)rotary_emb\.inv_freq$",  # likewise
        r"^(vision_model|visual_projection|text_projection|logit_scale)\b",  # the rest of a whole CLIP model
        r"^decoder\.|^lm_head\.weight$",  # the rest of a whole T5
        r"^encoder\.embed_tokens\.weight$",  # T5's embeddings a second time
    )
)
"""Weights that a text encoder may have beside its own: a text encoder is often cut out of a larger model."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def torch_dtype(name: str) -> torch.dtype:
    """The dtype called `name`; ConfigError when there is none."""
    if name not in DTYPES:
        raise ConfigError(f"unknown dtype '{name}': use one of {', '.join(DTYPES)}")
    return DTYPES[name]


def torch_device(name: str) -> torch.device:
    """The device called `name`. Raises ConfigError where this machine or this torch makes no tensor on it."""
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError, ImportError) as error:  # what torch's backends raise
        why = reason(error).partition(". ")[0]
        raise ConfigError(
            f"compute.device is {brief(name)}, on which torch computes nothing here ({why}): use cpu, or another "
            "device that `rats doctor` lists"
        ) from error
    return torch.device(name)


def load_component(cls: Any, folder: Path, model: ModelParams, compute: ComputeParams) -> Any:
    """A module of `cls` from a diffusers component's folder, on the device, in the model's dtype, in eval mode.

    On torch's meta device only configuration and headers are read. Raises ConfigError for a component of another class
    or one that needs what is not here, DataError when the weights are not exactly those of the module.
    """
    device = torch_device(compute.device)
    check_config(cls, folder)
    files = weight_files(folder)
    check_headers(cls, files.paths)
    settings = {"torch_dtype": torch_dtype(model.dtype), "output_loading_info": True, **_renaming(cls)}
    settings |= {"variant": files.variant} if files.variant else {}
    settings |= {} if files.are_safe else {"use_safetensors": False}  # else diffusers logs that it finds none
    load = partial(_outlined, cls, files.paths) if device.type == META else cls.from_pretrained
    # what it would warn of is an error below
    with opening(folder, cls.__name__), quiet_loading(), quiet_notices(), quiet_imports():
        module, info = load(folder, **settings)
    _check_keys(cls, folder, info)
    return module.to(device).eval()


def load_pipeline(cls: Any, folder: Path | None, dtype: str, parts: dict[str, Any]) -> Any:
    """A pipeline of `cls` with these loaded parts, and with others that the folder's model_index.json names.

    `folder`: None where there is no model_index.json, and so no other part.
    """
    if folder is None:
        return cls(**parts)
    with opening(folder, cls.__name__), quiet_loading(), warnings.catch_warnings():
        # new releases of diffusers call it dtype and warn, older ones know torch_dtype only
        warnings.simplefilter("ignore", FutureWarning)
        return cls.from_pretrained(str(folder), torch_dtype=torch_dtype(dtype), **parts)


def apply_kernels(network: Any, compute: ComputeParams) -> None:
    """Sets the recipe's attention and compilation. The environment (DIFFUSERS_ATTN_BACKEND) is overridden."""
    with quiet_notices():
        network.set_attention_backend(ATTENTION[compute.attention])
    if compute.compile:
        network.compile()


def _outlined(cls: Any, paths: Iterable[Path], folder: Path, **settings: Any) -> tuple[Any, dict[str, Any]]:
    """`cls.from_pretrained` with tensors of shapes and no values: of the weights, only the headers are read."""
    state = {name: tensor for path in paths for name, tensor in _shapes(path).items()}
    for name in ("variant", "use_safetensors"):  # the files are found
        settings.pop(name, None)
    if hasattr(cls, "config_class"):  # transformers
        config = cls.config_class.from_pretrained(folder)
        return cls.from_pretrained(None, config=config, state_dict=state, device_map=META, **settings)
    with torch.device(META):
        module = cls.from_config(cls.load_config(folder))
    module._fix_state_dict_keys_on_load(state)  # diffusers: names of old releases
    found = module.load_state_dict(state, strict=False, assign=True)
    ignored = cls._keys_to_ignore_on_load_unexpected or []
    unexpected = [key for key in found.unexpected_keys if not any(re.search(one, key) for one in ignored)]
    return module.to(settings["torch_dtype"]), {"missing_keys": found.missing_keys, "unexpected_keys": unexpected}


def _shapes(path: Path) -> dict[str, Tensor]:
    """The tensors of a file of weights on the meta device, by name."""
    if path.suffix != ".safetensors":
        state: dict[str, Tensor] = torch.load(path, META, weights_only=True)
        return state
    with safe_open(bounded_file(path), "pt") as file:
        shapes = {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118
    return {key: torch.empty(shape, device=META) for key, shape in shapes.items()}


def _check_keys(cls: Any, folder: Path, info: dict[str, Any]) -> None:
    """Raises DataError when weights are missing, left over, or of another shape."""
    if adapters := sorted(key for key in info["unexpected_keys"] if "lora_" in key or ".base_layer." in key):
        raise DataError(
            f"{folder} holds a LoRA that was not unloaded ({adapters[0]}): save it again after pipe.fuse_lora() and "
            "pipe.unload_lora_weights(), or name a plain model and the LoRA under model.loras"
        )
    if missing := sorted(info["missing_keys"]):
        raise DataError(f"{folder} lacks {len(missing)} weights, {missing[0]} first: fetch or export it again")
    is_text = hasattr(cls, "config_class")  # of transformers
    surplus = sorted(key for key in info["unexpected_keys"] if not (is_text and re.search(HARMLESS, key)))
    if surplus:
        raise DataError(
            f"{folder} has {len(surplus)} weights that a {cls.__name__} of its config.json has no place for, "
            f"{surplus[0]} first: take both from one source"
        )
    if other := sorted(map(str, info.get("mismatched_keys") or ())):
        raise DataError(f"{folder} has {len(other)} weights of another shape than its config.json says, {other[0]}")


def _renaming(cls: Any) -> dict[str, Any]:
    """Lets transformers 4 read a CLIPTextModel of transformers 5, whose names have no prefix."""
    if cls.__name__ != "CLIPTextModel" or not _transformers_4():
        return {}
    return {"key_mapping": {r"^(embeddings|encoder|final_layer_norm)\.": r"text_model.\1."}}


def load_tokenizer(cls: Any, folder: Path, encoder: Any = None) -> Any:
    """A tokenizer of `cls` from a diffusers component's folder; `encoder`: the configuration of its text encoder.

    Raises DataError when it is not whole or does not fit the encoder.
    """
    check_files(cls, folder)
    settings = folder / "tokenizer_config.json"
    config = read_json(settings) if settings.is_file() else {}
    # transformers 5 writes an empty list, in place of which transformers 4 wants a mapping
    empty = _transformers_4() and config.get("extra_special_tokens") == []
    with opening(folder, cls.__name__):
        tokenizer = cls.from_pretrained(folder, **({"extra_special_tokens": {}} if empty else {}))
        check_vocabulary(tokenizer, folder, encoder)
    return tokenizer


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
    """A module of `cls` whose parameters have shapes and no values. Raises ConfigError for another class."""
    check_config(cls, folder)
    with opening(folder, cls.__name__), quiet_notices(), torch.device(META):
        return cls.from_config(cls.load_config(folder))


def read_state(path: Path) -> dict[str, Tensor]:
    """Tensors of a .safetensors file or of a .pt file (never unpickled beyond tensors), on the CPU.

    A .pt file may hold them directly or under "state_dict". Raises DataError when it is damaged or holds code.
    """
    try:
        state = load_file(bounded_file(path)) if path.suffix == ".safetensors" else _read_pickle(path)
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, SafetensorError, pickle.UnpicklingError) as error:
        raise DataError(f"{path} is damaged or holds more than tensors ({said(error)}): get it anew") from error
    inner = state.get("state_dict")
    return inner if isinstance(inner, dict) else state


def _read_pickle(path: Path) -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Detected pickle protocol")  # it is refused or read all the same
        return torch.load(path, "cpu", weights_only=True)


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
