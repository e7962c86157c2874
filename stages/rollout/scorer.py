"""Scores stored final latents. `rats stage rollout` and `rats stage score` both use this code, so they agree."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from rats.pipeline.families.models import FamilyDecoder
from rats.pipeline.families.open import Model
from rats.pipeline.files.places import Place
from rats.pipeline.machine import maker, refuse_other, threads
from rats.pipeline.protocols import Decoder, Reward
from rats.pipeline.rewards.base import FATAL_ERRORS, call_reward
from rats.pipeline.rewards.open import open_reward
from rats.pipeline.store.scores import reward_columns, score_rows, scores_done, write_scores
from rats.pipeline.store.shard_set import ShardSet
from rats.pipeline.store.shards import read_sample
from rats.schemas.errors import ConfigError, DataError, one_line
from rats.schemas.maker import Software
from rats.schemas.manifest import IndexRow, ScoreRow, ShardDone
from rats.schemas.params import Params
from rats.stages.workers.tasks import ShardBusy, ShardTask, TaskResult, claimed

log = logging.getLogger(__name__)

SCORING_VERSION = "1"
"""Increased when the computation from a stored final latent to a score changes. All columns get new addresses."""

Item = TypeVar("Item")


@dataclass(frozen=True)
class SampleScore:
    """A reward's answer for one sample: a finite score, or None and the reason."""

    score: float | None
    error: str | None = None


def reward_hashes(reward_fingerprint: str, vae: str, frames: int) -> dict[str, str]:
    """The hashes that decide a column of scores: reward with preprocessing, decoder, and this code's version.

    `frames`: how many frames of a sample are scored (`TeacherParams.seen_frames`). One frame, of a picture, is left
    out, so that older columns keep their addresses.
    """
    hashes = {"reward": reward_fingerprint, "vae": vae, "scoring": SCORING_VERSION}
    return hashes | ({"scored_frames": str(frames)} if frames > 1 else {})


def batches(items: Sequence[Item], size: int) -> Iterator[tuple[list[Item], int]]:
    """Full batches, and how many items of each are real: the last batch is filled by repeating its last item.

    A network's last bits depend on the batch size, so every sample must see the same one.
    """
    for start in range(0, len(items), size):
        batch = list(items[start : start + size])
        yield batch + batch[-1:] * (size - len(batch)), len(batch)


@torch.no_grad()
def score_finals(
    decoder: Decoder, reward: Reward, finals: Sequence[Tensor], prompts: Sequence[str], size: int
) -> list[SampleScore]:
    """A verdict for each clean latent (T, C), float32, against its prompt, `size` at a time."""
    verdicts: list[SampleScore] = []
    for batch, count in batches(list(zip(finals, prompts, strict=True)), size):
        latents, texts = zip(*batch, strict=True)
        verdicts += score_images(reward, decoder.decode(torch.stack(latents)), list(texts), count)
    return verdicts


def score_images(reward: Reward, images_B3HW: Tensor, prompts: list[str], count: int) -> list[SampleScore]:
    """Verdicts for the first `count` pictures. If the batch raises, only pictures that raise by themselves fail.

    They are then scored one by one, in a full batch of copies: with the same batch size, scores keep their last bits.
    """
    try:
        return _score_batch(reward, images_B3HW, prompts)[:count]
    except FATAL_ERRORS:
        raise
    except Exception as error:
        log.debug("%s failed on a batch of %d, now one by one: %s", reward.name, len(prompts), error)
    return [_score_one(reward, images_B3HW, prompts[i], i) for i in range(count)]


def _score_one(reward: Reward, images_B3HW: Tensor, prompt: str, i: int) -> SampleScore:
    size = len(images_B3HW)
    try:
        full = images_B3HW[i : i + 1].repeat(size, *(1 for _ in images_B3HW.shape[1:]))
        return _score_batch(reward, full, [prompt] * size)[i]
    except FATAL_ERRORS:
        raise
    except Exception as error:
        return SampleScore(None, one_line(error))


def _score_batch(reward: Reward, images_B3HW: Tensor, prompts: list[str]) -> list[SampleScore]:
    values = call_reward(reward, images_B3HW, prompts).float().cpu().tolist()
    return [SampleScore(s) if math.isfinite(s) else SampleScore(None, f"the score is not finite ({s})") for s in values]


def score_rows_of(
    shards: ShardSet, rows: Sequence[IndexRow], reward: Reward, decoder: Decoder, size: int
) -> list[ScoreRow]:
    """Scores of the stored finals of these rows; a sample that the reward fails on is a failed row."""
    finals = [torch.from_numpy(read_sample(shards, row)["x"][-1].astype(np.float32)) for row in rows]
    verdicts = score_finals(decoder, reward, finals, [row.prompt for row in rows], size)
    return [_row(row, verdict) for row, verdict in zip(rows, verdicts, strict=True)]


