"""Device memory of a rollout worker and of a training step, from configurations alone."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from diffusers.training_utils import cast_training_params
from torch import Tensor

from rats.pipeline.families.models import FamilyStudent
from rats.pipeline.families.open import Model
from rats.pipeline.protocols import Conditioning
from rats.pipeline.rewards.base import call_reward
from rats.pipeline.weights.loading import torch_dtype
from rats.pipeline.weights.lora import add_lora
from rats.schemas.params import Params
from rats.schemas.train_params import TrainParams
from rats.stages.plan.flops import conditioning_shapes
from rats.stages.plan.meta import (
    META,
    AsOnGpu,
    LiveBytes,
    RewardOutline,
    encoder_bytes,
    in_dtype,
    module_bytes,
    outline_reward,
    tensors_of,
    transient_bytes,
)
from rats.stages.plan.result import Memory
from rats.trainer.augment import RandomDraws, augment
from rats.trainer.losses import compared, shape_loss
from rats.trainer.optim import Learner
from rats.trainer.sampling import Trajectory, rounded_as_stored, sample_trajectory


def rollout_memory(params: Params, model: Model) -> Memory:
    """Memory of one worker, which keeps the teacher, the text encoders and all rewards on its device.

    Temporary memory of encoding and scoring is left out: it is less than that of sampling.
    """
    student = _outline(model)
    rewards = [outline_reward(reward) for reward in params.rewards]
    x_BTC, conditioning = _inputs(params, student, params.compute.micro_batch)
    AsOnGpu(student.network), AsOnGpu(student.vae)
    sampling = transient_bytes(lambda: student.velocity(x_BTC, 0.5, conditioning), student.network, student.vae)
    decoding = transient_bytes(lambda: student.decode(x_BTC), student.network, student.vae)
    states = (2 * params.teacher.steps + 1) * x_BTC.nbytes  # a solver's path: states and predictions, float32
    return Memory(
        parts={
            "network": module_bytes(student.network),
            "decoder": module_bytes(student.vae),
            "text encoders": encoder_bytes(student, model.folder.root, torch_dtype(params.model.dtype)),
            "rewards": sum(module_bytes(reward.modules) for reward in rewards),
            "sampling": max(sampling + states, decoding),
        },
        stand_ins=sum(not reward.known for reward in rewards),
    )


def train_memory(params: Params, model: Model, split: bool = True) -> Memory:
    """Memory of a step of `params.train` on one device, not sharded; `split` as in `Outline`."""
    train, student = params.train, _outline(model)
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


def _outline(model: Model) -> FamilyStudent:
    """The student on the meta device, in the dtypes in which it is loaded."""
    found, dtype = copy.deepcopy(model.outline), torch_dtype(model.params.dtype)
    network, vae = in_dtype(found.network, dtype), in_dtype(found.vae, dtype)
    return FamilyStudent(found.family, network, vae, found.scheduler)


def _inputs(params: Params, student: FamilyStudent, count: int) -> tuple[torch.Tensor, Conditioning]:
    """Latents and embeddings of a micro-batch."""
    dtype = torch_dtype(params.model.dtype)
    shapes = conditioning_shapes(student)
    conditioning = {name: torch.empty(count, *shape, dtype=dtype, device=META) for name, shape in shapes.items()}
    return torch.empty(count, *student.latent_shape(), device=META), conditioning


@dataclass(frozen=True)
class Outline:
    """Everything that a training step needs, on the meta device.

    `autocast`: what the network is evaluated in where that is not its own dtype.
    """

    student: FamilyStudent
    rewards: Sequence[RewardOutline]
    conditioning: Conditioning
    train: TrainParams
    autocast: torch.dtype | None = None
    split: bool = True
    """Whether the step has a backward pass for each term: the first step has, and each that logs their gradients."""

    @property
    def slots(self) -> int:
        """Number of gradients kept for each weight."""
        return 2 if self.split else 1


def step_bytes(outline: Outline) -> dict[str, int]:
    """Bytes of a training step at `max(train.nfe)`, by their use. Their sum is the peak.

    Only one student step is run. The others keep the same bytes for the backward pass, which are added.
    """
    train, student = outline.train, outline.student
    learner = Learner(student.network, train)
    trained = sum(p.numel() * p.element_size() for p in learner.parameters)
    each, peak = _measured(outline, learner)
    gradients = outline.slots * trained
    working = peak - gradients + (max(train.nfe) - 1) * each
    return {
        "network": module_bytes(student.network),
        "decoder": module_bytes(student.vae),
        "rewards": sum(module_bytes(reward.modules) for reward in outline.rewards),
        "optimizer": 2 * trained,
        "averages": trained * (bool(train.ema) + (train.teacher.mode == "refresh")),
        "teacher": module_bytes(student.network) if train.teacher.mode == "live-ema" else 0,
        "gradients": gradients,
        "activations": max(working, trained),  # or, in the update, the square roots that AdamW makes for all weights
    }


def _measured(outline: Outline, learner: Learner) -> tuple[int, int]:
    """Bytes that one student step keeps for the backward pass, and the peak of a step of one, without weights."""
    student, train = outline.student, outline.train
    gpu, _ = AsOnGpu(student.network, outline.autocast), AsOnGpu(student.vae)
    modules = [student.network, student.vae, *(reward.modules for reward in outline.rewards)]
    x_BTC = torch.empty(train.micro_batch, *student.latent_shape(), device=META)
    with LiveBytes([*tensors_of(*modules), *outline.conditioning.values(), x_BTC]) as live:
        before = live.now
        if train.batch > train.micro_batch:
            _fill_gradients(learner, outline.split)
        start = live.now
        trajectory = sample_trajectory(student, x_BTC, (1.0, 0.0), outline.conditioning)
        whole = live.now
        cast = gpu.forget()
        once = cast - (whole - live.now)  # weights in the autocast's dtype serve all steps
        each = live.now - start - once
        _finish(outline, learner, trajectory)
        return each, live.peak - before


def _fill_gradients(learner: Learner, split: bool) -> None:
    """Makes gradients, as every micro-batch but the first finds them."""
    nothing = torch.stack([p.sum() for p in learner.parameters]).sum()
    learner.accumulate(nothing, nothing * 1, split)


def _finish(outline: Outline, learner: Learner, trajectory: Trajectory) -> None:
    """Decodes, scores with and without gradient, compares, and runs the backward pass."""
    train = outline.train
    images_B3HW = outline.student.decode(rounded_as_stored(trajectory.final))
    reward = -_scored(
        outline.rewards, augment(images_B3HW, RandomDraws(torch.Generator(), 0, train.batch), train.augment)
    )
    with torch.no_grad():
        _scored(outline.rewards, images_B3HW)
    path = compared(train.shape.space, trajectory.states, trajectory.x0s, (1.0, 0.0))
    learner.accumulate(reward, shape_loss(path, path.detach()).mean(), outline.split)


def _scored(rewards: Sequence[RewardOutline], images_B3HW: Tensor) -> Tensor:
    prompts = ["a picture"] * len(images_B3HW)
    return torch.stack(
        [images_B3HW.sum(), *(call_reward(reward, images_B3HW, prompts).sum() for reward in rewards)]
    ).sum()
