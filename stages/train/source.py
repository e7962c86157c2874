"""The data of a training run: shards, their scores, and the settings that depend on them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from rats.pipeline.families.open import Model
from rats.pipeline.files.places import Place
from rats.pipeline.store.scores import read_scores
from rats.pipeline.store.shard_set import ShardSet
from rats.schemas.canonical import canonical_json, sha256
from rats.schemas.errors import ConfigError
from rats.schemas.manifest import Snapshot
from rats.schemas.params import Params
from rats.schemas.recipe import DECODER
from rats.schemas.train_params import TrainParams
from rats.stages.rollout.columns import ColumnAddress, check_recipe, find_column
from rats.trainer.checkpoint import RunIdentity
from rats.trainer.gate import OF_TAU, WeightedReward, score_std, spread, weighted_sum
from rats.trainer.objective import Settings

Scores = dict[str, tuple[float, ...]]

NOT_IN_SETTINGS = (
    *("steps", "checkpoint_every", "checkpoints_total_limit", "log_gradients_every", "max_bad"),
    *("micro_batch", "gradient_checkpointing", "compile", "fsdp", "loader_workers"),
    *("guard", "samples_every", "trackers", "save_dtype", "update_length"),
)
"""Fields that may differ when a run goes on: they do not change the mathematics of a step."""
ROUNDING = ("micro_batch", "log_gradients_every", "compile", "fsdp")
"""Those of them that change the order of a sum, and so its last bits."""
RESOLVED = ("tau", "value", "value_from")
"""Fields of the gate that count by what they were resolved to."""
NEWER = {"lr_schedule": "constant", "lr_steps": None}
"""Fields that checkpoints of some time ago lack, which were trained with these values: left out where they are."""
OLDER = (
    *("nfe", "batch", "micro_batch", "lr", "warmup", "alpha", "reward", "reward_weight", "margin", "last_k", "augment"),
    *("clip_norm", "ema", "seed", "log_gradients_every", "gate", "shape", "teacher", "lora", "black_box"),
    *("mixed_precision", "gradient_checkpointing", "compile", "fsdp"),
)
"""What rats 0.1 hashed, whose checkpoints do not hold the settings themselves."""


@dataclass(frozen=True)
class Source:
    """One snapshot of a shard set, and the teacher's scores by each reward that trains."""

    shards: ShardSet
    snapshot: Snapshot
    columns: dict[str, ColumnAddress]
    scores: Scores
    """Scores by key, in the order of `columns`. A sample on which one of the rewards failed is left out."""
    followed: Scores
    """What the gate takes for R_T: the same, or the means over the noises of each prompt (`gate.teacher_reward`)."""


def open_source(
    params: Params, model: Model, chosen: TrainParams, folder: Place, snapshot_number: int | None = None
) -> Source:
    """Opens shards and checks them against model and rewards. Takes the snapshot of that number, else the newest."""
    shards = ShardSet.open(folder)
    check_recipe(params, model, shards)
    snapshot = shards.snapshot(snapshot_number if snapshot_number in shards.snapshots() else None)
    vae = model.folder.hash_of(DECODER)
    columns = {name: find_column(params, name, shards, vae) for name in chosen.reward_weights}
    rows = {row.key: row for row in shards.index(snapshot)}
    tables = [read_scores(shards, column.address, set(rows)) for column in columns.values()]
    complete = [key for key in tables[0] if all(key in table for table in tables)]
    scores = {key: tuple(table[key] for table in tables) for key in complete}
    followed = scores
    if chosen.gate.teacher_reward == "prompt":
        followed = prompt_means(scores, {key: rows[key].prompt_id for key in complete})
    return Source(shards, snapshot, columns, scores, followed)


def prompt_means(scores: Scores, prompts: Mapping[str, str]) -> Scores:
    """Replaces the scores of each sample by their mean over its prompt's noises, so that R_T has less noise."""
    groups: dict[str, list[tuple[float, ...]]] = {}
    for key, values in scores.items():
        groups.setdefault(prompts[key], []).append(values)
    means = {prompt: tuple(fmean(column) for column in zip(*values, strict=True)) for prompt, values in groups.items()}
    return {key: means[prompts[key]] for key in scores}


