"""The stream that stage two reads: a snapshot's samples, in order, joined with embeddings and the teacher's scores.

One order for any number of ranks and loader threads. Position p of the order is a row of the snapshot
(`pipeline.order`); a step's batch is the next `batch` positions, a rank's share of it a contiguous part.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache, partial

import torch

from rats.pipeline.embeddings import read_embedding
from rats.pipeline.order import row_at
from rats.pipeline.reader import read_sample
from rats.pipeline.scores import MAX_BAD
from rats.pipeline.store import ShardSet
from rats.schemas.errors import ConfigError, DataError
from rats.schemas.manifest import IndexRow, Snapshot
from rats.trainer.batches import Sample

PROMPTS_IN_MEMORY = 256
AHEAD = 2
"""Batches that loader threads read beyond the one that is asked for."""


class StoredSamples:
    """Samples of a snapshot, each verified; those without a score are no part of the order.

    Loader threads, not processes: reading, hashing and waiting for storage leave Python's lock to the trainer, and
    nothing has to be started, copied between processes, or ended with care.

    Attributes:
        position: Samples of the global order taken so far, over all ranks: the whole state. What the loader threads
            have read ahead does not count.
    """

    def __init__(
        self,
        shards: ShardSet,
        snapshot: Snapshot,
        scores: Mapping[str, tuple[float, ...]],
        seed: int,
        batch: int,
        position: int = 0,
        rank: int = 0,
        world: int = 1,
        workers: int = 0,
    ) -> None:
        """`scores`: R_T by key; `batch`: samples of all `world` ranks; `workers`: loader threads, 0 for none.

        Raises:
            ConfigError: the ranks cannot share a batch evenly.
            DataError: more than a tenth of the samples have no score.
        """
        if batch % world:
            raise ConfigError(f"train.batch is {batch}, which {world} ranks cannot share: use a multiple of {world}")
        self.position = position
        self._shards, self._scores, self._rows = shards, scores, _scored(shards, snapshot, scores)
        self._seed, self._batch, self._share, self._rank = seed, batch, batch // world, rank
        self._embedding = lru_cache(PROMPTS_IN_MEMORY)(partial(read_embedding, shards))
        self._pool = ThreadPoolExecutor(workers, "loader") if workers else None
        self._coming: deque[list[Future[Sample]]] = deque()

    def take(self) -> list[Sample]:
        """This rank's share of the next batch; the position moves on by the whole batch, once all is read.

        Raises:
            DataError: a shard or an embedding is damaged.
            StorageError: it cannot be read.
        """
        pool = self._pool
        samples = self._read_ahead(pool) if pool else [self._read(row) for row in self._share_of(0)]
        self.position += self._batch
        return samples

    def close(self) -> None:
        """Drop what was read ahead and end the threads."""
        self._forget()
        if self._pool is not None:
            self._pool.shutdown()

    def _share_of(self, ahead: int) -> list[IndexRow]:
        """What this rank reads `ahead` batches after the next one."""
        start = self.position + ahead * self._batch + self._rank * self._share
        rows = self._rows
        return [rows[row_at(self._seed, len(rows), place)] for place in range(start, start + self._share)]

    def _read_ahead(self, pool: ThreadPoolExecutor) -> list[Sample]:
        while len(self._coming) <= AHEAD:
            self._coming.append([pool.submit(self._read, row) for row in self._share_of(len(self._coming))])
        try:
            samples = [future.result() for future in self._coming[0]]
        except BaseException:
            self._forget()  # another `take` begins at the position again
            raise
        self._coming.popleft()
        return samples

    def _forget(self) -> None:
        for future in (future for futures in self._coming for future in futures):
            future.cancel()
        self._coming.clear()

    def _read(self, row: IndexRow) -> Sample:
        arrays = read_sample(self._shards, row)
        x, x0 = (torch.from_numpy(arrays[name]) for name in ("x", "x0"))
        return Sample(row.key, row.prompt, x, x0, self._embedding(row.prompt_id), self._scores[row.key])


def _scored(shards: ShardSet, snapshot: Snapshot, scores: Mapping[str, tuple[float, ...]]) -> Sequence[IndexRow]:
    """The snapshot's rows that have scores, in the order of keys."""
    found = [row for row in shards.index(snapshot) if row.key in scores]
    missing = snapshot.samples - len(found)
    if missing > MAX_BAD * snapshot.samples:
        raise DataError(
            f"{missing} of {snapshot.samples} samples of {shards.root} have no score: mend the reward, "
            "then `rats stage score --retry-failed` and publish again with its --out"
        )
    if not found:
        raise DataError(f"snapshot {snapshot.number} of {shards.root} has no samples; run `rats stage rollout`")
    return found
