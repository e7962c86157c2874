"""Shard sets that hold what a rollout would write: the recipe's noise, embeddings, scores; and such sets exported."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from rats.pipeline.noise import noise
from rats.pipeline.store.embeddings import has_embedding, write_embedding
from rats.pipeline.store.scores import record_reward, write_scores
from rats.pipeline.store.shard_set import ShardSet
from rats.pipeline.store.shards import SampleArrays, write_shard
from rats.schemas.manifest import PlannedSample, ScoreRow, ShardPlan
from rats.stages.shards.card import LicenseTerms
from rats.stages.shards.exchange import export_set
from tests.support.shards import latents, params, recipe_of, wanted

TERMS = LicenseTerms(license="apache-2.0", teacher="a toy", title="Toy | trajectories")
HASHES = {"reward": "d" * 64, "vae": "b" * 64}


def arrays(shards: ShardSet, sample: PlannedSample) -> dict[str, np.ndarray]:
    """Random states after the sample's own noise."""
    found = latents(sample, len(shards.recipe.horizons))
    start = noise(shards.recipe.seed, sample.prompt_id, sample.noise_index, found["x"].shape[1:])
    found["x"][0] = start.numpy().astype(np.float16)
    return found


def fill(shards: ShardSet, plan: ShardPlan) -> list[SampleArrays]:
    """A shard's samples."""
    return [(sample, arrays(shards, sample)) for sample in plan.samples]


def roll(store: Path, samples: Sequence[PlannedSample] | None = None, shard_samples: int = 4) -> ShardSet:
    """A set with these samples rolled out, encoded and scored (noise 1 of prompt 0 fails), and one snapshot of them."""
    shards = ShardSet.open_or_create(store, recipe_of(params()))
    samples = wanted() if samples is None else list(samples)
    reward = record_reward(shards, "hps", HASHES)
    for sample in samples:
        if not has_embedding(shards, sample.prompt_id):
            write_embedding(shards, sample.prompt_id, {"context": torch.arange(3.0) + len(sample.prompt)})
    for plan in shards.plan(samples, shard_samples):
        write_shard(shards, plan, fill(shards, plan))
        write_scores(shards, reward, plan.shard, [score_of(sample) for sample in plan.samples])
    shards.write_snapshot(sample.key for sample in samples)
    return shards


def score_of(sample: PlannedSample) -> ScoreRow:
    """A number that depends on the sample alone, or a failure."""
    if sample.prompt.endswith("thing 0") and sample.noise_index == 1:
        return ScoreRow(key=sample.key, score=None, status="failed", error="not finite")
    return ScoreRow(key=sample.key, score=int(sample.key[:6], 16) / 2**24 + sample.noise_index)


def export(folder: Path, samples: Sequence[PlannedSample] | None = None, shard_samples: int = 4) -> Path:
    """An exported folder of `roll`."""
    shards = roll(folder / "source", samples, shard_samples)
    export_set(shards.root, folder / "out", TERMS)
    return folder / "out"
