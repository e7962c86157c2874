"""Columns of scores, one for each reward: `scores/<fingerprint>/` with a Parquet file for each finished shard."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rats.pipeline.files.places import Place, matching
from rats.pipeline.files.reading import hash_bytes
from rats.pipeline.store import layout
from rats.pipeline.store.documents import read_all_documents, read_document, write_document
from rats.pipeline.store.parquet import encode_rows, read_rows
from rats.pipeline.store.shard_set import ShardSet
from rats.schemas.errors import DataError, remedy
from rats.schemas.maker import Maker
from rats.schemas.manifest import RewardRecord, ScoreRow, ScoresDone

REMEDY = "delete it and run `rats stage rollout`, which scores it again without the teacher"

MAX_BAD = 0.1
"""The default share of samples on which a reward may fail (`--max-bad`). The trainer leaves those samples out."""


def record_reward(shards: ShardSet, name: str, hashes: dict[str, str]) -> str:
    """Open a column of scores: writes `reward.json` once, returns the column's fingerprint."""
    record = RewardRecord(name=name, hashes=hashes)
    path = shards.path(layout.REWARD, reward=record.fingerprint)
    if not path.exists():
        write_document(path, record)
    return record.fingerprint


@remedy(REMEDY)
def reward_columns(shards: ShardSet) -> dict[str, RewardRecord]:
    """All columns, by fingerprint."""
    found = {}
    paths = matching(shards.root, layout.REWARD.wildcard())
    for path, record in zip(paths, read_all_documents(paths, RewardRecord), strict=True):
        if record.fingerprint != path.parent.name:
            raise DataError(f"{path} is the record of {record.fingerprint[:12]}, not of its folder")
        found[record.fingerprint] = record
    return found


def reward_column(shards: ShardSet, name: str) -> tuple[str, RewardRecord]:
    """The one column of that name."""
    found = [(key, record) for key, record in reward_columns(shards).items() if record.name == name]
    if len(found) != 1:
        raise DataError(f"{shards.root} has {len(found)} columns of scores named {name!r}", "run `rats stage rollout`")
    return found[0]


def write_scores(
    shards: ShardSet, reward_fp: str, shard: str, rows: Sequence[ScoreRow], maker: Maker | None = None
) -> None:
    """Writes one row for each sample of a finished shard: first the table, then the document with its hash.

    `maker`: what computed them, for the record.
    """
    done = shards.done(shard)
    if done is None:
        raise DataError(f"{shard} has no samples to score yet", "run `rats stage rollout`")
    if sorted(row.key for row in rows) != sorted(row.key for row in done.rows):
        raise DataError(f"the scores for {shard} are not for its samples", REMEDY)
    table, vouched = _paths(shards, reward_fp, shard)
    data = encode_rows(ScoreRow, sorted(rows, key=lambda row: row.key))
    table.write(data)
    write_document(
        vouched,
        ScoresDone(
            shard=shard,
            shard_blake3=done.blake3,
            rows=len(rows),
            blake3=hash_bytes(data),
            column=reward_fp,
            maker=maker,
        ),
    )


@remedy(REMEDY)
def scores_done(shards: ShardSet, reward_fp: str, shard: str, shard_blake3: str | None = None) -> bool:
    """Whether the shard, as it is now, has its scores.

    `shard_blake3`: the hash of its tar, read from the shard's document if it is not known.
    """
    table, vouched = _paths(shards, reward_fp, shard)
    digest = shard_blake3 or _blake3(shards, shard)
    if digest is None or not table.exists() or not vouched.exists():
        return False
    return read_scores_done(shards, reward_fp, shard).shard_blake3 == digest


@remedy(REMEDY)
def read_scores_done(shards: ShardSet, reward_fp: str, shard: str) -> ScoresDone:
    """The document of a shard's scores. Raises DataError if it is missing, damaged or of another column."""
    path = _paths(shards, reward_fp, shard)[1]
    seal = read_document(path, ScoresDone)
    if seal.column not in (None, reward_fp):
        raise DataError(f"{path} is of column {str(seal.column)[:12]}, not of its folder")
    return seal


@remedy(REMEDY)
def score_rows(shards: ShardSet, reward_fp: str, shard: str, shard_blake3: str | None = None) -> list[ScoreRow]:
    """A shard's scores, the failed ones included; `shard_blake3` as for `scores_done`."""
    table, vouched = _paths(shards, reward_fp, shard)
    seal = read_scores_done(shards, reward_fp, shard)
    if (seal.shard, seal.shard_blake3) != (shard, shard_blake3 or _blake3(shards, shard)):
        raise DataError(f"{table} scores another {shard}")
    return read_rows(table, ScoreRow, seal.blake3)


def read_scores(shards: ShardSet, reward_fp: str, keys: Iterable[str]) -> dict[str, float]:
    """Scores by key. Failed samples are left out; a key that was never scored is an error."""
    wanted = set(keys)
    paths = matching(shards.root, layout.SCORES_DONE.wildcard(reward=reward_fp))
    names = [path.name.partition(".")[0] for path in paths]
    parts = shards.root.concurrently(lambda name: score_rows(shards, reward_fp, name), names)
    found = {row.key: row for rows in parts for row in rows if row.key in wanted}
    if missing := sorted(wanted - set(found)):
        raise DataError(f"{len(missing)} samples have no score, {missing[0]} first", "run `rats stage rollout`")
    return {key: row.score for key, row in sorted(found.items()) if row.score is not None}


def finished_scores(shards: ShardSet) -> list[ScoresDone]:
    """The documents of all scores, of all columns and shards."""
    paths = matching(shards.root, layout.SCORES_DONE.wildcard())
    with remedy(REMEDY):
        return read_all_documents(paths, ScoresDone)


def _paths(shards: ShardSet, reward_fp: str, shard: str) -> tuple[Place, Place]:
    """The table, and the document that vouches for it."""
    parts = {"reward": reward_fp, "shard": shard}
    return shards.path(layout.SCORES, **parts), shards.path(layout.SCORES_DONE, **parts)


def _blake3(shards: ShardSet, shard: str) -> str | None:
    done = shards.done(shard)
    return done.blake3 if done else None
