"""FLUX.1-dev and HPS v2 with random weights, at full size or tiny: what bench.gpu measures.

Configurations are those of the published models; nothing is read from a hub. Weights are drawn where they are used.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.training_utils import cast_training_params
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel

from mini.formats import open_clip_state
from mini.tokenizers import clip_tokenizer, save_clip
from rats.pipeline.families.flux import Flux
from rats.pipeline.families.models import FamilyStudent, FamilyTeacher
from rats.pipeline.protocols import Conditioning
from rats.pipeline.rewards.hpsv2 import VIT_H_14, HPSv2, clip_config
from rats.pipeline.weights.loading import apply_kernels, quiet_notices, torch_dtype
from rats.pipeline.weights.lora import add_lora
from rats.schemas.params import ComputeParams, TeacherParams
from rats.schemas.train_params import TrainParams
from rats.stages.plan.flops import conditioning_shapes, evaluation_flops

PROMPT = "a small weathered lighthouse"
SCHEDULER = {"shift": 3.0, "use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15}
SCHEDULER |= {"base_image_seq_len": 256, "max_image_seq_len": 4096}


@dataclass(frozen=True)
class Size:
    """A model's architecture and what is asked of it."""

    network: Mapping[str, Any]
    vae: Mapping[str, Any]
    clip: dict[str, Any]
    """open_clip's `model_cfg`."""
    dtype: str
    pixels: tuple[int, ...]
    """The rollout's; a training step is at the first."""
    steps: int
    length: int
    """Text tokens of the sequence embedding."""
    matrix: int
    """Side of the matrices whose product tells the card's rate."""


FULL = Size(
    network={"in_channels": 64, "num_layers": 19, "num_single_layers": 38, "attention_head_dim": 128}
    | {"num_attention_heads": 24, "joint_attention_dim": 4096, "pooled_projection_dim": 768}
    | {"guidance_embeds": True, "axes_dims_rope": (16, 56, 56)},
    vae={"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "norm_num_groups": 32}
    | {"latent_channels": 16, "scaling_factor": 0.3611, "shift_factor": 0.1159, "sample_size": 1024}
    | {"use_quant_conv": False, "use_post_quant_conv": False},
    clip=VIT_H_14,
    dtype="bfloat16",
    pixels=(512, 1024),
    steps=50,
    length=512,
    matrix=8192,
)
TINY = Size(
    network={"in_channels": 16, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16}
    | {"num_attention_heads": 2, "joint_attention_dim": 16, "pooled_projection_dim": 16}
    | {"guidance_embeds": True, "axes_dims_rope": (4, 6, 6)},
    vae={"block_out_channels": (8, 8, 8), "layers_per_block": 1, "norm_num_groups": 4}
    | {"latent_channels": 4, "scaling_factor": 0.3611, "shift_factor": 0.1159, "sample_size": 16}
    | {"use_quant_conv": False, "use_post_quant_conv": False},
    clip={
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
        "text_cfg": {"context_length": 8, "vocab_size": 4096, "width": 32, "heads": 2, "layers": 2},
    },
    dtype="float32",
    pixels=(16, 32),
    steps=10,
    length=8,
    matrix=256,
)


def teacher_settings(size: Size, pixels: int) -> TeacherParams:
    """FLUX.1-dev's own: 50 steps, embedded guidance 3.5, no classifier-free guidance."""
    return TeacherParams(steps=size.steps, max_sequence_length=size.length, height=pixels, width=pixels)


def open_random(size: Size, pixels: int, compute: ComputeParams) -> tuple[FamilyTeacher, int]:
    """A frozen teacher without text encoders, the same weights each time, and FLOPs of one evaluation of one sample."""
    dtype, settings = torch_dtype(size.dtype), teacher_settings(size, pixels)
    with torch.device("meta"):
        network = Flux.network_class.from_config(dict(size.network))
        vae = Flux.vae_class.from_config(_vae_config(size))
    family, scheduler = Flux(settings, vae), FlowMatchEulerDiscreteScheduler.from_config(SCHEDULER)
    flops = evaluation_flops(FamilyStudent(family, network, vae, scheduler))
    parts = [_drawn(module, dtype, compute.device) for module in (network, vae)]
    apply_kernels(parts[0], compute)
    return FamilyTeacher(family, *parts, scheduler, text=None), flops


def open_random_student(size: Size, train: TrainParams, compute: ComputeParams) -> FamilyStudent:
    """What `stages.train.train.open_trainable` gives, with random weights: adapters in float32 on a frozen network."""
    student, _ = open_random(size, size.pixels[0], compute)
    if train.lora is not None:
        add_lora(student.network, train.lora, student.family.lora_targets, train.seed)
    cast_training_params(student.network, torch.float32)
    if train.gradient_checkpointing:
        student.checkpoint_activations()
    return student


def open_random_hpsv2(size: Size, folder: Path, device: str) -> HPSv2:
    """Written into `folder` as a checkpoint in open_clip's format, and opened by the adapter."""
    tokenizer = clip_tokenizer([PROMPT], size.clip["text_cfg"]["context_length"])
    torch.manual_seed(0)
    with torch.device(device):
        model = CLIPModel(CLIPConfig.from_dict(clip_config(size.clip)))
    save_clip(tokenizer, folder)
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in open_clip_state(model).items()}
    del model  # the adapter's own takes its place on the device
    save_file(state, folder / "open_clip_model.safetensors")
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": size.clip, "preprocess_cfg": {}}))
    return HPSv2(folder, device=device)


def random_conditioning(student: FamilyStudent, batch: int) -> Conditioning:
    """Standard normal embeddings in the network's shapes, dtype and place, the same each time."""
    device, dtype = student.network.device, student.network.dtype
    draw = torch.Generator(device).manual_seed(1)
    drawn = {n: torch.randn(batch, *s, generator=draw, device=device) for n, s in conditioning_shapes(student).items()}
    return {name: value.to(dtype) for name, value in drawn.items()}


def _vae_config(size: Size) -> dict[str, Any]:
    depth = len(size.vae["block_out_channels"])
    return dict(size.vae) | {
        "down_block_types": ("DownEncoderBlock2D",) * depth,
        "up_block_types": ("UpDecoderBlock2D",) * depth,
    }


def _drawn(outline: nn.Module, dtype: torch.dtype, device: str) -> nn.Module:
    """The outlined module with weights: of variance 1 / inputs, so that what goes in comes out at the same scale."""
    with quiet_notices():
        module = outline.to(dtype).to_empty(device=device).eval()
    draw = torch.Generator(device).manual_seed(0)
    for name, parameter in module.named_parameters():
        _draw(parameter.data, name, draw)
    return module


def _draw(weight: Tensor, name: str, draw: torch.Generator) -> None:
    if weight.ndim > 1:
        weight.normal_(std=1 / math.sqrt(math.prod(weight.shape[1:])), generator=draw)
    else:
        weight.fill_(0.0 if name.endswith("bias") else 1.0)
