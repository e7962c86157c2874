"""Verifies a shard set from somebody else, to the last byte, before anything of it is used.

Seals and hashes show only that a set is undamaged: whoever writes false data can seal it too. So everything that a
reader relies on is checked directly: names, identities, each member of each tar, every array, and the noise that each
sample starts from.
"""

from __future__ import annotations

import json
import os
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rats.pipeline.files.atomic import link_or_copy, storage_errors
from rats.pipeline.files.reading import hash_file
from rats.pipeline.noise import noise
from rats.pipeline.store import layout
from rats.pipeline.store.embeddings import read_embedding
from rats.pipeline.store.scores import reward_columns, score_rows, scores_done
from rats.pipeline.store.shard_set import ShardSet
from rats.pipeline.store.shards import LATENTS, read_sample, verify_shard
from rats.schemas.errors import DataError, StorageError
from rats.schemas.identity import prompt_id, sample_key
from rats.schemas.manifest import IndexRow, RewardRecord, ScoreRow, ShardDone, Snapshot
from rats.schemas.recipe import fingerprint

Advance = Callable[[int], None]

FETCH = "fetch the set again; nothing was imported"
_BLOCK = tarfile.BLOCKSIZE
_LONGEST_TEXT = 1 << 20
_ROUNDING = 0.01
"""Tolerance for the noise: float16's rounding of the largest values, and another machine's logarithm."""


@dataclass(frozen=True)
class VerifiedSet:
    """A verified set. `parts` are its shards, `scores` rows by column and key, `embeddings` blake3 by prompt id."""

    shards: ShardSet
    snapshot: Snapshot
    index: list[IndexRow]
    parts: list[ShardDone]
    records: dict[str, RewardRecord]
    scores: dict[str, dict[str, ScoreRow]]
    embeddings: dict[str, str]


def verify_untrusted(folder: Path, advance: Advance = lambda count: None) -> VerifiedSet:
    """Reads and checks everything that the newest snapshot of a local folder needs. Reports progress to `advance`.

    Raises:
        DataError: something is damaged, missing, or not what a rollout of this recipe writes.
    """
    try:
        return _examine(ShardSet.open(folder), advance)
    except (DataError, StorageError) as error:
        # the store's advice, to roll out again, does not help somebody who has only this folder
        raise error.with_remedy(FETCH) from None


def _examine(shards: ShardSet, advance: Advance) -> VerifiedSet:
    if fingerprint(shards.recipe) != shards.fingerprint:
        raise DataError(f"{shards.path(layout.RECIPE)} is not spelled as rats spells it")
    snapshot = shards.snapshot()
    index = shards.index(snapshot)
    parts = []
    for shard, digest in sorted(snapshot.shards.items()):
        parts.append(_part(shards, shard, digest))
        advance(len(parts[-1].rows))
    _check_index(shards, index, parts)
    records = reward_columns(shards)
    scores = {column: _scores(shards, column, parts) for column in records}
    return VerifiedSet(shards, snapshot, index, parts, records, scores, _embeddings(shards, parts))


def _part(shards: ShardSet, shard: str, digest: str) -> ShardDone:
    """A shard's document, after every byte of its tar was checked against it."""
    done = verify_shard(shards, shard, digest)
    path = shards.shard_path(shard)
    if len({row.key for row in done.rows}) != len(done.rows):
        raise DataError(f"{path} holds a sample twice")
    for row in done.rows:
        check_sample(shards, row)
    with path.open_plain() as file:
        _check_members(file, path, done, list(shards.recipe.horizons))
    return done


def check_sample(shards: ShardSet, row: IndexRow) -> None:
    """Checks that its key is that of prompt and noise index, that it is finite, and that it starts from its noise."""
    if row.prompt_id != prompt_id(row.prompt) or row.key != sample_key(row.prompt_id, row.noise_index):
        raise DataError(f"{row.shard}: sample {row.key} is not named after its prompt {row.prompt!r}")
    arrays = read_sample(shards, row)
    if not all(np.isfinite(array).all() for array in arrays.values()):
        raise DataError(f"{row.shard}: sample {row.key} has values that are not finite")
    start = noise(shards.recipe.seed, row.prompt_id, row.noise_index, arrays["x"].shape[1:]).numpy()
    if not np.allclose(arrays["x"][0], start, rtol=0, atol=_ROUNDING):
        raise DataError(f"{row.shard}: sample {row.key} does not start from the noise of its recipe")


