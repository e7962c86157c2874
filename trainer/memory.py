"""Memory of a training step before it is taken: the step's own code on tensors without values.

B samples, N student steps, T latent tokens, C channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rats.pipeline.ask import ask
from rats.pipeline.memory import META, AsOnGpu, Live, RewardOutline, held, tensors_of
from rats.pipeline.models import FamilyStudent
from rats.pipeline.pixels import Draws, augment
from rats.pipeline.protocols import Conditioning
from rats.schemas.train_params import TrainParams
from rats.trainer.losses import compared, shape_loss
from rats.trainer.optim import Learner
from rats.trainer.sampling import Trajectory, rounded, sample


@dataclass(frozen=True)
class Outline:
    """What a step is taken with, all of it on the meta device.

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
        """Gradients that are kept of each weight."""
        return 2 if self.split else 1


def step_bytes(outline: Outline) -> dict[str, int]:
    """Bytes of a step at `max(train.nfe)`, by what they are; their sum is the most at once.

    Of student steps one is taken, and what the others keep for the backward pass is added: they are alike.
    """
    train, student = outline.train, outline.student
    learner = Learner(student.network, train)
    trained = sum(p.numel() * p.element_size() for p in learner.parameters)
    each, peak = _measured(outline, learner)
    gradients = outline.slots * trained
    working = peak - gradients + (max(train.nfe) - 1) * each
    return {
        "network": held(student.network),
        "decoder": held(student.vae),
        "rewards": sum(held(reward.modules) for reward in outline.rewards),
        "optimizer": 2 * trained,
        "averages": trained * (bool(train.ema) + (train.teacher.mode == "refresh")),
        "teacher": held(student.network) if train.teacher.mode == "live-ema" else 0,
        "gradients": gradients,
        "activations": max(working, trained),  # or, in the update, the square roots that AdamW makes for all weights
    }


def _measured(outline: Outline, learner: Learner) -> tuple[int, int]:
    """What one student step keeps, and the most at once of a step of one evaluation, beside what is held all along."""
    student, train = outline.student, outline.train
    gpu, _ = AsOnGpu(student.network, outline.autocast), AsOnGpu(student.vae)
    modules = [student.network, student.vae, *(reward.modules for reward in outline.rewards)]
    x_BTC = torch.empty(train.micro_batch, *student.latent_shape(), device=META)
    with Live([*tensors_of(*modules), *outline.conditioning.values(), x_BTC]) as live:
        before = live.now
        if train.batch > train.micro_batch:
            _fill_gradients(learner, outline.split)
        start = live.now
        trajectory = sample(student, x_BTC, (1.0, 0.0), outline.conditioning)
        whole = live.now
        cast = gpu.forget()
        once = cast - (whole - live.now)  # weights in the autocast's dtype serve all steps
        each = live.now - start - once
        _finish(outline, learner, trajectory)
        return each, live.peak - before


def _fill_gradients(learner: Learner, split: bool) -> None:
    """Every micro-batch but the first finds the gradients of those before it."""
    nothing = torch.stack([p.sum() for p in learner.parameters]).sum()
    learner.accumulate(nothing, nothing * 1, split)


def _finish(outline: Outline, learner: Learner, trajectory: Trajectory) -> None:
    """Decode, score with gradient and without, compare, and walk back."""
    train = outline.train
    images_B3HW = outline.student.decode(rounded(trajectory.final))
    reward = -_scored(outline.rewards, augment(images_B3HW, Draws(torch.Generator(), 0, train.batch), train.augment))
    with torch.no_grad():
        _scored(outline.rewards, images_B3HW)
    path = compared(train.shape.space, trajectory.states, trajectory.x0s, (1.0, 0.0))
    learner.accumulate(reward, shape_loss(path, path.detach()).mean(), outline.split)


def _scored(rewards: Sequence[RewardOutline], images_B3HW: Tensor) -> Tensor:
    prompts = ["a picture"] * len(images_B3HW)
    return torch.stack([images_B3HW.sum(), *(ask(reward, images_B3HW, prompts).sum() for reward in rewards)]).sum()
