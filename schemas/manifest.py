"""The store's documents: plans, finished shards, index rows, snapshots and scores.

Every name that becomes a path must match a pattern here, so that no document can point outside its folder.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Final, Literal

from pydantic import Field, model_validator

from rats.schemas.canonical import canonical_json, sha256
from rats.schemas.identity import KEY_PATTERN
from rats.schemas.maker import Maker
from rats.schemas.record import Record

FORMAT_VERSION: Final = 1

HASH_PATTERN = "[0-9a-f]{64}"
SHARD_PATTERN = "rollout-[0-9]{6}"

Key = Annotated[str, Field(pattern=KEY_PATTERN, max_length=80)]
Hash = Annotated[str, Field(pattern=f"^{HASH_PATTERN}$")]
ShardName = Annotated[str, Field(pattern=f"^{SHARD_PATTERN}$")]
Count = Annotated[int, Field(ge=0)]


class PlannedSample(Record):
    """A sample that is to be made."""

    key: Key
    prompt_id: Hash
    prompt: str
    noise_index: Count


class ShardPlan(Record):
    """The samples of a shard. It is written before the first of them is made, and never changed."""

    shard: ShardName
    samples: Annotated[tuple[PlannedSample, ...], Field(min_length=1)]


class IndexRow(Record):
    """Where a sample lies: `length` bytes of the tar from `offset` on are its latents.safetensors, of hash `blake3`."""

    key: Key
    prompt_id: Hash
    prompt: str
    noise_index: Count
    shard: ShardName
    offset: Count
    length: Count
    blake3: Hash
    status: Literal["ok"] = "ok"


class ShardDone(Record):
    """Written after the tar: its size, the blake3 of the whole file, its rows in file order.

    `fingerprint` is the set's, and `maker` what computed the shard; shards of before they were recorded have neither.
    """

    shard: ShardName
    bytes: Count
    blake3: Hash
    rows: Annotated[tuple[IndexRow, ...], Field(min_length=1)]
    fingerprint: Hash | None = None
    maker: Maker | None = None


class Snapshot(Record):
    """An immutable, numbered list of samples; `hash` names its content, wherever the samples lie.

    `shards` maps a shard's name to the blake3 of its tar; `index` is a file in `index/`.
    """

    format_version: Literal[1] = FORMAT_VERSION
    number: Annotated[int, Field(ge=1, le=9999)]
    fingerprint: Hash
    hash: Hash
    samples: Count
    shards: dict[ShardName, Hash]
    index: Annotated[str, Field(pattern=r"^[0-9]{4}\.parquet$")]
    index_blake3: Hash


class ScoreRow(Record):
    """The score of one stored final latent: a finite number, or the status "failed" and an error."""

    key: Key
    score: float | None
    status: Literal["ok", "failed"] = "ok"
    error: str | None = None

    @model_validator(mode="after")
    def _score_or_error(self) -> ScoreRow:
        if (self.status == "ok") != (self.score is not None):
            raise ValueError("a row has a score exactly when its status is ok")
        return self


class ScoresDone(Record):
    """Written after a shard's scores: what was scored (`shard_blake3`), and the Parquet file's hash.

    `column` is the fingerprint of the column, `maker` what computed the scores, as far as they were recorded.
    """

    shard: ShardName
    shard_blake3: Hash
    rows: Count
    blake3: Hash
    column: Hash | None = None
    maker: Maker | None = None


class RewardRecord(Record):
    """What a column of scores was made with: `hashes` of everything that decides it (reward, VAE, preprocessing...)."""

    name: str
    hashes: dict[str, str]

    @property
    def fingerprint(self) -> str:
        """The column's address, `scores/<fingerprint>/`."""
        return sha256(canonical_json(self.model_dump(mode="json")))


def snapshot_hash(rows: Iterable[IndexRow]) -> str:
    """sha256 over the sorted pairs (key, blake3). It does not depend on order, shards or storage."""
    return sha256(canonical_json(sorted([row.key, row.blake3] for row in rows)))
