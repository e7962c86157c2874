"""Scores of the stored finals. Rollout and back-fill both score what is on disk, so they agree."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from rats.pipeline.protocols import Reward, Student
from rats.pipeline.reader import read_sample
from rats.pipeline.store import ShardSet
from rats.schemas.manifest import IndexRow, ScoreRow, ShardDone

SCORING_VERSION = "1"
"""Raised when the way from a stored final to a score changes: every column of scores gets a new address."""

Item = TypeVar("Item")


def reward_hashes(reward_fingerprint: str, vae: str) -> dict[str, str]:
    """What decides a column of scores: the reward with its preprocessing, the decoder, and how they are joined."""
    return {"reward": reward_fingerprint, "vae": vae, "scoring": SCORING_VERSION}


def batches(items: Sequence[Item], size: int) -> Iterator[tuple[list[Item], int]]:
    """Batches that are always full, the last one by repeating its last item, and how many of each count.

    A network's last bits depend on the batch size, so every sample meets the same one.
    """
    for start in range(0, len(items), size):
        batch = list(items[start : start + size])
        yield batch + batch[-1:] * (size - len(batch)), len(batch)


@torch.no_grad()
def score_finals(
    decoder: Student, reward: Reward, finals: Sequence[Tensor], prompts: Sequence[str], size: int
) -> Tensor:
    """Scores (B,), float32 on the CPU, of clean latents (T, C) against their prompts, `size` at a time."""
    scores = []
    for batch, count in batches(list(zip(finals, prompts, strict=True)), size):
        latents, texts = zip(*batch, strict=True)
        pictures = decoder.decode(torch.stack(latents).to(_device(decoder)))
        scores.append(reward.score(pictures, list(texts))[:count].float().cpu())
    return torch.cat(scores)


def score_shard(shards: ShardSet, done: ShardDone, reward: Reward, column: str, decoder: Student, size: int) -> int:
    """Score a finished shard into `column`; a score that is not finite is kept as a failed row.

    Returns how many failed.
    """
    finals = [torch.from_numpy(read_sample(shards, row)["x"][-1].astype(np.float32)) for row in done.rows]
    scores = score_finals(decoder, reward, finals, [row.prompt for row in done.rows], size)
    rows = [_row(row, float(score)) for row, score in zip(done.rows, scores, strict=True)]
    shards.write_scores(column, done.shard, rows)
    return sum(row.status == "failed" for row in rows)


def _row(row: IndexRow, score: float) -> ScoreRow:
    if np.isfinite(score):
        return ScoreRow(key=row.key, score=score)
    return ScoreRow(key=row.key, score=None, status="failed", error=f"the score is {score}")


def _device(decoder: Student) -> torch.device:
    """Where the decoder's pictures are made; outlines without weights have none of their own."""
    vae = getattr(decoder, "vae", None)
    return next((vae if vae is not None else decoder.network).parameters()).device
