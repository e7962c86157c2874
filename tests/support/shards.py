"""Small real shard sets for tests: random latents, everything else as a rollout writes it."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from pathlib import Path

import numpy as np
import torch

from rats.pipeline.prompts import Prompt, planned_samples
from rats.pipeline.store.embeddings import has_embedding, write_embedding
from rats.pipeline.store.scores import record_reward, write_scores
from rats.pipeline.store.shard_set import ShardSet
from rats.pipeline.store.shards import SampleArrays, read_sample, write_shard
from rats.schemas.horizons import aligned
from rats.schemas.manifest import IndexRow, PlannedSample, ScoreRow, ShardPlan, Snapshot
from rats.schemas.params import Params
from rats.schemas.recipe import Recipe, make_recipe
from rats.trainer.data import row_at

TOKENS, CHANNELS = 4, 8
HORIZONS = 15
"""Sigmas of the unshifted grids of 3, 5 and 8 steps."""


def params(**teacher: object) -> Params:
    """The least a file can say."""
    values = {"model": {"path": "m"}, "prompts": {"train": "p.txt"}, "train": {"reward": "hps"}, "teacher": teacher}
    return Params.model_validate(values)


def grid(steps: int) -> list[float]:
    """The unshifted stock grid."""
    return [1.0 - i / steps for i in range(steps)] + [0.0]


def recipe_of(settings: Params) -> Recipe:
    """A recipe as rollout makes it, for hashes that are made up."""
    teacher = settings.teacher
    sigmas, horizons = aligned(grid, teacher.steps, teacher.nfe, teacher.horizons)
    return make_recipe(
        settings, {"transformer": "a" * 64, "vae": "b" * 64}, "c" * 64, sigmas, horizons, (TOKENS, CHANNELS)
    )


def wanted(prompts: int = 5, noises: int = 2) -> list[PlannedSample]:
    """Samples of prompts 0, 1, 2..."""
    return planned_samples([Prompt(f"a picture of thing {i}", f"thing {i}") for i in range(prompts)], noises)


def latents(sample: PlannedSample, horizons: int) -> dict[str, np.ndarray]:
    """Random arrays that depend on the sample alone."""
    random = np.random.default_rng(int(sample.key[:8], 16) + sample.noise_index)
    x = random.standard_normal((horizons, TOKENS, CHANNELS)).astype(np.float16)
    return {"x": x, "x0": x[1:] / 2}


def fill(shards: ShardSet, plan: ShardPlan) -> list[SampleArrays]:
    """What a teacher would hand to the writer."""
    return [(sample, latents(sample, len(shards.recipe.horizons))) for sample in plan.samples]


def write_set(store: Path, samples: list[PlannedSample] | None = None, shard_samples: int = 4) -> ShardSet:
    """A set with these samples written and one snapshot of them."""
    shards = ShardSet.open_or_create(store, recipe_of(params()))
    write_samples(shards, wanted() if samples is None else samples, shard_samples)
    return shards


def write_samples(shards: ShardSet, samples: list[PlannedSample], shard_samples: int = 4) -> Snapshot:
    """Plan, write and snapshot."""
    for plan in shards.plan(samples, shard_samples):
        write_shard(shards, plan, fill(shards, plan))
    return shards.write_snapshot(sample.key for sample in samples)


def embed(shards: ShardSet, samples: list[PlannedSample]) -> None:
    """The embeddings of the samples' prompts, in two dtypes."""
    for prompt in sorted({sample.prompt_id for sample in samples}):
        if not has_embedding(shards, prompt):
            tensors = {"context": torch.ones(3, 2, dtype=torch.bfloat16), "pooled": torch.arange(4.0)}
            write_embedding(shards, prompt, tensors)


def score(shards: ShardSet, name: str = "hps") -> str:
    """A column of scores for every finished shard; returns its fingerprint."""
    reward = record_reward(shards, name, {"reward": "d" * 64, "vae": "b" * 64})
    for plan in shards.plans():
        write_scores(shards, reward, plan.shard, [ScoreRow(key=s.key, score=s.noise_index / 2) for s in plan.samples])
    return reward


def in_order(
    shards: ShardSet, snapshot: Snapshot, seed: int, position: int = 0
) -> Iterator[tuple[IndexRow, dict[str, np.ndarray]]]:
    """A snapshot's samples in training order, without end."""
    rows = shards.index(snapshot)
    for place in count(position):
        row = rows[row_at(seed, len(rows), place)]
        yield row, read_sample(shards, row)
