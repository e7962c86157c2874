"""What a FLUX network costs, before any weight is loaded: FLOPs counted on an outline, a rate timed on its blocks.

FLOPs are those of matrix products, convolutions and attention, a multiplication and an addition as two.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode

from rats.pipeline.flux import FluxStudent, apply_kernels, open_outline
from rats.pipeline.loading import quiet_notices, torch_device, torch_dtype
from rats.pipeline.protocols import Conditioning
from rats.schemas.params import ComputeParams, ModelParams, TeacherParams

TIMED_SECONDS = 1.5
"""How long evaluations are timed, after a warm-up."""

SIGMA = 0.5


@torch.no_grad()
def evaluation_flops(student: FluxStudent) -> int:
    """FLOPs of one network evaluation of one sample, at the resolution and sequence length of its settings."""
    x_BTC, conditioning = _inputs(student, 1)
    with FlopCounterMode(display=False) as counter:
        student.velocity(x_BTC, SIGMA, conditioning)
    return counter.get_total_flops()


@torch.no_grad()
def decode_flops(student: FluxStudent) -> int:
    """FLOPs of decoding one picture."""
    device = next(student.vae.parameters()).device
    with FlopCounterMode(display=False) as counter:
        student.decode(torch.empty(1, *student.latent_shape(), device=device))
    return counter.get_total_flops()


def conditioning_shapes(student: FluxStudent) -> dict[str, tuple[int, ...]]:
    """Shapes of one prompt's embeddings, without the batch axis."""
    config: Any = student.network.config
    length = student.settings.max_sequence_length
    return {
        "prompt_embeds": (length, int(config.joint_attention_dim)),
        "pooled_prompt_embeds": (int(config.pooled_projection_dim),),
    }


def measured_rate(
    model: ModelParams, teacher: TeacherParams, compute: ComputeParams, seconds: float = TIMED_SECONDS
) -> float:
    """FLOP/s of this device in one block of each kind, full width, random weights, at the recipe's compute settings.

    The rest of the network is more of the same blocks. Raises ConfigError when the device is not here.
    """
    device = torch_device(compute.device)
    blocks = _blocks(model, teacher)
    flops = evaluation_flops(blocks) * compute.micro_batch
    student = _materialised(blocks, model, compute, device)
    x_BTC, conditioning = _inputs(student, compute.micro_batch)

    @torch.no_grad()
    def evaluate() -> Tensor:
        return student.velocity(x_BTC, SIGMA, conditioning)

    # torch's timer waits for the device, sets the threads and takes the median
    timer = Timer("evaluate()", globals={"evaluate": evaluate}, num_threads=compute.threads)
    timer.timeit(1)
    return flops / timer.blocked_autorange(min_run_time=seconds).median


def _blocks(model: ModelParams, teacher: TeacherParams) -> FluxStudent:
    """The outline of the model cut down to one block of each kind."""
    outline = open_outline(model, teacher)
    whole: Any = outline.network.config
    config = dict(whole) | {name: min(1, whole[name]) for name in ("num_layers", "num_single_layers")}
    with torch.device("meta"):
        network = FluxTransformer2DModel.from_config(config)
    return FluxStudent(network, outline.vae, outline.scheduler, teacher)


def _materialised(blocks: FluxStudent, model: ModelParams, compute: ComputeParams, device: torch.device) -> FluxStudent:
    """The same network with random weights where and how the recipe wants it."""
    with quiet_notices():
        network = blocks.network.to(torch_dtype(model.dtype)).to_empty(device=device).eval()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    apply_kernels(network, compute)
    return FluxStudent(network, blocks.vae, blocks.scheduler, blocks.settings)


def _inputs(student: FluxStudent, batch: int) -> tuple[Tensor, Conditioning]:
    """Latents and embeddings of the right shapes, where the network is."""
    device = next(student.network.parameters()).device
    shapes = conditioning_shapes(student)
    conditioning = {name: torch.randn(batch, *shape, device=device) for name, shape in shapes.items()}
    return torch.randn(batch, *student.latent_shape(), device=device), conditioning
