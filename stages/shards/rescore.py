"""`rats shards verify --rescore N`: computes some samples' noise, embedding and scores again, and compares.

Hashes and seals show damage. They do not show a lie, since whoever writes a lie can seal it. This does, for the samples
that are drawn. docs/design.md#what-seals-promise says what is left.
"""

from __future__ import annotations

import logging
import random
import secrets
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rats.pipeline.files.places import Place
from rats.pipeline.machine import threads
from rats.pipeline.store.embeddings import read_embedding
from rats.pipeline.store.shard_set import ShardSet
from rats.schemas.errors import DataError
from rats.schemas.manifest import IndexRow, RewardRecord, ScoreRow
from rats.schemas.params import Params
from rats.schemas.recipe import DECODER
from rats.stages.rollout.columns import column_hashes
from rats.stages.rollout.rollout import pin_params
from rats.stages.rollout.score import as_made
from rats.stages.rollout.scorer import Scorer, score_rows_of
from rats.stages.shards.describe import ScoreColumn, read_columns
from rats.stages.shards.untrusted import check_sample

log = logging.getLogger(__name__)

WAY_OUT = "do not train on this set: make it again in another store, or ask whoever wrote it"

EMBEDDING_TOLERANCE = {torch.float32: 1e-3, torch.float16: 0.02, torch.bfloat16: 0.05}
"""The largest norm of a tensor's difference, in units of the stored tensor's norm; other dtypes must be equal.

On one machine and software the difference is 0. Other kernels add some roundings of the dtype in each layer.
"""

SCORE_TOLERANCE = 0.05
"""The largest difference of a score, in units of its column's interquartile range, which few lies cannot widen."""

SCORE_ROUNDING = 1e-4
"""Added to it: a share of the score itself, for columns whose scores are almost equal."""


def rescore(folder: Place, params: Params, count: int, seed: int | None = None) -> dict[str, Any]:
    """Draws samples of the newest snapshot, computes what can be computed without the teacher, and compares.

    For each: its key is that of its prompt and noise index; it starts from its noise (to 0.01); its prompt's embedding
    is what the text encoders give; its stored final latent has the stored scores, by every reward of `params`.

    Args:
        folder: A shard set or a published folder.
        params: Name the model, the rewards and the device. The rest is taken from the set's recipe.
        count: How many samples, at most all.
        seed: Draws them. None: a new one, so that nobody knows beforehand what is looked at.

    Returns:
        `rescored`, the number of samples; `seed`; `rewards_compared`; `rewards_not_compared`, which `params` do not
        have, or have with other weights.

    Raises:
        DataError: with the number of samples that differ, and the first of them. Each one is a line in the log.
        ConfigError: no model of this set where the parameters say.
    """
    shards = ShardSet.open(folder)
    index = shards.index(shards.snapshot())
    seed = secrets.randbelow(2**32) if seed is None else seed
    rows = sorted(random.Random(seed).sample(index, min(count, len(index))), key=lambda row: row.key)
    params, _ = pin_params(as_made(params, shards.recipe))
    scorer = Scorer(params, shards)
    scorer.model.folder.check(shards.recipe.weights)
    known, others = _columns(scorer, index)
    log.info("%d of %d samples are computed again (seed %d)", len(rows), len(index), seed)
    with threads(params.compute.threads):
        wrong = [*_wrong_samples(shards, rows), *_wrong_embeddings(scorer, rows)]
        for column in known:
            wrong += _wrong_scores(scorer, rows, column)
    for text in wrong:
        log.error("%s", text)
    if wrong:
        raise DataError(
            f"{shards.root}: {len(wrong)} findings in {len(rows)} samples (seed {seed}), first: {wrong[0]}", WAY_OUT
        )
    names, unknown = ([column.name for column in columns] for columns in (known, others))
    return {"rescored": len(rows), "seed": seed, "rewards_compared": names, "rewards_not_compared": unknown}


def _columns(scorer: Scorer, index: Sequence[IndexRow]) -> tuple[list[ScoreColumn], list[ScoreColumn]]:
    """The columns that the parameters can compute again, and the others."""
    hashes = column_hashes(scorer.params, scorer.model.folder.hash_of(DECODER))
    ours = {RewardRecord(name=name, hashes=parts).fingerprint for name, parts in hashes.items()}
    columns = read_columns(scorer.shards, index)
    return [one for one in columns if one.fingerprint in ours], [one for one in columns if one.fingerprint not in ours]


def _wrong_samples(shards: ShardSet, rows: Sequence[IndexRow]) -> Iterator[str]:
    for row in rows:
        try:
            check_sample(shards, row)
        except DataError as error:
            yield error.what


def _wrong_embeddings(scorer: Scorer, rows: Sequence[IndexRow]) -> Iterator[str]:
    text = scorer.model.open_text()
    for prompt_id, prompt in {row.prompt_id: row.prompt for row in rows}.items():
        made = {name: value[0].cpu() for name, value in text.encode([prompt]).items()}
        stored = read_embedding(scorer.shards, prompt_id)
        if stored.keys() != made.keys():
            yield f"the embedding of {prompt!r} has {sorted(stored)}, not {sorted(made)}"
        elif wrong := [name for name in made if not is_near(stored[name], made[name])]:
            yield f"the embedding of {prompt!r} is not what the text encoders give ({wrong[0]})"


def is_near(stored: Tensor, made: Tensor) -> bool:
    """Whether two tensors are one, up to `EMBEDDING_TOLERANCE`; of other dtypes, whether they are equal."""
    if (stored.dtype, stored.shape) != (made.dtype, made.shape):
        return False
    tolerance = EMBEDDING_TOLERANCE.get(stored.dtype)
    if tolerance is None:
        return torch.equal(stored, made)
    return bool((stored.double() - made.double()).norm() <= tolerance * stored.double().norm())


def _wrong_scores(scorer: Scorer, rows: Sequence[IndexRow], column: ScoreColumn) -> Iterator[str]:
    there = [row for row in rows if row.key in column.rows]
    reward = scorer.reward(column.name, column.fingerprint)
    made = score_rows_of(scorer.shards, there, reward, scorer.decoder, scorer.params.compute.micro_batch)
    quarters = np.quantile(list(column.scores.values()) or [0.0], (0.25, 0.75))
    for row in made:
        stored = column.rows[row.key]
        if not is_score(stored, row, float(quarters[1] - quarters[0])):
            yield f"sample {row.key} has {column.name} {_told(stored)}, its stored latent has {_told(row)}"


def is_score(stored: ScoreRow, made: ScoreRow, spread: float) -> bool:
    """Whether two scores are one, up to `SCORE_TOLERANCE` of the `spread` and `SCORE_ROUNDING`; or both failed."""
    if stored.score is None or made.score is None:
        return stored.score is made.score
    return abs(stored.score - made.score) <= SCORE_TOLERANCE * spread + SCORE_ROUNDING * abs(made.score)


def _told(row: ScoreRow) -> str:
    return "failed" if row.score is None else f"{row.score:.6g}"
