"""Rewards as columns: `scores/<fingerprint>/`, a Parquet file a shard, written after what it scores."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rats.pipeline.files.atomic import atomic_write
from rats.pipeline.files.places import Place, concurrently, matching
from rats.pipeline.files.reading import hash_bytes
from rats.pipeline.store.documents import read_all_sealed, read_sealed, write_sealed
from rats.pipeline.store.parquet import encode_rows, read_rows
from rats.pipeline.store.shard_set import ShardSet
from rats.schemas.errors import DataError
from rats.schemas.manifest import RewardRecord, ScoreRow, ScoresDone

REMEDY = "delete it and run `rats stage rollout`, which scores it again without the teacher"

MAX_BAD = 0.1
"""The share of samples that a reward may fail on, unless `--max-bad` says otherwise; trainers pass over them."""


def record_reward(shards: ShardSet, name: str, hashes: dict[str, str]) -> str:
    """Open a column of scores: writes `reward.json` once, returns the column's fingerprint."""
    record = RewardRecord(name=name, hashes=hashes)
    path = _record_path(shards, record.fingerprint)
    if not path.exists():
        write_sealed(path, record)
    return record.fingerprint


def reward_columns(shards: ShardSet) -> dict[str, RewardRecord]:
    """All columns, by fingerprint."""
    found = {}
    paths = matching(shards.root / "scores", "*/reward.json")
    for path, record in zip(paths, read_all_sealed(paths, RewardRecord, REMEDY), strict=True):
        if record.fingerprint != path.parent.name:
            raise DataError(f"{path} is the record of {record.fingerprint[:12]}, not of its folder; {REMEDY}")
        found[record.fingerprint] = record
    return found


def reward_column(shards: ShardSet, name: str) -> tuple[str, RewardRecord]:
    """The one column of that name."""
    found = [(key, record) for key, record in reward_columns(shards).items() if record.name == name]
    if len(found) != 1:
        raise DataError(f"{shards.root} has {len(found)} columns of scores named {name!r}; run `rats stage rollout`")
    return found[0]


def write_scores(shards: ShardSet, reward_fp: str, shard: str, rows: Sequence[ScoreRow]) -> None:
    """One row for each sample of a finished shard; the table first, what vouches for it last."""
    done = shards.done(shard)
    if done is None:
        raise DataError(f"{shard} has no samples to score yet; run `rats stage rollout`")
    if sorted(row.key for row in rows) != sorted(row.key for row in done.rows):
        raise DataError(f"the scores for {shard} are not for its samples; {REMEDY}")
    table, vouched = _paths(shards, reward_fp, shard)
    data = encode_rows(ScoreRow, sorted(rows, key=lambda row: row.key))
    atomic_write(table, data)
    write_sealed(vouched, ScoresDone(shard=shard, shard_blake3=done.blake3, rows=len(rows), blake3=hash_bytes(data)))


def scores_done(shards: ShardSet, reward_fp: str, shard: str) -> bool:
    """Whether the shard, as it is now, has its scores."""
    table, vouched = _paths(shards, reward_fp, shard)
    done = shards.done(shard)
    if done is None or not table.exists() or not vouched.exists():
        return False
    return read_sealed(vouched, ScoresDone, REMEDY).shard_blake3 == done.blake3


def score_rows(shards: ShardSet, reward_fp: str, shard: str) -> list[ScoreRow]:
    """A shard's scores, the failed ones included."""
    table, vouched = _paths(shards, reward_fp, shard)
    seal = read_sealed(vouched, ScoresDone, REMEDY)
    done = shards.done(shard)
    if seal.shard != shard or done is None or seal.shard_blake3 != done.blake3:
        raise DataError(f"{table} scores another {shard}; {REMEDY}")
    return read_rows(table, ScoreRow, seal.blake3, REMEDY)


def read_scores(shards: ShardSet, reward_fp: str, keys: Iterable[str]) -> dict[str, float]:
    """Score by key; failed samples are left out, a key that was never scored is an error."""
    wanted = set(keys)
    names = [path.name.partition(".")[0] for path in matching(shards.scores_folder(reward_fp), "rollout-*.done.json")]
    parts = concurrently(shards.root, lambda name: score_rows(shards, reward_fp, name), names)
    found = {row.key: row for rows in parts for row in rows if row.key in wanted}
    if missing := sorted(wanted - set(found)):
        raise DataError(f"{len(missing)} samples have no score, {missing[0]} first; run `rats stage rollout`")
    return {key: row.score for key, row in sorted(found.items()) if row.score is not None}


def _paths(shards: ShardSet, reward_fp: str, shard: str) -> tuple[Place, Place]:
    folder = shards.scores_folder(reward_fp)
    return folder / f"{shard}.parquet", folder / f"{shard}.done.json"


def _record_path(shards: ShardSet, reward_fp: str) -> Place:
    return shards.scores_folder(reward_fp) / "reward.json"
