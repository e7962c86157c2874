"""What tests do to a set, and how they read all of it: bits flipped, files cut, documents sealed anew over lies."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rats.pipeline.files.reading import hash_bytes
from rats.pipeline.store.embeddings import read_embedding
from rats.pipeline.store.publish import publish
from rats.pipeline.store.scores import read_scores, reward_column
from rats.pipeline.store.shard_set import ShardSet
from rats.pipeline.store.shards import verify_shard
from rats.schemas.canonical import canonical_json
from tests.support.shards import embed, in_order, score, wanted, write_set


def publish_set(folder: Path, prompts: int = 3) -> Path:
    """A published set with everything in it, for tests that copy it before they spoil it."""
    shards = write_set(folder / "store", wanted(prompts))
    reward = score(shards)
    embed(shards, wanted(prompts))
    publish(shards, shards.snapshot(), folder / "out", [reward])
    return folder / "out"


def copied(folder: Path, to: Path) -> Path:
    """A copy to be spoiled: without locks, and its files can be written, unlike those of a set."""
    ignored = shutil.ignore_patterns("locks")
    return Path(shutil.copytree(folder, to, copy_function=shutil.copyfile, ignore=ignored, dirs_exist_ok=True))


def files(folder: Path) -> list[Path]:
    """All files of a set but its locks, in one order."""
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.parent.name != "locks")


def used(folder: Path) -> str:
    """Hash of all that a training run over one epoch is given."""
    digest = hashlib.sha256()
    shards = ShardSet.open(folder)
    snapshot = shards.snapshot()
    # a fuzzed snapshot may claim more samples than islice can count
    for _, (row, arrays) in zip(range(snapshot.samples), in_order(shards, snapshot, seed=0), strict=False):
        digest.update(repr((row, sorted(read_embedding(shards, row.prompt_id).items()))).encode())
        digest.update(arrays["x"].tobytes() + arrays["x0"].tobytes())
    column = reward_column(shards, "hps")[0]
    digest.update(repr(read_scores(shards, column, [row.key for row in shards.index(snapshot)])).encode())
    return digest.hexdigest()


def verify_all(folder: Path) -> None:
    """Read every byte of the set's shards and of what vouches for them."""
    shards = ShardSet.open(folder)
    for name, digest in shards.snapshot().shards.items():
        verify_shard(shards, name, digest)
    shards.plans()


def read_all(folder: Path) -> None:
    """What training reads, and `rats shards verify`."""
    used(folder)
    verify_all(folder)


def flipped(data: bytes, generator: random.Random) -> bytes:
    """The same bytes, one bit of them turned."""
    broken, bit = bytearray(data), generator.randrange(8 * len(data))
    broken[bit // 8] ^= 1 << bit % 8
    return bytes(broken)


def cut(data: bytes, generator: random.Random) -> bytes:
    """The first bytes, at least one of them missing."""
    return data[: generator.choice([0, generator.randrange(len(data)), len(data) - 1])]


def sealed(content: Any) -> bytes:
    """A document whose seal is right, whatever it says; NaN and other spellings that ours never has included."""
    plain = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    if not isinstance(content, dict):
        return plain
    text = {**content, "seal": hash_bytes(plain)}
    return json.dumps(text, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def unsealed(path: Path) -> dict[str, Any]:
    """What a document says, without its seal."""
    return {name: value for name, value in json.loads(path.read_bytes()).items() if name != "seal"}


def reseal(path: Path, **changes: Any) -> None:
    """Change a document's fields and seal it anew."""
    path.write_bytes(sealed(unsealed(path) | changes))


def vouch(folder: Path) -> None:
    """Make every document agree with the shards, index and scores as they are now: damage becomes a lie."""
    shards = sorted((folder / "shards").glob("*.tar"))
    hashes = {path.stem: hash_bytes(path.read_bytes()) for path in shards}
    for path in shards:
        reseal(path.with_suffix(".done.json"), blake3=hashes[path.stem], bytes=path.stat().st_size)
    for table in (folder / "scores").glob("*/*.parquet"):
        shard_hash = {"shard_blake3": hashes[table.stem]} if table.stem in hashes else {}
        reseal(table.with_suffix(".done.json"), blake3=hash_bytes(table.read_bytes()), **shard_hash)
    index = hash_bytes((folder / "index" / "0001.parquet").read_bytes())
    name = hashlib.sha256((folder / "recipe.json").read_bytes()).hexdigest()
    reseal(folder / "manifests" / "0001.json", shards=hashes, index_blake3=index, fingerprint=name)


def fork(work: Callable[[], object]) -> int:
    """A child of our own that needs no second import of torch; it leaves no trace but its files."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of threads, which do not write here
        child = os.fork()
    if child == 0:
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    return child


def canonical_rows(rows: list[Any]) -> str:
    """A snapshot's hash for rows that need not be valid."""
    pairs = sorted([str(row.get("key")), str(row.get("blake3"))] for row in rows)
    return hashlib.sha256(canonical_json(pairs)).hexdigest()
