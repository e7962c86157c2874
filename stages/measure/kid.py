"""Real pictures, to compare with: the file of their features, the distance to them by concept, recognition by them.

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

from rats.pipeline.bounds import bounded_file
from rats.pipeline.files.atomic import atomic_write
from rats.schemas.errors import ConfigError, DataError
from rats.stages.measure.features import kernel, recognised
from rats.stages.measure.intervals import Array, PairedEstimate, Rows, group, interval, leave_one_out


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
        """Squared MMD of every two concepts, (C, C); NaN where a concept has a single picture on one side.

        Entry (c, d) estimates <f_c - r_c, f_d - r_d>, where f and r are mean embeddings in the kernel's space.
        Computed by concept, each concept has the same share on both sides, whatever its numbers of pictures.
        """
        fakes = np.asarray(features_NF, np.float64)
        size = len(self.names)
        _, rows = group(concepts)
        own = own_block_means(kernel(fakes, fakes), rows, size)
        width = size if self.matched else 1
        means = block_means(kernel(fakes, self.features), rows, self.rows, size, width)
        cross = np.broadcast_to(means, (size, size))
        return own + self.own - cross - cross.T

    def recognised(self, features_NF: Array, concepts: Sequence[str]) -> Array:
        """1.0 for each picture that is nearest to its own concept's real pictures, else 0.0, (N,). Needs `matched`."""
        return recognised(features_NF, concepts, self.features, [self.names[row] for row in self.rows])


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
        raise ConfigError(
            f"evaluate.judges name {path} as real_features, which is not there: set it to null to go without KID"
        )
    try:
        with safe_open(bounded_file(path), framework="numpy") as file:
            features = np.asarray(file.get_tensor("features"), np.float64)
            concepts = json.loads((file.metadata() or {})["concepts"])
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise DataError(f"{path} holds no real features ({error}): restore it") from error
    if features.ndim != 2 or len(features) != len(concepts) or len(features) < 2 or not np.isfinite(features).all():
        raise DataError(f"{path} has features {features.shape} for {len(concepts)} concepts: restore it")
    return features, [str(concept) for concept in concepts]


def block_means(kernel_NM: Array, rows_N: Rows, rows_M: Rows, size_N: int, size_M: int) -> Array:
    """Mean kernel between the concepts of two sets: (size_N, size_M)."""
    left, right = np.eye(size_N)[rows_N], np.eye(size_M)[rows_M]
    return (left.T @ kernel_NM @ right) / np.outer(left.sum(0), right.sum(0))


def own_block_means(kernel_NN: Array, rows_N: Rows, size: int) -> Array:
    """As `block_means` of a set with itself, without a sample's kernel with itself; NaN for a lone sample."""
    means = block_means(kernel_NN, rows_N, rows_N, size, size)
    counts = np.bincount(rows_N, minlength=size).astype(np.float64)
    itself = np.bincount(rows_N, weights=np.diag(kernel_NN), minlength=size)
    diagonal = np.full(size, np.nan)
    many = counts > 1
    total = np.diag(means) * counts**2 - itself
    diagonal[many] = total[many] / (counts * (counts - 1))[many]
    means[np.diag_indices(size)] = diagonal
    return means


def kid_of(distance_CC: Array, shares_C: Array, kept_RC: Array) -> Array:
    """KID of R choices of concepts, (R,): `kept_RC` is 1 where a concept counts; NaN where no two pictures are left.

    `shares_C`: the concepts' shares of the pictures. A lone picture's own block is unknown, and left out.
    """
    weights, known = kept_RC * shares_C, np.isfinite(distance_CC)
    total = ((weights @ np.where(known, distance_CC, 0)) * weights).sum(1)
    pairs = ((weights @ known) * weights).sum(1)
    return np.divide(total, pairs, out=np.full(len(total), np.nan), where=pairs > 0)


def paired_kid(distance_a: Array, distance_b: Array, concepts: Sequence[str]) -> PairedEstimate:
    """KID of system a, and its difference to b's, from `RealSet.distance` of both."""
    names, rows = group(concepts)
    shares = np.bincount(rows) / len(rows)
    kept = np.vstack([np.ones(len(names)), leave_one_out(len(names))])
    (a, *rest_a), (b, *rest_b) = (kid_of(distance, shares, kept) for distance in (distance_a, distance_b))
    without_a, without_b = np.array(rest_a), np.array(rest_b)
    delta = float(a - b)
    return PairedEstimate(float(a), interval(float(a), without_a), delta, interval(delta, without_a - without_b))
