"""The stream that stage two reads: a snapshot's samples, in order, joined with embeddings and the teacher's scores."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

import numpy as np
import torch

from rats.pipeline.embeddings import read_embedding
from rats.pipeline.reader import Stream
from rats.pipeline.scores import MAX_BAD
from rats.pipeline.store import ShardSet
from rats.schemas.errors import DataError
from rats.schemas.manifest import Snapshot
from rats.trainer.batches import Sample

PROMPTS_IN_MEMORY = 256


class StoredSamples:
    """Samples of a snapshot, each verified; those whose scoring failed are passed over.

    `position` counts what was read, the passed-over included: it is the whole state.
    """

    def __init__(
        self, shards: ShardSet, snapshot: Snapshot, scores: Mapping[str, float], seed: int, position: int = 0
    ) -> None:
        """`scores`: R_T by key. Raises DataError when more than a tenth of the samples have none."""
        missing = snapshot.samples - len(scores)
        if missing > MAX_BAD * snapshot.samples:
            raise DataError(
                f"{missing} of {snapshot.samples} samples of {shards.root} have no score: mend the reward, "
                "then `rats stage score --retry-failed` and publish again with its --out"
            )
        self._stream = Stream(shards, snapshot, seed, position)
        self._scores = scores
        self._embedding = lru_cache(PROMPTS_IN_MEMORY)(lambda prompt_id: read_embedding(shards, prompt_id))

    @property
    def position(self) -> int:
        """Samples read so far."""
        return self._stream.position

    def __next__(self) -> Sample:
        """The next sample that has a score. Raises DataError when a shard or an embedding is damaged."""
        while (found := next(self._stream))[0].key not in self._scores:
            pass
        row, arrays = found
        x, x0 = (torch.from_numpy(np.array(arrays[name])) for name in ("x", "x0"))
        return Sample(row.key, row.prompt, x, x0, self._embedding(row.prompt_id), self._scores[row.key])
