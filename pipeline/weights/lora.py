"""Low-rank adapters (peft) of a diffusers transformer: added, saved, and loaded back with nothing dropped.

The file is what `pipe.load_lora_weights` reads: `pytorch_lora_weights.safetensors`, with the adapters' rank, alpha
and targets as metadata. `export_lora` writes them for loaders that read no metadata.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from diffusers.training_utils import cast_training_params
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from rats.pipeline.bounds import bounded_file
from rats.pipeline.weights.hashes import NETWORK
from rats.pipeline.weights.movement import Movement
from rats.schemas.errors import ConfigError, DataError, reason
from rats.schemas.train_params import LoraParams

WEIGHTS = "pytorch_lora_weights.safetensors"
COMFYUI = "comfyui.safetensors"
ADAPTER = "default"
PREFIX = f"{NETWORK}."
"""Of every name in the file: the component that is adapted, as every family's pipeline calls it."""
FIELDS = ("r", "lora_alpha", "rank_pattern", "target_modules")
"""Fields of LoraConfig that the file holds. Not all of them: other releases of peft refuse fields that they lack."""


def add_lora(network: nn.Module, lora: LoraParams, targets: Sequence[str], seed: int) -> None:
    """Freezes `network` and adds trainable float32 adapters, which do not change its output yet.

    Args:
        network: A diffusers transformer, changed in place.
        lora: Rank, alpha and, in place of `targets`, names of its own.
        targets: The family's list: ends of module names, such as "attn.to_q".
        seed: Of the adapters' first weights; the global generators are left as they are.

    Raises:
        ConfigError: a target that names no module, or one without a low-rank form.
    """
    wanted = tuple(lora.targets or targets)
    _check_targets(network, wanted)
    config = LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=[*wanted], init_lora_weights="gaussian")  # type: ignore[arg-type]
    try:
        _inject(network, config, seed)
    except ValueError as error:
        raise ConfigError(f"train.lora.targets: peft cannot adapt {', '.join(wanted)} ({reason(error)})") from None


def is_lora(folder: Path) -> bool:
    """Whether a student's folder holds adapters, and not a whole network."""
    return (folder / WEIGHTS).is_file()


def save_lora(network: nn.Module, folder: Path) -> None:
    """Write the adapters' file into `folder`, a temporary one: `pipeline.files.atomic.atomic_folder`."""
    config = network.peft_config[ADAPTER].to_dict()  # type: ignore[index, union-attr]
    about = {name: config[name] for name in FIELDS}
    about["target_modules"] = sorted(config["target_modules"])  # a set: its order is the process's
    _write(_layers(network), about, folder)


def export_lora(student: Path, folder: Path, comfyui_name: Callable[[str], str]) -> None:
    """Writes a student's adapters into `folder` so that every loader draws at their full strength.

    alpha / rank is multiplied into B, and alpha is the rank wherever it is said: a loader that knows no alpha takes
    the strength 1. `WEIGHTS` is for diffusers, `COMFYUI`, with an `.alpha` tensor beside each adapter, for others. One
    file cannot serve both: each family's loader in diffusers refuses `.alpha` tensors beside metadata.

    Args:
        student: The folder of a run's student.
        folder: Where to write; made if it does not exist.
        comfyui_name: ComfyUI's name of a module, of its name in the network (`Family.comfyui_name`).

    Raises:
        DataError: a damaged file.
    """
    state, about = _read(student)
    folded = {name: _folded(name, state, about["lora_alpha"]) for name in state}
    _write(folded, about | {"lora_alpha": about["r"]}, folder)
    renamed = {}
    for name, tensor in folded.items():
        module, side = name.split(".lora_")
        renamed[f"{comfyui_name(module)}.lora_{side}"] = tensor
        renamed[f"{comfyui_name(module)}.alpha"] = torch.tensor(float(_rank(module, folded)))
    save_file(renamed, folder / COMFYUI)


def shortened_lora(weights: Mapping[str, Tensor], length: float) -> dict[str, Tensor]:
    """Adapters whose update is `length` times as long: every B is multiplied, since the update is B A."""
    return {name: tensor * length if ".lora_B." in name else tensor for name, tensor in weights.items()}


