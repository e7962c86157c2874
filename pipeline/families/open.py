"""Opening what a stage needs of a model, and no more: the family says which classes, the folder has the weights."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn

from rats.pipeline.families.base import Family
from rats.pipeline.families.models import FamilyDecoder, FamilyStudent, FamilyTeacher, FamilyText
from rats.pipeline.weights.hashes import network_folder, read_json
from rats.pipeline.weights.hub import DECODER_PATTERNS, PIPELINE_PATTERNS, resolve
from rats.pipeline.weights.loading import (
    existing_component,
    load_component,
    load_tokenizer,
    outline_component,
    quiet_notices,
)
from rats.pipeline.weights.lora import add_lora, is_lora, load_lora
from rats.schemas.errors import ConfigError, brief
from rats.schemas.params import ComputeParams, ModelParams, TeacherParams
from rats.schemas.plugins import FAMILIES, found, load_plugin
from rats.schemas.train_params import LoraParams

ATTENTION = {"sdpa": "native"}
"""`compute.attention` in diffusers' words."""


def family_class(model: ModelParams) -> type[Family]:
    """The class that `model.family` names. Raises ConfigError when it cannot be imported."""
    cls: type[Family] = load_plugin(FAMILIES, model.family)
    return cls


def open_student(
    model: ModelParams,
    teacher: TeacherParams,
    compute: ComputeParams,
    transformer: Path | None = None,
    lora: LoraParams | None = None,
    seed: int = 0,
) -> FamilyStudent:
    """Loads transformer, VAE and scheduler of the pipeline at `model.path`, and no text encoder.

    `transformer` names a trained student's folder: its whole network in place of the pipeline's, or adapters for that
    one. The network can be trained; with `lora` only new adapters can, whose first weights follow from `seed`.
    """
    student = FamilyStudent(*_load_parts(_folder(model), model, teacher, compute, transformer))
    if lora is not None:
        add_lora(student.network, lora, student.family.lora_targets, seed)
    return student


def open_teacher(model: ModelParams, teacher: TeacherParams, compute: ComputeParams) -> FamilyTeacher:
    """Loads the whole pipeline at `model.path`, frozen."""
    folder = _folder(model)
    parts = _load_parts(folder, model, teacher, compute, None)
    return FamilyTeacher(*parts, _load_text(parts[0], folder, model, compute))


def open_decoder(model: ModelParams, teacher: TeacherParams, compute: ComputeParams) -> FamilyDecoder:
    """Loads the VAE; nothing else of the model has to be there."""
    folder, cls = _folder(model, DECODER_PATTERNS), family_class(model)
    vae = load_component(cls.vae_class, folder / "vae", model, compute)
    return FamilyDecoder(cls(teacher, vae), vae)


def open_text(model: ModelParams, teacher: TeacherParams, compute: ComputeParams) -> FamilyText:
    """Loads the text encoders of the pipeline at `model.path`, and nothing else."""
    folder, cls = _folder(model), family_class(model)
    family = cls(teacher, outline_component(cls.vae_class, folder / "vae"))
    return _load_text(family, folder, model, compute)


def open_live_teacher(
    student: FamilyStudent, model: ModelParams, teacher: TeacherParams, compute: ComputeParams
) -> FamilyTeacher:
    """A teacher of the student's decoder and a copy of its network as it is now, guided as `teacher` says.

    The text encoders are loaded for the negative prompt alone, where there is guidance against one, and let go.
    """
    family = type(student.family)(teacher, student.vae)
    text = _load_text(family, _folder(model), model, compute) if teacher.true_cfg_scale > 1 else None
    network = copy.deepcopy(student.network)
    apply_kernels(network, compute)
    live = FamilyTeacher(family, network, student.vae, student.scheduler, text)
    live.forget_encoders()
    return live


def open_outline(model: ModelParams, teacher: TeacherParams) -> FamilyStudent:
    """Loads no weights at all: enough for `latent_shape` and `stock_sigmas`."""
    folder, cls = _folder(model), family_class(model)
    network = outline_component(cls.network_class, network_folder(folder, model.transformer))
    vae = outline_component(cls.vae_class, folder / "vae")
    return FamilyStudent(cls(teacher, vae), network, vae, open_scheduler(cls, folder))


