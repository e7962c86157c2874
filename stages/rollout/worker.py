"""The part of a rollout that runs on a worker: samples a shard with the teacher, then scores the stored latents.

A task is one shard. The worker writes shards and scores itself and returns counts, never tensors.
Shapes: B samples, H kept horizons, T latent tokens, C channels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from rats.pipeline.families.models import FamilyDecoder, FamilyTeacher
from rats.pipeline.files.places import Place
from rats.pipeline.machine import refuse_other, threads
from rats.pipeline.noise import noise
from rats.pipeline.protocols import Conditioning, Teacher
from rats.pipeline.solver import euler
from rats.pipeline.store.embeddings import has_embedding, read_embedding, write_embedding
from rats.pipeline.store.shard_set import ShardSet
from rats.pipeline.store.shards import as_stored, write_shard
from rats.schemas.horizons import rows_of
from rats.schemas.maker import Software
from rats.schemas.manifest import PlannedSample, ShardDone, ShardPlan
from rats.schemas.params import Params
from rats.stages.rollout.scorer import Scorer, batches, missing_columns
from rats.stages.workers.tasks import ShardBusy, ShardTask, TaskResult, claimed


@dataclass(frozen=True, kw_only=True)
class RolloutTask(ShardTask):
    """A shard with something missing: samples, embeddings, or scores of some columns (reward name -> fingerprint)."""

    plan: ShardPlan
    columns: dict[str, str]


@dataclass(frozen=True)
class RolloutSetup:
    """What a worker needs to load its models, and the driver's software. It can be pickled."""

    params: Params
    root: Place
    driver: Software

    def __call__(self) -> RolloutModels:
        """The worker's models. Raises ConfigError if this worker's software would give other bytes."""
        models = RolloutModels(self.params, ShardSet.open(self.root))
        refuse_other(self.driver, models.maker)
        return models


class RolloutModels(Scorer):
    """A worker's models. Each is loaded once, by the first task that needs it."""

    def __init__(self, params: Params, shards: ShardSet) -> None:
        """Loads nothing yet."""
        super().__init__(params, shards)
        self.teacher_forwards = 0

    @cached_property
    def teacher(self) -> FamilyTeacher:
        """The teacher. Its weights are checked against the recipe; a hook counts the forward calls of its network."""
        self.model.folder.check(self.shards.recipe.weights)
        teacher = self.model.open_teacher()
        teacher.network.register_forward_hook(self._count)
        return teacher

    @cached_property
    def decoder(self) -> FamilyDecoder:
        """The teacher's decoder if the teacher is loaded, else the VAE alone."""
        if "teacher" in self.__dict__:
            return self.teacher
        return self.model.open_decoder()

    def _count(self, *_: Any) -> None:
        self.teacher_forwards += 1


def do_task(context: RolloutModels, task: RolloutTask) -> TaskResult | ShardBusy:
    """Makes one shard's missing embeddings and samples, then its missing scores from the stored latents."""
    before = context.teacher_forwards
    with claimed(context.shards, task.shard, task.wait) as mine, threads(context.params.compute.threads):
        if not mine:
            return ShardBusy(task.shard)
        done = context.shards.done(task.shard)
        if done is None:
            context.open_rewards(task.columns)  # one that does not load is found before the teacher runs
        encode_prompts(context, task.plan)
        done = done or _made(context, task.plan)
        scored = context.score(done, missing_columns(context.shards, done, task.columns))
    return TaskResult(len(done.rows), context.teacher_forwards - before, scored)


def encode_prompts(context: RolloutModels, plan: ShardPlan) -> None:
    """Writes missing embeddings, also those of a finished shard."""
    prompts = {sample.prompt_id: sample.prompt for sample in plan.samples}
    for prompt_id, prompt in prompts.items():
        if not has_embedding(context.shards, prompt_id):
            embedding = context.teacher.encode([prompt])
            write_embedding(context.shards, prompt_id, {name: value[0] for name, value in embedding.items()})


def _made(context: RolloutModels, plan: ShardPlan) -> ShardDone:
    """Samples and writes one shard. Its tar's bytes depend on the recipe and the samples' identities alone."""
    samples = _samples(context.teacher, context.shards, plan.samples)
    return write_shard(context.shards, plan, samples, context.maker)


def _samples(
    teacher: Teacher, shards: ShardSet, samples: Sequence[PlannedSample]
) -> Iterator[tuple[PlannedSample, dict[str, np.ndarray]]]:
    """The samples in order, each with its kept rows. The network gets full micro-batches only."""
    recipe = shards.recipe
    rows = rows_of(recipe.sigmas, recipe.horizons)
    for batch, count in batches(samples, recipe.compute.micro_batch):
        x_BHTC, x0_BHTC = _trajectories(teacher, shards, batch, rows)
        for sample, x, x0 in zip(batch[:count], x_BHTC, x0_BHTC, strict=False):
            yield sample, {"x": x, "x0": x0}


@torch.no_grad()
def _trajectories(
    teacher: Teacher, shards: ShardSet, batch: Sequence[PlannedSample], rows: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    """States (B, H, T, C) and predicted clean latents (B, H - 1, T, C) at the kept rows, as stored."""
    recipe = shards.recipe
    starts = [noise(recipe.seed, sample.prompt_id, sample.noise_index, recipe.latent_shape) for sample in batch]
    device = next(teacher.network.parameters()).device
    conditioning = _conditioning(shards, batch, device)
    states, x0s = euler(
        lambda x, sigma: teacher.guided_velocity(x, sigma, conditioning), torch.stack(starts).to(device), recipe.sigmas
    )
    return _stack(states, rows), _stack(x0s, rows[:-1])


def _conditioning(shards: ShardSet, batch: Sequence[PlannedSample], device: torch.device) -> Conditioning:
    """The stored embeddings, which the student will get as well."""
    read = [read_embedding(shards, sample.prompt_id) for sample in batch]
    return {name: torch.stack([part[name] for part in read]).to(device) for name in read[0]}


def _stack(tensors: Sequence[torch.Tensor], rows: Sequence[int]) -> np.ndarray:
    return as_stored(torch.stack([tensors[row] for row in rows], dim=1)).cpu().numpy()
