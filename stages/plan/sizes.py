"""The size of a shard set before anything is sampled. Members are serialised to measure them, not estimated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from safetensors.numpy import save
from safetensors.torch import save as save_torch

from rats.schemas.canonical import canonical_json
from rats.schemas.manifest import PlannedSample
from rats.schemas.recipe import Recipe

TAR_BLOCK, TAR_RECORD = 512, 10240
"""Tar pads each member to a block and the file to a record."""

TABLE_ROW = 64
"""Bytes of a sample in a Parquet index or a column of scores, mostly its hashes, which do not compress."""

DOCUMENT_ROW = 200
"""Bytes that `done.json` has for each sample beyond those of `plan.json`: offset, length, hash, status."""


def latents_bytes(recipe: Recipe) -> int:
    """One sample's latents: x at all horizons and x0 at all but the last, of shape (T, C)."""
    rows = len(recipe.horizons)
    x, x0 = (np.zeros((count, *recipe.latent_shape), recipe.latent_dtype) for count in (rows, rows - 1))
    return len(save({"x": x, "x0": x0}))


def embedding_bytes(shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> int:
    """One prompt's embeddings."""
    return len(
        save_torch({name: torch.zeros(shape, dtype=dtype) for name, shape in shapes.items()}, {"seal": 64 * "0"})
    )


def shard_bytes(recipe: Recipe, latents: int, samples: Sequence[PlannedSample], columns: int) -> int:
    """Bytes of a shard, its two documents, and its rows in the index and in `columns` columns of scores."""
    sigmas = len(canonical_json({"sigmas": list(recipe.horizons)}))
    described = [len(canonical_json(sample.model_dump())) for sample in samples]
    members = sum(2 * TAR_BLOCK + _padded(latents, TAR_BLOCK) + _padded(size + sigmas, TAR_BLOCK) for size in described)
    documents = sum(2 * size + DOCUMENT_ROW for size in described)
    return _padded(members + 2 * TAR_BLOCK, TAR_RECORD) + documents + (1 + columns) * TABLE_ROW * len(samples)


def _padded(size: int, block: int) -> int:
    return -(-size // block) * block
