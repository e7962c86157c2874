"""What a rollout worker and a training step take of a device's memory, from configurations alone."""

from __future__ import annotations

import torch
from diffusers.training_utils import cast_training_params

from rats.pipeline.costs import conditioning_shapes
from rats.pipeline.loading import torch_dtype
from rats.pipeline.lora import add_lora
from rats.pipeline.memory import META, AsOnGpu, encoder_bytes, held, in_dtype, outline_reward, transient
from rats.pipeline.models import FamilyStudent
from rats.pipeline.opening import open_outline
from rats.pipeline.protocols import Conditioning
from rats.pipeline.weights import PIPELINE_PATTERNS, resolve
from rats.schemas.params import Params
from rats.schemas.plan import Memory
from rats.trainer.memory import Outline, step_bytes


def rollout_memory(params: Params) -> Memory:
    """Of one worker, which keeps the teacher, the text encoders and all rewards on its device.

    Encoding a prompt and scoring are left out of what comes and goes: they need less than the rest.
    """
    student = _outline(params)
    folder = resolve(params.model.path, params.model.revision, PIPELINE_PATTERNS)
    rewards = [outline_reward(reward) for reward in params.rewards]
    x_BTC, conditioning = _inputs(params, student, params.compute.micro_batch)
    AsOnGpu(student.network), AsOnGpu(student.vae)
    sampling = transient(lambda: student.velocity(x_BTC, 0.5, conditioning), student.network, student.vae)
    decoding = transient(lambda: student.decode(x_BTC), student.network, student.vae)
    states = (2 * params.teacher.steps + 1) * x_BTC.nbytes  # a solver's path: states and predictions, float32
    return Memory(
        parts={
            "network": held(student.network),
            "decoder": held(student.vae),
            "text encoders": encoder_bytes(student, folder, torch_dtype(params.model.dtype)),
            "rewards": sum(held(reward.modules) for reward in rewards),
            "sampling": max(sampling + states, decoding),
        },
        stand_ins=sum(not reward.known for reward in rewards),
    )


def train_memory(params: Params, split: bool = True) -> Memory:
    """Of a step of `params.train` on one device, nothing sharded; `split` as in `trainer.memory.Outline`."""
    train, student = params.train, _outline(params)
    if train.lora is not None:
        add_lora(student.network, train.lora, student.family.lora_targets, train.seed)
    cast_training_params(student.network, torch.float32)
    if train.gradient_checkpointing:
        student.checkpoint_activations()
    by_name = {reward.name: reward for reward in params.rewards}
    rewards = [outline_reward(by_name[name]) for name in train.reward_weights if name in by_name]
    _, conditioning = _inputs(params, student, train.micro_batch)
    half = params.model.dtype != "float32" or train.mixed_precision == "bf16"
    outline = Outline(student, rewards, conditioning, train, torch.bfloat16 if half else None, split)
    return Memory(parts=step_bytes(outline), stand_ins=sum(not reward.known for reward in rewards))


def _outline(params: Params) -> FamilyStudent:
    """The student as it is loaded, without values, and ready to be trained."""
    found, dtype = open_outline(params.model, params.teacher), torch_dtype(params.model.dtype)
    network, vae = in_dtype(found.network, dtype), in_dtype(found.vae, dtype)
    return FamilyStudent(found.family, network, vae, found.scheduler)


def _inputs(params: Params, student: FamilyStudent, count: int) -> tuple[torch.Tensor, Conditioning]:
    """Latents and embeddings of a micro-batch."""
    dtype = torch_dtype(params.model.dtype)
    shapes = conditioning_shapes(student)
    conditioning = {name: torch.empty(count, *shape, dtype=dtype, device=META) for name, shape in shapes.items()}
    return torch.empty(count, *student.latent_shape(), device=META), conditioning
