"""The noise of a sample. It depends on the root seed, the prompt id and the noise index, and on nothing else.

See docs/design.md#identity-of-a-sample.
"""

from __future__ import annotations

import hashlib
import math

import numpy as np
import torch
from torch import Tensor

from rats.schemas.canonical import canonical_json


def noise(seed: int, prompt_id: str, noise_index: int, shape: tuple[int, ...]) -> Tensor:
    """Standard normal noise of `shape`, float32 on the CPU.

    Made of Philox's raw words by Box-Muller in float64. numpy guarantees the raw words for all versions, but not the
    numbers of its `standard_normal`.
    """
    size = math.prod(shape)
    u1, u2 = _uniform("noise", [seed, prompt_id, noise_index], 2 * ((size + 1) // 2)).reshape(2, -1)
    radius, angle = np.sqrt(-2.0 * np.log(u1)), 2.0 * np.pi * u2
    normal = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1).reshape(-1)[:size]
    return torch.from_numpy(normal.astype(np.float32).reshape(shape))


def philox_words(purpose: str, identity: list[int | str], count: int) -> np.ndarray:
    """`count` uint64 words of the Philox stream keyed by a purpose and an identity."""
    key = hashlib.sha256(canonical_json([purpose, *identity])).digest()[:16]
    return np.random.Philox(key=int.from_bytes(key, "little")).random_raw(count)


def _uniform(purpose: str, identity: list[int | str], count: int) -> np.ndarray:
    """float64 in (0, 1) of 53 bits. They are centred in their intervals, so that none is 0 and has no logarithm."""
    words = philox_words(purpose, identity, count) >> np.uint64(11)
    return (words.astype(np.float64) + 0.5) * 2.0**-53