def _check_members(file: Any, path: Any, done: ShardDone, horizons: list[float]) -> None:
    """Checks that the tar holds two plain members for each sample, in the order of the rows, and nothing else."""
    position = 0
    for row in done.rows:
        described = {"key": row.key, "prompt_id": row.prompt_id, "prompt": row.prompt, "noise_index": row.noise_index}
        for _ in range(2):
            name, start, size = _member(file, path, position)
            if name == f"{row.key}.{LATENTS}":
                good = (start, size) == (row.offset, row.length)
            else:
                good = name == f"{row.key}.json" and _read_json(file, size) == described | {"sigmas": horizons}
            if not good:
                raise DataError(f"{path}: member {name!r} is not what is recorded of sample {row.key}")
            position = start + size + -size % _BLOCK
    file.seek(position)
    if done.bytes - position > _LONGEST_TEXT or any(file.read(_LONGEST_TEXT)):
        raise DataError(f"{path} holds more than its samples")


def _member(file: Any, path: Any, position: int) -> tuple[str, int, int]:
    """Name, offset and size of the plain file whose header lies at `position`."""
    file.seek(position)
    try:
        header = tarfile.TarInfo.frombuf(file.read(_BLOCK), "utf-8", "strict")
    except (tarfile.TarError, ValueError) as error:
        raise DataError(f"{path} is no tar of samples at byte {position} ({error})") from None
    if header.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or header.size < 0:
        raise DataError(f"{path}: member {header.name!r} is no plain file")
    return header.name, position + _BLOCK, header.size


def _read_json(file: Any, size: int) -> Any:
    """The parsed JSON; None if it is invalid, which equals no expected description."""
    try:
        return json.loads(file.read(min(size, _LONGEST_TEXT)))
    except (ValueError, RecursionError):
        return None


def _check_index(shards: ShardSet, index: list[IndexRow], parts: list[ShardDone]) -> None:
    found: dict[str, str] = {}
    for row in (row for part in parts for row in part.rows):
        if found.setdefault(row.key, row.blake3) != row.blake3:
            raise DataError(f"{shards.root} holds sample {row.key} with two contents")
    rows = {row for part in parts for row in part.rows}
    if strangers := [row.key for row in index if row not in rows]:
        raise DataError(f"the index of {shards.root} places sample {strangers[0]} where it is not")


def _scores(shards: ShardSet, column: str, parts: list[ShardDone]) -> dict[str, ScoreRow]:
    """Rows by key, of the shards that have their scores."""
    found = {}
    for part in (part for part in parts if scores_done(shards, column, part.shard, part.blake3)):
        rows = score_rows(shards, column, part.shard, part.blake3)
        if sorted(row.key for row in rows) != sorted(row.key for row in part.rows):
            raise DataError(f"{shards.scores_folder(column)} does not score the samples of {part.shard}")
        found.update({row.key: row for row in rows})
    return found


def _embeddings(shards: ShardSet, parts: list[ShardDone]) -> dict[str, str]:
    """Hashes of all embeddings. If one is missing, a trainer would need the text encoders."""
    found = {}
    for prompt in sorted({row.prompt_id for part in parts for row in part.rows}):
        read_embedding(shards, prompt)
        found[prompt] = hash_file(shards.embedding_path(prompt))[0]
    return found


@contextmanager
def plain_view(folder: Path) -> Iterator[Path]:
    """The folder itself. In the Hub's cache the files are links to blobs: then a temporary folder of hardlinks.

    Raises:
        DataError: no folder, or a link that leads anywhere else.
    """
    folder = Path(os.path.realpath(folder))  # unlike `resolve`, it takes links that lead in a circle
    if not folder.is_dir():
        raise DataError(f"no folder {folder}", "name one that `rats shards export` wrote or the Hub's client fetched")
    files = list(_files(folder))
    if not any(path.is_symlink() for path in files):
        yield folder
        return
    blobs = {path: _blob(folder, path) if path.is_symlink() else path for path in files}
    # beside the blobs, since hardlinks work only within one file system
    with storage_errors(folder), tempfile.TemporaryDirectory(dir=folder.parent.parent, prefix=".rats-import-") as view:
        for path, blob in blobs.items():
            link_or_copy(blob, Path(view) / path.relative_to(folder))
        yield Path(view)


def _files(folder: Path) -> Iterator[Path]:
    """Files and links of the set in a folder, without following links. Other files in it are ignored."""
    for part in layout.TOPS:
        if (folder / part).is_symlink() or not (folder / part).is_dir():
            yield from [folder / part] if os.path.lexists(folder / part) else []
            continue
        for here, folders, names in os.walk(folder / part):
            yield from (Path(here, name) for name in names)
            yield from (Path(here, name) for name in folders if Path(here, name).is_symlink())


def _blob(folder: Path, path: Path) -> Path:
    """The blob that a link in `<cache>/<repository>/snapshots/<commit>/` leads to. Other targets are refused."""
    target = Path(os.path.realpath(path))
    allowed = (folder, folder.parents[1] / "blobs", folder.parents[2] / "blobs") if len(folder.parents) > 2 else ()
    if folder.parent.name != "snapshots" or not target.is_file() or not any(target.is_relative_to(p) for p in allowed):
        raise DataError(
            f"{path} is a link to {target}, which is refused", "fetch the set with `hf download --local-dir`"
        )
    return target
