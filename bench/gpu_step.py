"""A LoRA step of stage two on FLUX.1-dev with random weights, for bench.gpu: its time, its parts, its memory."""

from __future__ import annotations

import tempfile
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import torch

from bench.gpu_models import PROMPT, Size, open_random_student, random_conditioning
from bench.harness import UNSPLIT_EVERY, fresh_run, timed
from rats.pipeline.families.models import FamilyStudent
from rats.pipeline.protocols import Reward
from rats.pipeline.weights.loading import torch_dtype
from rats.schemas.horizons import aligned
from rats.schemas.params import ComputeParams
from rats.schemas.train_params import LoraParams, TrainParams
from rats.trainer.data import Sample
from rats.trainer.distributed import Accelerated
from rats.trainer.loop import one_step
from rats.trainer.methods import METHODS
from rats.trainer.objective import Objective, Settings


class Stream:
    """The same sample again and again: random states at the horizons that a rollout keeps."""

    position = 0

    def __init__(self, student: FamilyStudent, horizons: int) -> None:
        """Float16, as the store keeps them."""
        draw = torch.Generator().manual_seed(2)
        x_HTC = torch.randn(horizons, *student.latent_shape(), generator=draw).half()
        conditioning = {name: value[0].cpu() for name, value in random_conditioning(student, 1).items()}
        self._sample = Sample("a", PROMPT, x_HTC, x_HTC[1:], conditioning, (0.2,))

    def take(self) -> list[Sample]:
        """A batch of one."""
        self.position += 1
        return [self._sample]


class Clock:
    """Seconds by what was called, the device waited for before and after each call."""

    def __init__(self) -> None:
        """Nothing yet."""
        self.seconds: dict[str, float] = defaultdict(float)

    def watched(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, its time added up under `name`."""

        def call(*arguments: Any) -> Any:
            results = []
            self.seconds[name] += timed(lambda: results.append(function(*arguments))).wall
            return results[0]

        return call


def train_settings(nfe: int) -> TrainParams:
    """The paper's step of one sample: LoRA, gradient checkpointing, the reward through all steps, augmentation."""
    chosen = {"nfe": (nfe,), "batch": 1, "micro_batch": 1, "reward": "hpsv2", "gradient_checkpointing": True}
    return TrainParams(**chosen, lora=LoraParams(), log_gradients_every=UNSPLIT_EVERY)


def measure_step(size: Size, nfe: int, device: str, reward: Reward, repeats: int) -> dict[str, Any]:
    """Median seconds of a step of one sample after one that warms up, and the parts of one more, clocked."""
    train = train_settings(nfe)
    student = open_random_student(size, train, ComputeParams(device=device))
    horizons = aligned(student.stock_sigmas, size.steps, (nfe,), "nfe")[1]
    half = torch_dtype(size.dtype) if size.dtype != "float32" else None
    settings, ranks = Settings(train, tuple(horizons), tau=1.0), Accelerated(device, half)
    stream, clock = Stream(student, len(horizons)), Clock()
    objective = Objective(student, [reward], settings, ranks, METHODS["rats"])
    watched = replace(objective, student=_clocked(student, clock), rewards=[_clocked_reward(reward, clock)])
    with tempfile.TemporaryDirectory() as folder:
        run = fresh_run(objective, Path(folder))
        first = timed(lambda: one_step(objective, stream, run)).wall
        seconds = median(timed(lambda: one_step(objective, stream, run)).wall for _ in range(repeats))
        total = timed(lambda: one_step(watched, stream, run)).wall
    parts = {**clock.seconds, "backward, optimizer": total - sum(clock.seconds.values())}
    trained = sum(p.numel() for p in student.network.parameters() if p.requires_grad)
    return {"nfe": nfe, "seconds": seconds, "first_seconds": first, "parts": parts, "trained_parameters": trained}


def _clocked(student: FamilyStudent, clock: Clock) -> Any:
    return SimpleNamespace(
        network=student.network,
        stock_sigmas=student.stock_sigmas,
        velocity=clock.watched("network forward", student.velocity),
        decode=clock.watched("decode", student.decode),
    )


def _clocked_reward(reward: Reward, clock: Clock) -> Any:
    names = {"name": reward.name, "fingerprint": reward.fingerprint}
    return SimpleNamespace(**names, score=clock.watched("reward", reward.score))
