"""The cost of a network before weights are loaded: FLOPs are counted on the meta device, the rate is timed on blocks.

FLOPs are those of matrix products, convolutions and attention; a multiply-add counts as two.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode

from rats.pipeline.families.models import FamilyStudent
from rats.pipeline.families.open import Model
from rats.pipeline.protocols import Conditioning
from rats.pipeline.weights.loading import apply_kernels, quiet_notices, torch_device, torch_dtype

TIMED_SECONDS = 1.5
"""How long evaluations are timed, after a warm-up."""

SIGMA = 0.5


@torch.no_grad()
def evaluation_flops(student: FamilyStudent) -> int:
    """FLOPs of one network evaluation of one sample, at the resolution and sequence length of its settings."""
    x_BTC, conditioning = _inputs(student, 1)
    with FlopCounterMode(display=False) as counter:
        student.velocity(x_BTC, SIGMA, conditioning)
    return counter.get_total_flops()


@torch.no_grad()
def decode_flops(student: FamilyStudent) -> int:
    """FLOPs of decoding one picture."""
    device = next(student.vae.parameters()).device
    with FlopCounterMode(display=False) as counter:
        student.decode(torch.empty(1, *student.latent_shape(), device=device))
    return counter.get_total_flops()


def conditioning_shapes(student: FamilyStudent) -> dict[str, tuple[int, ...]]:
    """Shapes of one prompt's embeddings, without the batch axis."""
    return student.family.conditioning_shapes(student.network.config)


def measured_rate(model: Model, seconds: float = TIMED_SECONDS) -> float:
    """FLOP/s of this device in one block of each kind, full width, random weights, at the recipe's compute settings.

    The rest of the network consists of more such blocks. Raises ConfigError if this machine has no such device.
    """
    compute = model.compute
    device = torch_device(compute.device)
    blocks = _blocks(model)
    flops = evaluation_flops(blocks) * compute.micro_batch
    student = _materialised(blocks, model, device)
    x_BTC, conditioning = _inputs(student, compute.micro_batch)

    @torch.no_grad()
    def evaluate() -> Tensor:
        return student.velocity(x_BTC, SIGMA, conditioning)

    # torch's timer waits for the device, sets the threads and takes the median
    timer = Timer("evaluate()", globals={"evaluate": evaluate}, num_threads=compute.threads)
    timer.timeit(1)
    return flops / timer.blocked_autorange(min_run_time=seconds).median


def _blocks(model: Model) -> FamilyStudent:
    """The outline of the model cut down to one block of each kind."""
    outline = model.outline
    whole: Any = outline.network.config
    config = dict(whole) | {name: min(1, whole[name]) for name in outline.family.depth}
    with torch.device("meta"):
        network = outline.family.network_class.from_config(config)
    return FamilyStudent(outline.family, network, outline.vae, outline.scheduler)


def _materialised(blocks: FamilyStudent, model: Model, device: torch.device) -> FamilyStudent:
    """The same network with random weights, on the device and in the dtype of the recipe."""
    # built again: `to_empty` leaves tensors that are no buffers (Qwen-Image's rotary tables) on the meta device
    with quiet_notices(), device:
        network: Any = type(blocks.network).from_config(blocks.network.config)
        network = network.to(torch_dtype(model.params.dtype)).eval()
    apply_kernels(network, model.compute)
    return FamilyStudent(blocks.family, network, blocks.vae, blocks.scheduler)


def _inputs(student: FamilyStudent, batch: int) -> tuple[Tensor, Conditioning]:
    """Latents and embeddings of the right shapes, where the network is."""
    device = next(student.network.parameters()).device
    shapes = conditioning_shapes(student)
    conditioning = {name: torch.randn(batch, *shape, device=device) for name, shape in shapes.items()}
    return torch.randn(batch, *student.latent_shape(), device=device), conditioning
