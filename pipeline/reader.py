"""Reads samples by position, and lets none through whose hash is not the recorded one."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load

from rats.pipeline import cache, places
from rats.pipeline.places import Place
from rats.pipeline.sealed import hash_bytes, hash_ranges, open_regular
from rats.pipeline.store import REMAKE, ShardSet
from rats.schemas.errors import DataError, StorageError
from rats.schemas.manifest import IndexRow


def read_sample(shards: ShardSet, row: IndexRow) -> dict[str, np.ndarray]:
    """A sample's `x` (H, T, C) and `x0` (H - 1, T, C), float16, after its hash was checked.

    From a remote store only the sample's bytes are fetched, once, into the local cache (`pipeline.cache`).

    Raises:
        DataError: the shard is missing, cut or changed, or a link.
    """
    data = _bytes_of(shards.shard_path(row.shard), row)
    if not _is_whole(row, data):
        path = shards.shard_path(row.shard)
        raise DataError(f"{path} is damaged at sample {row.key} ({len(data)} of {row.length} bytes); {REMAKE}")
    return _parse(shards, row, data)


def _is_whole(row: IndexRow, data: bytes) -> bool:
    return len(data) == row.length and hash_bytes(data) == row.blake3


def _bytes_of(path: Place, row: IndexRow) -> bytes:
    if isinstance(path, Path):
        with open_regular(path, REMAKE) as file:
            return _pread(file, row)
    fetch = partial(places.read, path, REMAKE, row.offset, row.offset + row.length)
    return cache.shared().get(row.blake3, fetch, partial(_is_whole, row))


def verify_shard(shards: ShardSet, shard: str, expected: str | None = None) -> int:
    """Read every byte of a shard once; returns how many. `expected`: the tar's blake3 by the snapshot.

    Raises:
        DataError: the tar is not the recorded one, or a row of its document points at something else.
    """
    done = shards.done(shard)
    if done is None:
        raise DataError(f"{shards.shard_path(shard)} is missing; run `rats stage rollout`")
    path = shards.shard_path(shard)
    ranges = [(row.offset, row.length) for row in done.rows]
    whole, parts = hash_ranges(path, ranges, REMAKE)
    if whole != done.blake3 or whole != (expected or whole):
        raise DataError(f"{path} is damaged (blake3 {whole[:12]}, not the recorded one); {REMAKE}")
    for row, part in zip(done.rows, parts, strict=True):
        if part != row.blake3:
            raise DataError(f"{path} is damaged at sample {row.key}; {REMAKE}")
    return done.bytes


def _pread(file: Any, row: IndexRow) -> bytes:
    """The row's bytes, fewer at the end of a truncated file (never more memory than the file has)."""
    try:
        file.seek(0, 2)
        length = max(0, min(row.length, file.tell() - row.offset))
        file.seek(row.offset)
        pieces = [file.read(length)]  # a plain file gives all at once, save beyond 2 GiB or after a signal
        while pieces[-1] and (left := length - sum(map(len, pieces))):
            pieces.append(file.read(left))
    except (OSError, OverflowError) as error:
        raise StorageError(f"cannot read {file.name}: {error}; check the disk") from None
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def _parse(shards: ShardSet, row: IndexRow, data: bytes) -> dict[str, np.ndarray]:
    """Arrays of a payload that is known to be what was written; another format is still refused."""
    try:
        arrays = load(data)
        x, x0 = arrays["x"], arrays["x0"]
    except (SafetensorError, KeyError, ValueError, TypeError) as error:
        reason = " ".join(str(error).split())[:120]
        raise DataError(f"{row.shard}: sample {row.key} is not in this format ({reason}); {REMAKE}") from None
    rows, kinds = len(shards.recipe.horizons), {x.dtype, x0.dtype}
    shapes = (rows, *x.shape[1:]), (rows - 1, *x.shape[1:])
    if x.ndim != 3 or (x.shape, x0.shape) != shapes or kinds != {np.dtype(np.float16)}:
        raise DataError(f"{row.shard}: sample {row.key} has x {x.dtype} {x.shape}, x0 {x0.shape}; {REMAKE}")
    return {"x": x, "x0": x0}
