"""The real pictures that KID compares with: the file of their features, and the distance to them by concept.

Shapes: N generated and M real pictures, C concepts, F features.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from rats.pipeline.atomic import atomic_write
from rats.pipeline.judge import kernel
from rats.schemas.errors import ConfigError, DataError
from rats.stages.statistics import Array, block_means, group, own_block_means


class RealSet:
    """Features (M, F) of real pictures, compared with the generated pictures of the same concepts.

    Where a prompt's concept has no real picture, all generated pictures are held against the whole set.
    """

    def __init__(self, features_MF: Array, concepts: Sequence[str], wanted: Sequence[str]) -> None:
        """`concepts` of the real pictures, `wanted` those of the prompts."""
        self.names, _ = group(wanted)
        self.matched = set(self.names) <= set(concepts)
        keep = np.array([(not self.matched) or c in set(self.names) for c in concepts], dtype=bool)
        self.features = np.asarray(features_MF, np.float64)[keep]
        position = {name: i for i, name in enumerate(self.names)}
        kept = [c for c, k in zip(concepts, keep, strict=True) if k]
        self.rows = np.array([position[c] if self.matched else 0 for c in kept], np.intp)
        size = len(self.names) if self.matched else 1
        own = own_block_means(kernel(self.features, self.features), self.rows, size)
        self.own = own if self.matched else np.full((len(self.names),) * 2, own[0, 0])

    def distance(self, features_NF: Array, concepts: Sequence[str]) -> Array:
        """Squared MMD of every two concepts, (C, C), NaN where a concept has one picture only on a side.

        Entry (c, d) estimates <f_c - r_c, f_d - r_d>, f and r being mean embeddings in the kernel's space.
        Working by concept keeps both sides at equal shares whatever their numbers of pictures.
        """
        fakes = np.asarray(features_NF, np.float64)
        size = len(self.names)
        _, rows = group(concepts)
        own = own_block_means(kernel(fakes, fakes), rows, size)
        width = size if self.matched else 1
        means = block_means(kernel(fakes, self.features), rows, self.rows, size, width)
        cross = np.broadcast_to(means, (size, size))
        return own + self.own - cross - cross.T


def write_real(path: Path, features_NF: NDArray[np.floating], concepts: Sequence[str]) -> None:
    """Features (N, F) of real pictures as float16, with the concept of each, in one safetensors file."""
    if len(features_NF) != len(concepts):
        raise ConfigError(f"{len(features_NF)} real pictures, {len(concepts)} concepts: one a picture is needed")
    text = json.dumps(list(concepts), ensure_ascii=False)
    tensors = {"features": np.ascontiguousarray(features_NF, np.float16)}
    atomic_write(path, save(tensors, metadata={"concepts": text}))


def open_real(path: Path) -> tuple[NDArray[np.float64], list[str]]:
    """What `write_real` wrote.

    Raises:
        ConfigError: there is no such file. DataError: it is something else.
    """
    if not path.is_file():
        raise ConfigError(f"evaluate.real_features names {path}, which is not there: set it to null to go without KID")
    try:
        with safe_open(str(path), framework="numpy") as file:
            features = np.asarray(file.get_tensor("features"), np.float64)
            concepts = json.loads((file.metadata() or {})["concepts"])
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise DataError(f"{path} holds no real features ({error}): restore it") from error
    if features.ndim != 2 or len(features) != len(concepts) or len(features) < 2 or not np.isfinite(features).all():
        raise DataError(f"{path} has features {features.shape} for {len(concepts)} concepts: restore it")
    return features, [str(concept) for concept in concepts]