def read_settings(chosen: TrainParams, source: Source) -> Settings:
    """The variant's settings with tau, the rewards' units and the gate's constant filled in.

    Units and tau are spreads of the samples' own scores, whatever the gate takes for R_T.

    With `gate.tau: gap` tau is NaN until it is measured on the untrained student, or taken from a checkpoint.
    """
    parts, tau = reward_parts(chosen, source.scores), chosen.gate.tau
    if tau == "gap" and chosen.gate.form in OF_TAU:
        tau = math.nan
    elif tau is None or tau == "gap":
        tau = _default_tau(chosen, source.scores, parts)
    return Settings(chosen, source.shards.recipe.horizons, tau, gate_value(chosen), parts)


def _default_tau(chosen: TrainParams, scores: Scores, parts: tuple[WeightedReward, ...]) -> float:
    if chosen.gate.each and len(parts) > 1:
        return 1.0  # each reward is in units of its spread already
    scores_RB = torch.tensor(list(scores.values()), dtype=torch.float64).reshape(-1, len(parts)).T
    # a gate without tau needs none, whatever the scores are
    return (score_std if chosen.gate.form in OF_TAU else spread)(weighted_sum(scores_RB, parts).tolist())


def reward_parts(chosen: TrainParams, scores: Scores) -> tuple[WeightedReward, ...]:
    """Weight and unit of each reward. A single reward keeps its unit; several are each divided by their spread."""
    weights = chosen.reward_weights
    if len(weights) == 1:
        return (WeightedReward(next(iter(weights))),)
    columns = zip(*scores.values(), strict=True)
    way_out = "leave that reward out of train.reward"
    return tuple(
        WeightedReward(name, weight, score_std(column, f"the teacher's {name}", way_out))
        for (name, weight), column in zip(weights.items(), columns, strict=True)
    )


def gate_value(chosen: TrainParams) -> float | None:
    """The constant gate: `gate.value`, or the mean that the gate had in the run `gate.value_from`."""
    gate = chosen.gate
    if gate.form != "constant" or gate.value is not None:
        return gate.value
    if gate.value_from is None:
        raise ConfigError("gate.form is constant and has no value: set train.gate.value or train.gate.value_from")
    path = Path(gate.value_from) / "run.json"
    try:
        value = json.loads(path.read_text())["gate_mean"]
        return float(value)
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ConfigError(f"gate.value_from: {path} gives no gate_mean ({reason}): train that run first") from None


def identify(settings: Settings, source: Source) -> RunIdentity:
    """What two runs must share for one to go on where the other stopped."""
    values = settings_values(settings, source.columns)
    hashed = sha256(canonical_json(values))
    # as it comes back from a checkpoint: lists for tuples, names for numbers
    return RunIdentity(source.snapshot.hash, source.shards.fingerprint, hashed, json.loads(canonical_json(values)))


def settings_values(settings: Settings, columns: Mapping[str, ColumnAddress]) -> dict[str, Any]:
    """What decides a step, by the names of `params.yaml`; the gate's tau and value as they were resolved."""
    left_out = {name for name, default in NEWER.items() if getattr(settings.train, name) == default}
    train = settings.train.model_dump(mode="json", exclude=left_out | set(NOT_IN_SETTINGS))
    train["gate"] |= {"tau": _tau(settings), "value": settings.gate_value}
    del train["gate"]["value_from"]
    addresses = {name: column.address for name, column in columns.items()}
    return {"train": train, "horizons": settings.horizons, "scores": addresses}


def older_hash(settings: Settings, columns: Mapping[str, ColumnAddress]) -> str:
    """The hash that rats 0.1 gave these settings."""
    parts = settings.train.model_dump(mode="json", include=set(OLDER), exclude={"gate": set(RESOLVED)})
    parts |= {"tau": _tau(settings), "gate_value": settings.gate_value, "horizons": settings.horizons}
    return sha256(canonical_json(parts | {"columns": {name: column.address for name, column in columns.items()}}))


def _tau(settings: Settings) -> float | str:
    return "gap" if settings.train.gate.tau == "gap" else settings.tau
