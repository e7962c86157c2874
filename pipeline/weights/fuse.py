"""Fuses LoRAs into a network for good (`model.loras`), as diffusers' `fuse_lora` does, with nothing dropped."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers.utils.logging as diffusers_logging
import torch
from safetensors import safe_open
from torch import Tensor, nn

from rats.pipeline.bounds import bounded_file
from rats.pipeline.weights.folder import FoundLora
from rats.pipeline.weights.hashes import NETWORK
from rats.pipeline.weights.opening import opening
from rats.schemas.errors import DataError, plain

ADAPTER = "fused"
LAYER = re.compile(rf"{NETWORK}\.(.+)\.lora_([AB])\.weight")
"""A tensor of a LoRA by the names that each family's pipeline converts a file's own names to."""
DORA = ("dora_scale", "lora_magnitude_vector")
"""Tensors of weight-decomposed adapters. diffusers leaves them out and draws something else."""


def fuse_loras(network: nn.Module, pipeline_class: Any, loras: Iterable[FoundLora]) -> None:
    """Adds each LoRA's change to the weights of `network`, in order, rounded to their dtype.

    On torch's meta device the files are read and compared with the network's names and shapes, and nothing is added.

    Args:
        network: Of the family's `network_class`, without adapters.
        pipeline_class: The family's, which knows the layouts that its LoRAs are published in.
        loras: Files and weights.

    Raises:
        DataError: a damaged file, or one that adapts what this network has not.
    """
    for lora in loras:
        state, alphas, metadata = _read(pipeline_class, lora.path)
        _check_layers(network, lora.path, state)
        with _loading(lora.path, "a LoRA"), torch.random.fork_rng(devices=[]):
            how = {"network_alphas": alphas or None, "metadata": metadata, "adapter_name": ADAPTER}
            network.load_lora_adapter(state, **how)  # type: ignore[operator]
            if next(network.parameters()).device.type != "meta":
                network.fuse_lora(lora_scale=lora.pinned.weight, safe_fusing=True)  # type: ignore[operator]
            network.unload_lora()  # type: ignore[operator]
        network.requires_grad_(True)  # peft has frozen it


def _read(pipeline_class: Any, path: Path) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Any] | None]:
    """Tensors, alphas and metadata by diffusers' names, from any layout that the pipeline reads."""
    with _loading(path, f"a LoRA of a {pipeline_class.__name__}"):
        with safe_open(bounded_file(path), "pt") as file:
            if parts := [name for name in file.keys() if any(part in name for part in DORA)]:  # noqa: SIM118
                raise DataError(f"{path} is a DoRA ({parts[0]}), which cannot be fused here: {_by_hand(path)}")
        place = {"weight_name": path.name, "local_files_only": True}
        wanted = {"return_alphas": True, "return_lora_metadata": True}
        state, *alphas, metadata = pipeline_class.lora_state_dict(str(path.parent), **place, **wanted)
    return state, alphas[0] if alphas else {}, metadata


def _check_layers(network: nn.Module, path: Path, state: dict[str, Tensor]) -> None:
    """Raises DataError for a tensor that is no matrix for a linear layer of the network: diffusers passes over it."""
    layers = {name: module for name, module in network.named_modules() if isinstance(module, nn.Linear)}
    for name, tensor in state.items():
        found = LAYER.fullmatch(name)
        if found is None or found[1] not in layers:
            raise DataError(
                f"{path} adapts {plain(name)}, which is no linear layer of a {type(network).__name__}: "
                f"name a LoRA of this model's transformer alone, or {_by_hand(path)}"
            )
        layer, side = layers[found[1]], found[2]
        wanted = layer.in_features if side == "A" else layer.out_features
        if tensor.ndim != 2 or tensor.shape[1 if side == "A" else 0] != wanted:
            raise DataError(
                f"{path} has {plain(name)} of shape {tuple(tensor.shape)} for a layer of {layer.in_features} to "
                f"{layer.out_features}: name a LoRA of this model"
            )
    if not state:
        raise DataError(f"{path} holds no LoRA: name a LoRA's file under model.loras")


def _by_hand(path: Path) -> str:
    return (
        f"write a pipeline with it: pipe.load_lora_weights('{path}'), pipe.fuse_lora(), pipe.unload_lora_weights(), "
        "pipe.save_pretrained(DIR), and model.path=DIR"
    )


@contextmanager
def _loading(path: Path, kind: str) -> Iterator[None]:
    """Turns diffusers' warnings and errors into one DataError: it warns of what it does not understand and goes on."""
    said: list[str] = []
    logger, verbosity = logging.getLogger("diffusers"), diffusers_logging.get_verbosity()
    handlers, logger.handlers = logger.handlers, [_Kept(said)]
    diffusers_logging.set_verbosity_warning()
    try:
        with opening(path, kind, "name a LoRA of this model"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's, that nothing is copied to the meta device
            yield
    finally:
        logger.handlers = handlers
        diffusers_logging.set_verbosity(verbosity)
    if said:
        raise DataError(f"{path} does not load whole as {kind} ({plain(said[0], 200)}): {_by_hand(path)}")


class _Kept(logging.Handler):
    """Keeps what is logged."""

    def __init__(self, said: list[str]) -> None:
        super().__init__(logging.WARNING)
        self.said = said

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a message."""
        self.said.append(record.getMessage())