def rebuilt_network(model: ModelParams, weights: dict[str, Tensor], lora: LoraParams | None) -> nn.Module:
    """A network with these trained weights (CPU tensors by name), to be saved; `lora`: they are its adapters.

    What trains cannot be saved as it is: it may be sharded, and in float32 where `model.dtype` is not. On the CPU, for
    the device is full.
    """
    cls, folder = family_class(model), network_folder(_folder(model), model.transformer)
    network: nn.Module = load_component(cls.network_class, folder, model, ComputeParams(device="cpu"))
    if lora is not None:
        add_lora(network, lora, cls.lora_targets, seed=0)  # all of them are replaced
    network.load_state_dict(weights, strict=lora is None)
    return network


def open_scheduler(family: type[Family], folder: Path) -> FlowMatchEulerDiscreteScheduler:
    """The scheduler of a pipeline's folder, as the family samples by it."""
    return family.scheduler(read_json(existing_component(folder / "scheduler") / "scheduler_config.json"))


def apply_kernels(network: Any, compute: ComputeParams) -> None:
    """The recipe's attention and compilation, whatever the environment (DIFFUSERS_ATTN_BACKEND) asks for."""
    with quiet_notices():
        network.set_attention_backend(ATTENTION[compute.attention])
    if compute.compile:
        network.compile()


def fitting_family(index: Mapping[str, Any]) -> str | None:
    """The installed family that draws as the pipeline of a model_index.json, None if there is none."""
    for name in found(FAMILIES):
        try:
            cls: type[Family] = load_plugin(FAMILIES, name)
        except ConfigError:  # what cannot be imported here fits nobody here
            continue
        if cls.pipeline_class.__name__ == index.get("_class_name"):
            return name
    return None


def _folder(model: ModelParams, patterns: Sequence[str] = PIPELINE_PATTERNS) -> Path:
    """The model's folder, whose model_index.json, if there is one, is of a pipeline that the family draws as."""
    folder = resolve(model.path, model.revision, patterns)
    if (path := folder / "model_index.json").is_file():
        _check_index(model, read_json(path))
    return folder


def _check_index(model: ModelParams, index: Mapping[str, Any]) -> None:
    cls, name = family_class(model), index.get("_class_name")
    if name not in (None, cls.pipeline_class.__name__):
        fitting = fitting_family(index)
        way_out = f"set model.family: {fitting}" if fitting else "name a pipeline of an installed family (rats doctor)"
        drawn = f"model.family {model.family} draws as a {cls.pipeline_class.__name__}"
        raise ConfigError(f"{model.path} is a {brief(name)}, and {drawn}: {way_out}")
    cls.check_index(index)


def _load_parts(
    folder: Path, model: ModelParams, teacher: TeacherParams, compute: ComputeParams, transformer: Path | None
) -> tuple[Family, nn.Module, nn.Module, FlowMatchEulerDiscreteScheduler]:
    """What settings can be wrong about is checked before the network loads."""
    cls = family_class(model)
    vae, scheduler = load_component(cls.vae_class, folder / "vae", model, compute), open_scheduler(cls, folder)
    family = cls(teacher, vae)
    network = _load_network(cls, network_folder(folder, model.transformer), model, compute, transformer)
    apply_kernels(network, compute)
    return family, network, vae, scheduler


def _load_network(
    cls: type[Family], base: Path, model: ModelParams, compute: ComputeParams, student: Path | None
) -> Any:
    """The base, a student's whole network in its place, or the base with a student's adapters."""
    if student is None or not is_lora(student):
        return load_component(cls.network_class, student or base, model, compute)
    network = load_component(cls.network_class, base, model, compute)
    load_lora(network, student)
    return network


def _load_text(family: Family, folder: Path, model: ModelParams, compute: ComputeParams) -> FamilyText:
    parts = {name: load_component(cls, folder / name, model, compute) for name, cls in family.encoders.items()}
    tokenizers = {name: load_tokenizer(cls, folder / name) for name, cls in family.tokenizers.items()}
    return FamilyText(family, parts | tokenizers)