def _row(row: IndexRow, verdict: SampleScore) -> ScoreRow:
    if verdict.error is None:
        return ScoreRow(key=row.key, score=verdict.score)
    return ScoreRow(key=row.key, score=None, status="failed", error=verdict.error)


class Scorer:
    """A worker's decoder and rewards. Each is loaded once, by the first task that needs it."""

    def __init__(self, params: Params, shards: ShardSet) -> None:
        """Loads nothing yet. `params` are those the set was made with."""
        self.params, self.shards = params, shards
        self.model = Model.of(params)  # the worker's own: its machine may have other files
        self.maker = maker(params)
        self._rewards: dict[str, Reward] = {}

    @cached_property
    def decoder(self) -> FamilyDecoder:
        """The VAE, and nothing else of the model."""
        return self.model.open_decoder()

    def reward(self, name: str, column: str) -> Reward:
        """A reward by name, for a column of scores. Raises ConfigError if this machine has another one of that name."""
        if name not in self._rewards:
            settings = next(reward for reward in self.params.rewards if reward.name == name)
            reward, wanted = open_reward(settings, self.params.compute.device), reward_columns(self.shards)[column]
            if reward.fingerprint != wanted.hashes["reward"]:
                raise ConfigError(f"{settings.path} is another {name!r} than the driver's: give all workers the same")
            self._rewards[name] = reward
        return self._rewards[name]

    def open_rewards(self, columns: dict[str, str]) -> None:
        """Loads the rewards of the columns (reward name -> fingerprint) that are not loaded yet."""
        for name, column in columns.items():
            self.reward(name, column)

    def score(self, done: ShardDone, columns: dict[str, str]) -> int:
        """Score a finished shard into the columns (reward name -> fingerprint); returns how many rows."""
        for name, column in columns.items():
            reward, size = self.reward(name, column), self.params.compute.micro_batch
            rows = score_rows_of(self.shards, done.rows, reward, self.decoder, size)
            write_scores(self.shards, column, done.shard, rows, self.maker)
        return len(columns) * len(done.rows)


@dataclass(frozen=True, kw_only=True)
class ScoreTask(ShardTask):
    """A finished shard that lacks the scores of some columns (reward name -> fingerprint).

    `retry`: score the columns that have failed rows again.
    """

    columns: dict[str, str]
    retry: bool = False


@dataclass(frozen=True)
class ScoreSetup:
    """What a worker needs to load its models, and the driver's software. It can be pickled."""

    params: Params
    root: Place
    driver: Software

    def __call__(self) -> Scorer:
        """The worker's context. Raises ConfigError if this worker's software would give other bytes."""
        scorer = Scorer(self.params, ShardSet.open(self.root))
        refuse_other(self.driver, scorer.maker)
        return scorer


def do_score(scorer: Scorer, task: ScoreTask) -> TaskResult | ShardBusy:
    """The missing scores of one shard, from what is on disk."""
    with claimed(scorer.shards, task.shard, task.wait) as mine:
        if not mine:
            return ShardBusy(task.shard)
        done = scorer.shards.done(task.shard)
        if done is None:
            raise DataError(f"{scorer.shards.shard_path(task.shard)} is gone; run `rats stage rollout`")
        columns = missing_columns(scorer.shards, done, task.columns, task.retry)
        with threads(scorer.params.compute.threads), forwards(scorer.model.family.network_class) as count:
            scored = scorer.score(done, columns)
        return TaskResult(len(done.rows), count(), scored)


def missing_columns(shards: ShardSet, done: ShardDone, columns: dict[str, str], retry: bool = False) -> dict[str, str]:
    """Those of the columns in which the shard has no scores yet, or failed ones that are to be tried again."""

    def complete(column: str) -> bool:
        if not scores_done(shards, column, done.shard, done.blake3):
            return False
        rows = score_rows(shards, column, done.shard, done.blake3) if retry else []
        return not any(row.status == "failed" for row in rows)

    return {name: column for name, column in columns.items() if not complete(column)}


@contextmanager
def forwards(network_class: type[nn.Module]) -> Iterator[Callable[[], int]]:
    """Counts the forward calls of all networks of a class in this process."""
    seen = 0

    def hook(module: nn.Module, args: Any) -> None:
        nonlocal seen
        seen += isinstance(module, network_class)

    handle = register_module_forward_pre_hook(hook)
    try:
        yield lambda: seen
    finally:
        handle.remove()
