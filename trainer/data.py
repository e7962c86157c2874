"""The stream of training samples: those of a snapshot, joined with embeddings and the teacher's scores.

Their order is the same for any number of ranks and loader threads. Position p of the order is a row of the snapshot
(`row_at`); a step's batch is the next `batch` positions, a rank's share of it a contiguous part.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from rats.pipeline.noise import philox_words
from rats.pipeline.protocols import Conditioning
from rats.pipeline.store.embeddings import read_embedding
from rats.pipeline.store.scores import MAX_BAD
from rats.pipeline.store.shard_set import ShardSet
from rats.pipeline.store.shards import read_sample
from rats.schemas.errors import ConfigError, DataError
from rats.schemas.manifest import IndexRow, Snapshot

PROMPTS_IN_MEMORY = 256
AHEAD = 2
"""Batches that loader threads read ahead."""


class StoredSamples:
    """Samples of a snapshot, each verified. Those without a score are left out of the order.

    Loaders are threads, not processes: reading, hashing and waiting for storage release Python's lock, and threads need
    no start-up, no copies between processes and no special shutdown.

    Attributes:
        position: Samples taken so far from the global order, over all ranks. This is the whole state. Samples that
            were only read ahead do not count.
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
        self._shards, self._scores = shards, scores
        self._rows = _scored(shards, snapshot, scores)
        self._seed, self._batch = seed, batch
        self._share, self._rank = batch // world, rank
        self._embedding = lru_cache(PROMPTS_IN_MEMORY)(partial(read_embedding, shards))
        self._pool = ThreadPoolExecutor(workers, "loader") if workers else None
        self._coming: deque[list[Future[Sample]]] = deque()

    def take(self) -> list[Sample]:
        """This rank's share of the next batch; the position moves on by the whole batch, once all is read.

        Raises:
            DataError: a shard or an embedding is damaged.
            StorageError: it cannot be read.
        """
        samples = self._read_ahead(self._pool) if self._pool else self._read_now()
        self.position += self._batch  # once all is read: a failed call takes nothing
        return samples

    def close(self) -> None:
        """Drops what was read ahead and ends the threads."""
        self._forget()
        if self._pool is not None:
            self._pool.shutdown()

    def _share_of(self, ahead: int) -> list[IndexRow]:
        """What this rank reads `ahead` batches after the next one."""
        batch_start = self.position + ahead * self._batch
        start = batch_start + self._rank * self._share
        rows = self._rows
        numbers = [row_at(self._seed, len(rows), place) for place in range(start, start + self._share)]
        return [rows[number] for number in numbers]

    def _read_now(self) -> list[Sample]:
        return [self._read(row) for row in self._share_of(0)]

    def _read_ahead(self, pool: ThreadPoolExecutor) -> list[Sample]:
        while len(self._coming) <= AHEAD:
            rows = self._share_of(len(self._coming))
            self._coming.append([pool.submit(self._read, row) for row in rows])
        try:
            samples = [future.result() for future in self._coming[0]]
        except BaseException:
            self._forget()  # another `take` begins at the position again
            raise
        self._coming.popleft()
        return samples

    def _forget(self) -> None:
        for futures in self._coming:
            for future in futures:
                future.cancel()
        self._coming.clear()

    def _read(self, row: IndexRow) -> Sample:
        arrays = read_sample(self._shards, row)
        x_HTC, x0_HTC = torch.from_numpy(arrays["x"]), torch.from_numpy(arrays["x0"])
        return Sample(row.key, row.prompt, x_HTC, x0_HTC, self._embedding(row.prompt_id), self._scores[row.key])


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


def row_at(seed: int, n: int, position: int) -> int:
    """The row, of `n`, that is read at `position`, which counts on over epochs."""
    epoch, offset = divmod(position, n)
    return int(_permutation(seed, n, epoch)[offset])


@lru_cache(maxsize=2)
def _permutation(seed: int, n: int, epoch: int) -> np.ndarray:
    """A permutation of `n` rows: random words with the row in their low bits, sorted. All words differ, so any sorting
    algorithm gives the same order.

    Everything is in place: for a million rows, allocating memory would take as long as sorting. The two last epochs are
    cached (8 bytes a row), since a batch or what is read ahead may span both.
    """
    low = np.uint64((1 << n.bit_length()) - 1)
    words = philox_words("order", [seed, epoch], n)
    words &= ~low
    words |= np.arange(n, dtype=np.uint64)
    words.sort()
    words &= low
    return words


@dataclass(frozen=True)
class Sample:
    """One stored teacher trajectory, with everything that the loop needs of it."""

    key: str
    prompt: str
    x_HTC: Tensor
    x0_HTC: Tensor
    """Predicted clean latents at the horizons, the last (sigma = 0) left out: H - 1 rows."""
    conditioning: Conditioning
    """The prompt's embeddings, without a batch axis."""
    scores: tuple[float, ...]
    """R_T by each reward that trains, computed from the stored final latent."""


class SampleStream(Protocol):
    """An endless, exactly resumable order of samples, the same for any number of ranks."""

    @property
    def position(self) -> int:
        """Samples of the global order handed out so far, over all ranks: the whole state."""
        ...

    def take(self) -> list[Sample]:
        """This rank's contiguous share of the next batch; the position moves on by the whole batch."""
        ...


@dataclass(frozen=True)
class Batch:
    """Samples side by side, on one device; R rewards."""

    keys: list[str]
    prompts: list[str]
    x_HBTC: Tensor
    x0_HBTC: Tensor
    conditioning: Conditioning
    r_teacher_RB: Tensor
    good_B: Tensor | None = None
    """Which samples have teacher scores, for a teacher that runs in the loop. None: all, as for a stored teacher."""

    @property
    def noise(self) -> Tensor:
        """The stored noise (B, T, C) as float32, from which both student and teacher start."""
        return self.x_HBTC[0].float()


def collate(samples: Sequence[Sample], device: torch.device) -> Batch:
    """Stack samples along the batch axis."""
    conditioning = {}
    for name in samples[0].conditioning:
        conditioning[name] = torch.stack([s.conditioning[name] for s in samples]).to(device)
    return Batch(
        keys=[s.key for s in samples],
        prompts=[s.prompt for s in samples],
        x_HBTC=torch.stack([s.x_HTC for s in samples], 1).to(device),
        x0_HBTC=torch.stack([s.x0_HTC for s in samples], 1).to(device),
        conditioning=conditioning,
        r_teacher_RB=torch.tensor([s.scores for s in samples], dtype=torch.float32, device=device).T,
    )
