"""The order of training: a permutation an epoch, so that the whole state is a counter of samples."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from rats.pipeline.noise import philox_words


def row_at(seed: int, n: int, position: int) -> int:
    """Which of `n` rows is read as number `position`, counted over epochs."""
    epoch, offset = divmod(position, n)
    return int(_permutation(seed, n, epoch)[offset])


@lru_cache(maxsize=2)
def _permutation(seed: int, n: int, epoch: int) -> np.ndarray:
    """Rows sorted by random words that carry the row in their low bits: no ties, so any sorting gives this.

    In place: at a million rows, fresh pages would cost as much as the sorting. Two epochs are kept, 8 bytes a row:
    a batch, or what is read ahead, may span both.
    """
    low = np.uint64((1 << n.bit_length()) - 1)
    words = philox_words("order", [seed, epoch], n)
    words &= ~low
    words |= np.arange(n, dtype=np.uint64)
    words.sort()
    words &= low
    return words
