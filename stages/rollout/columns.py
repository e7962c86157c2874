"""Columns of scores, and the checks that training uses the model, decoder, grids and rewards of the rollout."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from rats.pipeline.families.open import Model
from rats.pipeline.rewards.open import reward_fingerprint
from rats.pipeline.store.scores import reward_columns, score_rows
from rats.pipeline.store.shard_set import ShardSet
from rats.pipeline.weights.hashes import NETWORK
from rats.schemas.errors import ConfigError, DataError, nearest
from rats.schemas.manifest import RewardRecord, ScoreRow, Snapshot
from rats.schemas.params import Params, RewardParams
from rats.schemas.recipe import Recipe, make_recipe
from rats.stages.rollout.scorer import reward_hashes

NOT_COMPARED = ("compute", "format_version", "solver_version")
"""Fields about where and how the teacher ran, which may differ for the student. Text encoders are not compared either:
the embeddings are in the shards."""


@dataclass(frozen=True)
class ColumnAddress:
    """The teacher's scores by one reward: their address in the shard set, and the hashes that made them."""

    address: str
    hashes: dict[str, str]


def check_recipe(params: Params, model: Model, shards: ShardSet) -> None:
    """Raise DataError, naming the first difference, when the shards were not made by `params`' model and teacher."""
    stored = shards.recipe.effective(model.outline.ignored)  # older sets name settings without effect
    here, there = (_comparable(recipe) for recipe in (_recipe(params, model), stored))
    for name, value in here.items():
        if there[name] != value:
            raise DataError(
                f"{shards.root} was made with another {name}: {_short(there[name])} there, {_short(value)} by "
                "params.yaml and model.path: run `rats stage rollout`, or name the shards of this model with --shards"
            )


def _recipe(params: Params, model: Model) -> Recipe:
    outline, scheduler = model.outline, model.folder.scheduler_hash()
    weights = {NETWORK: model.folder.hash_of(NETWORK)}
    return make_recipe(params, weights, scheduler, *outline.grids(), outline.latent_shape(), outline.ignored)


def _comparable(recipe: Recipe) -> dict[str, Any]:
    values = recipe.model_dump(mode="json", exclude={*NOT_COMPARED, "weights"})
    return {NETWORK: recipe.weights.get(NETWORK), **values}


def _short(value: Any) -> str:
    if isinstance(value, list):
        return f"{len(value)} sigmas ({', '.join(f'{sigma:.4f}' for sigma in value[:3])}...)"
    return value[:12] if isinstance(value, str) and len(value) == 64 else repr(value)


def find_column(params: Params, name: str, shards: ShardSet, vae: str) -> ColumnAddress:
    """The column of scores by the reward `name` as it is on disk now and the VAE with the hash `vae`.

    Raises:
        DataError: the shards have scores by that name, but of another reward or VAE, or have none.
    """
    reward = reward_params(params, name)
    hashes = reward_hashes(reward_fingerprint(reward), vae, params.teacher.seen_frames)
    wanted, found = RewardRecord(name=name, hashes=hashes), reward_columns(shards)
    if wanted.fingerprint in found:
        return ColumnAddress(wanted.fingerprint, hashes)
    others = [record for record in found.values() if record.name == name]
    rescore = "run `rats stage rollout`, which scores again without the teacher"
    if not others:
        known = nearest(name, {record.name for record in found.values()})
        raise DataError(f"{shards.root} has no scores by {name!r}{known}: {rescore}")
    stored = others[-1].hashes
    part = next((part for part in stored | hashes if stored.get(part) != hashes.get(part)), "reward")
    there, here = (values.get(part, "none")[:12] for values in (stored, hashes))
    raise DataError(f"{shards.root} was scored with another {part}: {there} there, {here} here: {rescore}")


def reward_params(params: Params, name: str) -> RewardParams:
    """The reward block of that name, or a ConfigError with the nearest."""
    found = {reward.name: reward for reward in params.rewards}
    if name not in found:
        raise ConfigError(f"train.reward = {name!r} is no reward{nearest(name, found)}")
    return found[name]


log = logging.getLogger(__name__)

RETRY = "mend the reward, then `rats stage score --retry-failed`"


def column_hashes(params: Params, vae: str) -> dict[str, dict[str, str]]:
    """The hashes that decide each reward's column, by reward name. Reads and hashes the rewards' files only."""
    frames = params.teacher.seen_frames
    return {reward.name: reward_hashes(reward_fingerprint(reward), vae, frames) for reward in params.rewards}


def check_failed(
    shards: ShardSet, columns: Mapping[str, str], snapshot: Snapshot, wanted: Collection[str], max_bad: float
) -> int:
    """How many stored scores of the `wanted` keys have failed, over all columns (reward name -> fingerprint).

    Raises:
        DataError: a reward failed on more than `max_bad` of them, with the first error's text.
    """
    failed = 0
    for name, column in columns.items():
        # reversed, so that of a key in two shards the first shard counts
        tars = sorted(snapshot.shards.items(), reverse=True)
        tables = shards.root.concurrently(partial(_scored, shards, column), tars)
        rows = {row.key: row for table in tables for row in table}
        bad = [rows[key] for key in sorted(wanted) if rows[key].status == "failed"]
        check_share(name, bad, len(wanted), max_bad)
        failed += len(bad)
    return failed


def _scored(shards: ShardSet, column: str, tar: tuple[str, str]) -> list[ScoreRow]:
    """The scores of a shard and the hash of its tar."""
    return score_rows(shards, column, *tar)


def check_share(name: str, bad: Sequence[ScoreRow], total: int, max_bad: float) -> None:
    """Warn about failed scores; DataError when they are more than the share `max_bad` of the `total`."""
    if not bad:
        return
    what = f"reward {name!r} failed on {len(bad)} of {total} samples ({100 * len(bad) / total:.3g} %)"
    first = f"first, {bad[0].key}: {bad[0].error}"
    if len(bad) > max_bad * total:
        raise DataError(f"{what}, at most {100 * max_bad:.3g} % may (--max-bad); {first}; {RETRY}")
    log.warning("%s and passes over them; %s; to have them: %s", what, first, RETRY)
