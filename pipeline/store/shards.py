"""Writes and reads shards.

Writing: temporary tar, fsync, read back, rename, and only then the document that it is done. Reading: samples by
position, and none whose hash is not the recorded one.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load, save
from torch import Tensor
from webdataset.writer import TarWriter

from rats.pipeline.bounds import bounded
from rats.pipeline.files.local import LocalPlace
from rats.pipeline.files.reading import hash_bytes, hash_file, hash_ranges
from rats.pipeline.store.documents import write_document
from rats.pipeline.store.shard_set import REMAKE, ShardSet
from rats.schemas.canonical import canonical_json
from rats.schemas.errors import DataError, StorageError, reason, remedy
from rats.schemas.maker import Maker
from rats.schemas.manifest import IndexRow, PlannedSample, ShardDone, ShardPlan
from rats.schemas.recipe import LATENT_DTYPE

SampleArrays = tuple[PlannedSample, dict[str, np.ndarray]]
LATENTS = "latents.safetensors"


def write_shard(
    shards: ShardSet, plan: ShardPlan, samples: Iterable[SampleArrays], maker: Maker | None = None
) -> ShardDone:
    """Writes the plan's samples in its order. If the shard is finished already, `samples` are not consumed.

    Args:
        shards: The set.
        plan: Which samples, in which order.
        samples: Each with `x` (H, T, C), states at all horizons, and `x0` (H - 1, T, C), in `LATENT_DTYPE`.
        maker: What computed them, for the record.

    Raises:
        DataError: other samples than planned, another shape or dtype, a value that is not finite.
        StorageError: the disk is full, or did not give back what was written.
        CannotCreateError: the store cannot be written.
    """
    if done := shards.done(plan.shard):
        return done
    with shards.shard_path(plan.shard).temporary() as temporary:
        hashes = _write_tar(temporary, shards.recipe.horizons, plan, samples)
        done = _read_back(temporary, plan, hashes)
        return _finish(shards, temporary, done.model_copy(update={"fingerprint": shards.fingerprint, "maker": maker}))


def _finish(shards: ShardSet, temporary: LocalPlace, done: ShardDone) -> ShardDone:
    """Gives the shard its name. Of two writers the first wins, so that tar and document belong together.

    In a remote store two writers may finish in the same moment. With the same recipe they wrote the same bytes; if not,
    the reader finds that tar and document disagree.
    """
    with shards.lock(done.shard):
        if earlier := shards.done(done.shard):
            return earlier
        shards.shard_path(done.shard).put(temporary)
        write_document(shards.done_path(done.shard), done)
    return done


def _write_tar(path: Path, horizons: tuple[float, ...], plan: ShardPlan, samples: Iterable[SampleArrays]) -> list[str]:
    """Write all members; returns the blake3 of each sample's latents, in the plan's order."""
    hashes = []
    # Fixed names, ids, modes and times: the bytes depend on the samples alone.
    with path.open("wb") as file, TarWriter(file, user="rats", group="rats", encoder=False, mtime=0) as tar:
        for planned, (given, arrays) in zip(plan.samples, _exactly(samples, plan), strict=True):
            if given.key != planned.key:
                raise DataError(f"{plan.shard} expected sample {planned.key}, got {given.key}", "keep the plan's order")
            latents = save(_checked(planned.key, arrays, len(horizons)))
            tar.write({"__key__": planned.key, LATENTS: latents, "json": _describe(planned, horizons)})
            hashes.append(hash_bytes(latents))
    return hashes


def _exactly(samples: Iterable[SampleArrays], plan: ShardPlan) -> Iterator[SampleArrays]:
    """Passes the samples on and counts them. Raises DataError if there are too few or too many."""
    count = 0
    for count, sample in enumerate(samples, start=1):
        if count > len(plan.samples):
            break
        yield sample
    if count != len(plan.samples):
        raise DataError(f"{plan.shard} has {len(plan.samples)} planned samples, got {count} or more")


def _describe(sample: PlannedSample, horizons: tuple[float, ...]) -> bytes:
    """The json member. It names the sigma of each state, so that no state is mistaken for the final one."""
    return canonical_json({**sample.model_dump(), "sigmas": list(horizons)})


def _checked(key: str, arrays: dict[str, np.ndarray], rows: int) -> dict[str, np.ndarray]:
    """The two arrays of a sample, contiguous."""
    if set(arrays) != {"x", "x0"}:
        raise DataError(f"sample {key} has arrays {sorted(arrays)}, expected x and x0")
    x, x0 = arrays["x"], arrays["x0"]
    if x.ndim != 3 or x.shape[0] != rows or x0.shape != (rows - 1, *x.shape[1:]):
        raise DataError(
            f"sample {key} has shapes x {x.shape}, x0 {x0.shape}, expected ({rows}, T, C), ({rows - 1}, T, C)"
        )
    for name, array in arrays.items():
        if array.dtype != LATENT_DTYPE or not np.isfinite(array).all():
            raise DataError(
                f"sample {key}: {name} ({array.dtype}) must be finite {LATENT_DTYPE}", "check the model's dtype"
            )
    return {name: np.ascontiguousarray(array) for name, array in arrays.items()}


def _read_back(path: LocalPlace, plan: ShardPlan, hashes: list[str]) -> ShardDone:
    """Reads the tar back, compares the hashes, and notes where each sample's latents lie."""
    rows = []
    with tarfile.open(path, "r:") as tar:
        places = {member.name: (member.offset_data, member.size) for member in tar}
    with path.open("rb") as file:
        for sample, expected in zip(plan.samples, hashes, strict=True):
            offset, length = places[f"{sample.key}.{LATENTS}"]
            file.seek(offset)
            if hash_bytes(file.read(length)) != expected:
                raise StorageError(
                    f"{path} does not read back as written", "check the disk, run the same command again"
                )
            rows.append(
                IndexRow(**sample.model_dump(), shard=plan.shard, offset=offset, length=length, blake3=expected)
            )
    with remedy("run the same command again"):
        digest, size = hash_file(path)
    return ShardDone(shard=plan.shard, bytes=size, blake3=digest, rows=tuple(rows))


