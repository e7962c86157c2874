"""A shard set on disk: `<store>/<fingerprint>/`, content-addressed, only ever added to.

Everything is found through `ShardSet`; the layout is DESIGN.md section 2's.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout
from pydantic import ValidationError

from rats.pipeline import scores
from rats.pipeline.atomic import atomic_write, storage_errors
from rats.pipeline.sealed import check_version, read_regular, read_sealed, write_sealed
from rats.pipeline.tables import read_rows, write_rows
from rats.schemas.canonical import canonical_json, sha256
from rats.schemas.errors import ConfigError, DataError, RetryLaterError
from rats.schemas.manifest import (
    IndexRow,
    PlannedSample,
    RewardRecord,
    ScoreRow,
    ShardDone,
    ShardPlan,
    Snapshot,
    snapshot_hash,
)
from rats.schemas.recipe import Recipe, fingerprint

REMAKE = "delete it and run `rats stage rollout`, which makes it again"
ROLLOUT = "run `rats stage rollout`"
_LOCK_SECONDS = 60.0


class ShardSet:
    """One recipe's shards, whether in a store or published into a folder.

    Attributes:
        root: The folder.
        recipe: What made every sample.
        fingerprint: sha256 of `recipe.json`.
    """

    def __init__(self, root: Path) -> None:
        """Read the recipe; see `open`."""
        self.root = Path(root)
        data = read_regular(self.root / "recipe.json", "name a folder that `rats stage rollout` has published")
        self.recipe = _parse_recipe(self.root / "recipe.json", data)
        self.fingerprint = sha256(data)
        if len(self.root.name) == 64 and self.root.name != self.fingerprint:
            raise DataError(f"{self.root} holds recipe {self.fingerprint[:12]}, not the one of its name; {REMAKE}")

    @classmethod
    def open(cls, folder: Path) -> ShardSet:
        """Open a store's `<fingerprint>` folder or a published one.

        Raises:
            DataError: no shard set, a damaged or foreign recipe, or a later format version.
        """
        return cls(folder)

    @classmethod
    def open_or_create(cls, store: Path, recipe: Recipe) -> ShardSet:
        """The set of `recipe` in `store`, made if it is new."""
        root = Path(store) / fingerprint(recipe)
        if not (root / "recipe.json").exists():
            atomic_write(root / "recipe.json", canonical_json(recipe.model_dump(mode="json")))
        return cls(root)

    def shard_path(self, shard: str) -> Path:
        """The tar of a shard, there once it is whole."""
        return self.root / "shards" / f"{shard}.tar"

    def done_path(self, shard: str) -> Path:
        """The document that says a shard is whole."""
        return self.root / "shards" / f"{shard}.done.json"

    def plan_path(self, shard: str) -> Path:
        """The document that says what a shard will hold."""
        return self.root / "shards" / f"{shard}.plan.json"

    def embedding_path(self, prompt_id: str) -> Path:
        """Where a prompt's embeddings lie (`pipeline.embeddings` reads and writes them)."""
        return self.root / "embeddings" / f"{prompt_id}.safetensors"

    def scores_folder(self, reward_fp: str) -> Path:
        """The folder of one reward's scores."""
        return self.root / "scores" / reward_fp

    @contextmanager
    def lock(self, name: str) -> Iterator[None]:
        """Exclusive among the processes of this machine; released when the holder dies."""
        path = self.root / "locks" / f"{name}.lock"
        with storage_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            lock = FileLock(path)
            try:
                lock.acquire(timeout=_LOCK_SECONDS)
            except Timeout:
                raise RetryLaterError(f"{path} is held by another process; run the same command later") from None
        try:
            yield
        finally:
            lock.release()

    def plan(self, wanted: Sequence[PlannedSample], shard_samples: int) -> list[ShardPlan]:
        """The shards that hold `wanted`; samples that no shard was ever planned for get new ones.

        A plan is written before its first sample is made and never changed, so a killed or grown run finds
        every shard as it was. New shards are packed in the order of keys, not of the prompt file.
        """
        keys = _distinct(wanted)
        with self.lock("plan"):
            plans = self.plans()
            planned = {sample.key for plan in plans for sample in plan.samples}
            new = sorted((sample for sample in wanted if sample.key not in planned), key=lambda sample: sample.key)
            first = 1 + max((_number(plan.shard) for plan in plans), default=-1)
            for offset, start in enumerate(range(0, len(new), shard_samples)):
                samples = tuple(new[start : start + shard_samples])
                plans.append(ShardPlan(shard=f"rollout-{first + offset:06d}", samples=samples))
                write_sealed(self.plan_path(plans[-1].shard), plans[-1])
        return [plan for plan in plans if any(sample.key in keys for sample in plan.samples)]

    def plans(self) -> list[ShardPlan]:
        """All plans of the set, by shard."""
        paths = sorted((self.root / "shards").glob("rollout-*.plan.json"))
        return [read_sealed(path, ShardPlan, "restore it from a copy of the store") for path in paths]

    def done(self, shard: str) -> ShardDone | None:
        """What a finished shard holds; None when it is still to be made (or its tar was deleted).

        Raises:
            DataError: the tar's size is not what was recorded.
        """
        tar, path = self.shard_path(shard), self.done_path(shard)
        if not tar.exists() or not path.exists():
            return None
        done = read_sealed(path, ShardDone, REMAKE)
        if (size := tar.stat().st_size) != done.bytes:
            raise DataError(f"{tar} is damaged ({size} bytes, {done.bytes} recorded); {REMAKE}")
        return done

    def write_snapshot(self, wanted: Iterable[str]) -> Snapshot:
        """Name the samples of these keys; the same content gives the snapshot that is already there.

        Raises:
            DataError: a key is in no finished shard.
        """
        with self.lock("snapshot"):
            rows, shards = self._rows_of(set(wanted))
            old = [self.snapshot(number) for number in self.snapshots()]
            name = snapshot_hash(rows)
            same = [snapshot for snapshot in old if snapshot.hash == name and snapshot.shards == shards]
            return same[-1] if same else self._new_snapshot(rows, shards, 1 + max(self.snapshots(), default=0))

    def _new_snapshot(self, rows: list[IndexRow], shards: dict[str, str], number: int) -> Snapshot:
        """The index first, the manifest that vouches for it last."""
        index = f"{number:04d}.parquet"
        snapshot = Snapshot(
            number=number,
            fingerprint=self.fingerprint,
            hash=snapshot_hash(rows),
            samples=len(rows),
            shards=shards,
            index=index,
            index_blake3=write_rows(self.root / "index" / index, IndexRow, rows),
        )
        write_sealed(self._manifest_path(number), snapshot)
        return snapshot

    def _rows_of(self, wanted: set[str]) -> tuple[list[IndexRow], dict[str, str]]:
        """Index rows in the order of keys, and the hashes of the shards they lie in."""
        done = [done for plan in self.plans() if (done := self.done(plan.shard))]
        rows = sorted((row for part in done for row in part.rows if row.key in wanted), key=lambda row: row.key)
        if missing := sorted(wanted - {row.key for row in rows}):
            raise DataError(f"{len(missing)} samples are not rolled out yet, {missing[0]} first; {ROLLOUT}")
        used = {row.shard for row in rows}
        return rows, {part.shard: part.blake3 for part in done if part.shard in used}

    def snapshots(self) -> list[int]:
        """Numbers of all snapshots, rising."""
        paths = (self.root / "manifests").glob("[0-9][0-9][0-9][0-9].json")
        return sorted(int(path.stem) for path in paths)

    def snapshot(self, number: int | None = None) -> Snapshot:
        """A snapshot by number, the newest by default.

        Raises:
            DataError: there is none, it is damaged, or it belongs to another recipe.
        """
        numbers = self.snapshots()
        if not numbers and number is None:
            raise DataError(f"{self.root} has no snapshot; {ROLLOUT}")
        path = self._manifest_path(numbers[-1] if number is None else number)
        snapshot = read_sealed(path, Snapshot, ROLLOUT)
        if snapshot.fingerprint != self.fingerprint:
            raise DataError(
                f"{path} is of recipe {snapshot.fingerprint[:12]}, this set is {self.fingerprint[:12]}; {ROLLOUT}"
            )
        return snapshot

    def index(self, snapshot: Snapshot) -> list[IndexRow]:
        """The snapshot's rows in the order of keys, checked against its hash."""
        path = self.root / "index" / snapshot.index
        rows = read_rows(path, IndexRow, snapshot.index_blake3, ROLLOUT)
        if len(rows) != snapshot.samples or snapshot_hash(rows) != snapshot.hash:
            raise DataError(f"{path} does not hold the samples of snapshot {snapshot.number}; {ROLLOUT}")
        if not {row.shard for row in rows} <= set(snapshot.shards):
            raise DataError(f"{path} names a shard that snapshot {snapshot.number} does not know; {ROLLOUT}")
        return rows

    def _manifest_path(self, number: int) -> Path:
        return self.root / "manifests" / f"{number:04d}.json"

    def record_reward(self, name: str, hashes: dict[str, str]) -> str:
        """Open a column of scores: writes `reward.json` once, returns the column's fingerprint."""
        return scores.record_reward(self, RewardRecord(name=name, hashes=hashes))

    def rewards(self) -> dict[str, RewardRecord]:
        """All columns of scores, by fingerprint."""
        return scores.rewards(self)

    def reward_named(self, name: str) -> tuple[str, RewardRecord]:
        """Fingerprint and record of the one column of that name (DataError: none, or several)."""
        return scores.reward_named(self, name)

    def write_scores(self, reward_fp: str, shard: str, rows: Sequence[ScoreRow]) -> None:
        """A finished shard's scores, one row for each of its samples."""
        scores.write_scores(self, reward_fp, shard, rows)

    def scores_done(self, reward_fp: str, shard: str) -> bool:
        """Whether the shard, as it is now, has its scores."""
        return scores.scores_done(self, reward_fp, shard)

    def score_rows(self, reward_fp: str, shard: str) -> list[ScoreRow]:
        """A shard's scores, the failed ones included."""
        return scores.score_rows(self, reward_fp, shard)

    def read_scores(self, reward_fp: str, keys: Iterable[str]) -> dict[str, float]:
        """Score by key; failed samples are left out (DataError: a key was never scored)."""
        return scores.read_scores(self, reward_fp, keys)


def _distinct(wanted: Sequence[PlannedSample]) -> set[str]:
    keys: set[str] = set()
    for sample in wanted:
        if sample.key in keys:
            raise ConfigError(f"sample {sample.key} ({sample.prompt!r}) is wanted twice; remove the repeated prompt")
        keys.add(sample.key)
    return keys


def _number(shard: str) -> int:
    return int(shard.rpartition("-")[2])


def _parse_recipe(path: Path, data: bytes) -> Recipe:
    try:
        content = json.loads(data)
        check_version(content, path)
        return Recipe.model_validate_json(data)
    except (ValidationError, ValueError, AttributeError, RecursionError) as error:
        raise DataError(f"{path} is no recipe of this rats ({' '.join(str(error).split())[:160]}); {ROLLOUT}") from None
