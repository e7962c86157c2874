"""Reads samples by position, and lets none through whose hash is not the recorded one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load

from rats.pipeline.order import row_at
from rats.pipeline.sealed import hash_bytes, hash_file, open_regular
from rats.pipeline.store import REMAKE, ShardSet
from rats.schemas.errors import DataError, StorageError
from rats.schemas.manifest import IndexRow, Snapshot


def read_sample(shards: ShardSet, row: IndexRow) -> dict[str, np.ndarray]:
    """A sample's `x` (H, T, C) and `x0` (H - 1, T, C), float16, after its hash was checked.

    Raises:
        DataError: the shard is missing, cut or changed, or a link.
    """
    path = shards.shard_path(row.shard)
    with open_regular(path, REMAKE) as file:
        data = _pread(file, row)
    if len(data) != row.length or hash_bytes(data) != row.blake3:
        raise DataError(f"{path} is damaged at sample {row.key} ({len(data)} of {row.length} bytes); {REMAKE}")
    return _parse(shards, row, data)


def verify_shard(shards: ShardSet, shard: str, expected: str | None = None) -> int:
    """Read every byte of a shard; returns how many. `expected`: the tar's blake3 by the snapshot.

    Raises:
        DataError: the tar is not the recorded one, or a row of its document points at something else.
    """
    done = shards.done(shard)
    if done is None:
        raise DataError(f"{shards.shard_path(shard)} is missing; run `rats stage rollout`")
    digest, size = hash_file(shards.shard_path(shard), REMAKE)
    if digest != done.blake3 or digest != (expected or digest):
        raise DataError(f"{shards.shard_path(shard)} is damaged (blake3 {digest[:12]}, not the recorded one); {REMAKE}")
    for row in done.rows:
        read_sample(shards, row)
    return size


class Stream:
    """A snapshot's samples in training order, without end: a new permutation each epoch.

    `position`, the number of samples given so far, is the whole state; the order depends on it, the seed
    and the snapshot, and on nothing else.
    """

    def __init__(self, shards: ShardSet, snapshot: Snapshot, seed: int, position: int = 0) -> None:
        """Load the snapshot's index; `position` goes on where a checkpoint was."""
        self.shards, self.snapshot, self.seed, self.position = shards, snapshot, seed, position
        self.rows = shards.index(snapshot)
        if not self.rows:
            raise DataError(f"snapshot {snapshot.number} of {shards.root} has no samples; run `rats stage rollout`")

    def __iter__(self) -> Iterator[tuple[IndexRow, dict[str, np.ndarray]]]:
        """The stream itself."""
        return self

    def __next__(self) -> tuple[IndexRow, dict[str, np.ndarray]]:
        """The next sample; the position moves once it is read."""
        row = self.rows[row_at(self.seed, len(self.rows), self.position)]
        arrays = read_sample(self.shards, row)
        self.position += 1
        return row, arrays


def _pread(file: Any, row: IndexRow) -> bytes:
    """The row's bytes, fewer at the end of a truncated file (never more memory than the file has)."""
    try:
        file.seek(0, 2)
        length = max(0, min(row.length, file.tell() - row.offset))
        file.seek(row.offset)
        pieces = bytearray()
        while len(pieces) < length and (piece := file.read(length - len(pieces))):
            pieces += piece
    except (OSError, OverflowError) as error:
        raise StorageError(f"cannot read {file.name}: {error}; check the disk") from None
    return bytes(pieces)


def _parse(shards: ShardSet, row: IndexRow, data: bytes) -> dict[str, np.ndarray]:
    """Arrays of a payload that is known to be what was written; another format is still refused."""
    try:
        arrays = load(data)
        x, x0 = arrays["x"], arrays["x0"]
    except (SafetensorError, KeyError, ValueError) as error:
        raise DataError(f"{row.shard}: sample {row.key} is not in this format ({error}); {REMAKE}") from None
    rows = len(shards.recipe.horizons)
    if len(x) != rows or x0.shape != (rows - 1, *x.shape[1:]) or {x.dtype, x0.dtype} != {np.dtype(np.float16)}:
        raise DataError(f"{row.shard}: sample {row.key} has x {x.dtype} {x.shape}, x0 {x0.shape}; {REMAKE}")
    return {"x": x, "x0": x0}