def load_lora(network: nn.Module, folder: Path) -> None:
    """Loads the adapters in `folder` into a network without adapters, in float32 and frozen.

    Raises:
        DataError: a damaged file; adapters for modules that the network lacks, or none for modules that the file's own
            metadata names.
    """
    state, about = _read(folder)
    try:
        _inject(network, LoraConfig(**about), seed=0)
    except (TypeError, ValueError) as error:
        raise DataError(
            f"{folder / WEIGHTS} does not fit this network ({reason(error)}): name the model of its run"
        ) from None
    expected = {name: tuple(tensor.shape) for name, tensor in _layers(network).items()}
    _check_keys(folder / WEIGHTS, {name: tuple(tensor.shape) for name, tensor in state.items()}, expected)
    set_peft_model_state_dict(network, state, adapter_name=ADAPTER)
    network.requires_grad_(False)


@torch.no_grad()
def merge_lora(network: nn.Module) -> float:
    """Merges the adapters into the network's weights, rounded to their dtype, and removes them.

    Returns the share of the adapters' change that is left after the rounding (`pipeline.weights.movement`).
    """
    movement = Movement()
    layers: list[Any] = [module for module in network.modules() if isinstance(module, LoraLayer)]
    for layer in layers:
        weight = layer.get_base_layer().weight
        start, change = weight.clone(), layer.get_delta_weight(ADAPTER)
        layer.merge(safe_merge=True)
        movement.add(start, start + change.float(), layer.get_base_layer().weight)
    network.unload_lora()  # type: ignore[operator]
    return movement.share


def _write(state: dict[str, Tensor], about: dict[str, Any], folder: Path) -> None:
    """The file that diffusers reads, of tensors and metadata by the network's own names."""
    text = json.dumps({f"{PREFIX}{name}": value for name, value in about.items()}, sort_keys=True)
    folder.mkdir(parents=True, exist_ok=True)
    named = {f"{PREFIX}{name}": tensor for name, tensor in state.items()}
    save_file(named, folder / WEIGHTS, {LORA_ADAPTER_METADATA_KEY: text})  # one key: with two the bytes vary


def _folded(name: str, state: dict[str, Tensor], alpha: float) -> Tensor:
    """One tensor with the strength in it, if it is a B."""
    module, side = name.split(".lora_")
    return state[name] * (alpha / _rank(module, state)) if side.startswith("B") else state[name]


def _rank(module: str, state: dict[str, Tensor]) -> int:
    """A has a row for each."""
    return len(state[f"{module}.lora_A.weight"])


def _inject(network: nn.Module, config: LoraConfig, seed: int) -> None:
    """Adds the adapters. peft freezes all other parameters."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # peft draws on the CPU
        network.add_adapter(config, ADAPTER)  # type: ignore[operator]
    cast_training_params(network, torch.float32)


def _layers(network: nn.Module) -> dict[str, Tensor]:
    """The adapters' tensors by name, without the adapter's own name in it."""
    return get_peft_model_state_dict(network, adapter_name=ADAPTER)


def _check_targets(network: nn.Module, targets: Iterable[str]) -> None:
    """Raises ConfigError for a target that names no module: peft ignores it if another target fits."""
    names = [name for name, _ in network.named_modules()]
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in names):
            raise ConfigError(f"train.lora.targets: no module of {type(network).__name__} is named '{target}'")


def _read(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and metadata, by the names that the network gives them."""
    try:
        with safe_open(bounded_file(folder / WEIGHTS), "pt") as file:
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            about = json.loads((file.metadata() or {}).get(LORA_ADAPTER_METADATA_KEY, "{}"))
    except (OSError, ValueError, SafetensorError) as error:
        raise DataError(f"{folder / WEIGHTS} is damaged ({reason(error)}): train or export it again") from None
    if not about:
        raise DataError(f"{folder / WEIGHTS} does not say its rank, alpha and targets: use one that rats has written")
    named = {name.removeprefix(PREFIX): tensor for name, tensor in state.items()}
    return named, {name.removeprefix(PREFIX): value for name, value in about.items()}


def _check_keys(path: Path, found: dict[str, tuple[int, ...]], expected: dict[str, tuple[int, ...]]) -> None:
    """Raises DataError unless both sides have the same names and shapes."""
    for name in sorted(found.keys() | expected.keys()):
        if name not in expected:
            raise DataError(f"{path} adapts {name}, which this network has not: name the model of its run")
        if name not in found:
            raise DataError(f"{path} lacks {name}, which its own metadata names: train or export it again")
        if found[name] != expected[name]:
            raise DataError(f"{path} has {name} of shape {found[name]}, this network takes {expected[name]}")