def as_stored(x: Tensor) -> Tensor:
    """Latents rounded as the store keeps them."""
    return x.to(getattr(torch, LATENT_DTYPE))


@remedy(REMAKE)
def read_sample(shards: ShardSet, row: IndexRow) -> dict[str, np.ndarray]:
    """A sample's `x` (H, T, C) and `x0` (H - 1, T, C), as stored, after its hash was checked.

    From a remote store only the sample's bytes are fetched, once, into the local cache (`pipeline.files.cache`).

    Raises:
        DataError: the shard is missing, cut or changed, or a link.
    """
    path = shards.shard_path(row.shard)
    read = partial(path.read_range, row.offset, row.offset + row.length)
    data = path.cached(row.blake3, read, partial(_is_whole, row))
    if not _is_whole(row, data):
        raise DataError(f"{path} is damaged at sample {row.key} ({len(data)} of {row.length} bytes)")
    return _parse(shards, row, data)


def _is_whole(row: IndexRow, data: bytes) -> bool:
    return len(data) == row.length and hash_bytes(data) == row.blake3


@remedy(REMAKE)
def verify_shard(shards: ShardSet, shard: str, expected: str | None = None) -> ShardDone:
    """Read every byte of a shard once; returns its document. `expected`: the tar's blake3 by the snapshot.

    Raises:
        DataError: the tar is not the recorded one, or a row of its document points at something else.
    """
    done = shards.done(shard)
    if done is None:
        raise DataError(f"{shards.shard_path(shard)} is missing", "run `rats stage rollout`")
    path = shards.shard_path(shard)
    ranges = [(row.offset, row.length) for row in done.rows]
    whole, parts = hash_ranges(path, ranges)
    if whole != done.blake3 or whole != (expected or whole):
        raise DataError(f"{path} is damaged (blake3 {whole[:12]}, not the recorded one)")
    for row, part in zip(done.rows, parts, strict=True):
        if part != row.blake3:
            raise DataError(f"{path} is damaged at sample {row.key}")
    return done


def _parse(shards: ShardSet, row: IndexRow, data: bytes) -> dict[str, np.ndarray]:
    """The arrays of a payload whose hash was checked. Another format is refused all the same."""
    try:
        arrays = load(bounded(data))
        x, x0 = arrays["x"], arrays["x0"]
    except (SafetensorError, KeyError, ValueError, TypeError) as error:
        raise DataError(f"{row.shard}: sample {row.key} is not in this format ({reason(error)})") from None
    rows, kinds = len(shards.recipe.horizons), {x.dtype, x0.dtype}
    shapes = (rows, *x.shape[1:]), (rows - 1, *x.shape[1:])
    if x.ndim != 3 or (x.shape, x0.shape) != shapes or kinds != {np.dtype(LATENT_DTYPE)}:
        raise DataError(f"{row.shard}: sample {row.key} has x {x.dtype} {x.shape}, x0 {x0.shape}")
    return {"x": x, "x0": x0}
