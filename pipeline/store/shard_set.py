"""A shard set: `<store>/<fingerprint>/`, content-addressed, only ever added to, in a folder or a remote place.

Everything is found through `ShardSet`; the layout is docs/design.md#a-shard-set-on-disk.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

from pydantic import ValidationError

from rats.pipeline.files.atomic import atomic_write, create, file_lock
from rats.pipeline.files.places import Place, concurrently, is_remote, matching, open_place, sizes
from rats.pipeline.files.reading import hash_bytes, read_regular, refuse_linked_folders
from rats.pipeline.store.documents import check_version, create_sealed, read_all_sealed, read_sealed
from rats.pipeline.store.parquet import encode_rows, read_rows
from rats.pipeline.store.plans import distinct, needed, packed
from rats.schemas.canonical import canonical_json, sha256
from rats.schemas.errors import DataError, RetryLaterError
from rats.schemas.manifest import (
    IndexRow,
    PlannedSample,
    ShardDone,
    ShardPlan,
    Snapshot,
    snapshot_hash,
)
from rats.schemas.recipe import Recipe, fingerprint

REMAKE = "delete it and run `rats stage rollout`, which makes it again"
ROLLOUT = "run `rats stage rollout`"
_LOCK_SECONDS = 60.0
_NUMBER = "[0-9]" * 4


class ShardSet:
    """One recipe's shards, whether in a store or published into a folder.

    Attributes:
        root: The folder, local or remote (`pipeline.files.places`).
        recipe: What made every sample.
        fingerprint: sha256 of `recipe.json`.
    """

    def __init__(self, root: Place) -> None:
        """Read the recipe; see `open`."""
        self.root = root
        data = read_regular(self.root / "recipe.json", "name a folder that `rats stage rollout` has published")
        refuse_linked_folders(self.root, "copy it to where the link is")
        self.recipe = _parse_recipe(self.root / "recipe.json", data)
        self.fingerprint = sha256(data)
        if len(self.root.name) == 64 and self.root.name != self.fingerprint:
            raise DataError(f"{self.root} holds recipe {self.fingerprint[:12]}, not the one of its name; {REMAKE}")

    @classmethod
    def open(cls, folder: Place | str) -> ShardSet:
        """Open a store's `<fingerprint>` folder or a published one; a text may be a URL.

        Raises:
            DataError: no shard set, a damaged or foreign recipe, or a later format version.
        """
        return cls(open_place(folder))

    @classmethod
    def open_or_create(cls, store: Place | str, recipe: Recipe) -> ShardSet:
        """The set of `recipe` in `store`, made if it is new."""
        root = open_place(store) / fingerprint(recipe)
        if not (root / "recipe.json").exists():
            atomic_write(root / "recipe.json", canonical_json(recipe.model_dump(mode="json")))
        return cls(root)

    def shard_path(self, shard: str) -> Place:
        """The tar of a shard, there once it is whole."""
        return self.root / "shards" / f"{shard}.tar"

    def done_path(self, shard: str) -> Place:
        """The document that says a shard is whole."""
        return self.root / "shards" / f"{shard}.done.json"

    def plan_path(self, shard: str) -> Place:
        """The document that says what a shard will hold."""
        return self.root / "shards" / f"{shard}.plan.json"

    def embedding_path(self, prompt_id: str) -> Place:
        """Where a prompt's embeddings lie (`embeddings` reads and writes them)."""
        return self.root / "embeddings" / f"{prompt_id}.safetensors"

    def scores_folder(self, reward_fp: str) -> Place:
        """The folder of one reward's scores."""
        return self.root / "scores" / reward_fp

    @contextmanager
    def lock(self, name: str) -> Iterator[None]:
        """Exclusive among the processes of this machine; released when the holder dies. Nothing in a remote store."""
        with self._held(name, _LOCK_SECONDS) as held:
            if not held:
                place = self.root / "locks" / f"{name}.lock"
                raise RetryLaterError(f"{place} is held by another process; run the same command later")
            yield

    def claim(self, shard: str) -> AbstractContextManager[bool]:
        """Whether this process may make the shard now: False while another of this machine is at it.

        In a remote store always True: two may make a shard there, and the first to finish wins.
        """
        return self._held(f"{shard}.claim", 0.0)

    def _held(self, name: str, seconds: float) -> AbstractContextManager[bool]:
        if not isinstance(self.root, Path):
            return nullcontext(True)
        return file_lock(self.root / "locks" / f"{name}.lock", seconds)

    def plan(self, wanted: Sequence[PlannedSample], shard_samples: int) -> list[ShardPlan]:
        """The shards that hold `wanted`; samples that no shard was ever planned for get new ones.

        A plan is written before its first sample is made and never changed, so a killed or grown run finds
        every shard as it was. New shards are packed in the order of keys, not of the prompt file.
        """
        keys = distinct(wanted)
        with self.lock("plan"):
            while True:
                plans = self.plans()
                new = packed(wanted, plans, shard_samples)
                # a number that another driver has just taken: look again at what is planned now
                if all(create_sealed(self.plan_path(plan.shard), plan) for plan in new):
                    break
        return needed([*plans, *new], self.finished(), keys)

    def plans(self) -> list[ShardPlan]:
        """All plans of the set, by shard."""
        paths = matching(self.root / "shards", "rollout-*.plan.json")
        return read_all_sealed(paths, ShardPlan, "restore it from a copy of the store")

    def done(self, shard: str) -> ShardDone | None:
        """What a finished shard holds; None when it is still to be made (or its tar was deleted).

        Raises:
            DataError: the tar's size is not what was recorded.
        """
        tar, path = self.shard_path(shard), self.done_path(shard)
        if not path.exists() or not tar.exists():
            return None
        return self._checked(shard, read_sealed(path, ShardDone, REMAKE), tar.stat().st_size)

    def finished(self) -> list[ShardDone]:
        """`done` of every finished shard, by name."""
        found = sizes(self.root / "shards")
        names = sorted(name.removesuffix(".done.json") for name in found if name.endswith(".done.json"))
        names = [name for name in names if f"{name}.tar" in found]
        documents = read_all_sealed([self.done_path(name) for name in names], ShardDone, REMAKE)
        pairs = zip(names, documents, strict=True)
        return [self._checked(name, done, found[f"{name}.tar"]) for name, done in pairs]

    def _checked(self, shard: str, done: ShardDone, size: int) -> ShardDone:
        if {done.shard, *(row.shard for row in done.rows)} != {shard}:
            raise DataError(f"{self.done_path(shard)} describes another shard; {REMAKE}")
        if size != done.bytes:
            raise DataError(f"{self.shard_path(shard)} is damaged ({size} bytes, {done.bytes} recorded); {REMAKE}")
        return done

    def write_snapshot(self, wanted: Iterable[str]) -> Snapshot:
        """Name the samples of these keys; the same content gives the snapshot that is already there.

        Raises:
            DataError: a key is in no finished shard.
        """
        with self.lock("snapshot"):
            rows, shards = self._rows_of(set(wanted))
            name = snapshot_hash(rows)
            while True:
                old = concurrently(self.root, self.snapshot, self.snapshots())
                if same := [snapshot for snapshot in old if snapshot.hash == name and snapshot.shards == shards]:
                    return same[-1]
                if new := self._new_snapshot(rows, shards, 1 + self._last_number()):
                    return new

    def _new_snapshot(self, rows: list[IndexRow], shards: dict[str, str], number: int) -> Snapshot | None:
        """The index first, the manifest that vouches for it last; None when another driver took the number."""
        index, data = self.root / "index" / f"{number:04d}.parquet", encode_rows(IndexRow, rows)
        snapshot = Snapshot(
            number=number,
            fingerprint=self.fingerprint,
            hash=snapshot_hash(rows),
            samples=len(rows),
            shards=shards,
            index=index.name,
            index_blake3=hash_bytes(data),
        )
        if is_remote(index) and not create(index, data):
            return None
        if not is_remote(index):
            atomic_write(index, data)  # under the lock, what lies there is of a killed writer
        return snapshot if create_sealed(self._manifest_path(number), snapshot) else None

    def _last_number(self) -> int:
        """Of all snapshots, and in a remote store of all indexes: there one may be of a snapshot that is to come."""
        indexes = matching(self.root / "index", f"{_NUMBER}.parquet") if is_remote(self.root) else ()
        return max([*self.snapshots(), *(int(path.stem) for path in indexes)], default=0)

    def _rows_of(self, wanted: set[str]) -> tuple[list[IndexRow], dict[str, str]]:
        """Index rows in the order of keys, and the hashes of the shards they lie in.

        A sample that lies in two shards, after an import, counts in the first.
        """
        done = self.finished()
        found: dict[str, IndexRow] = {}
        for row in (row for part in done for row in part.rows if row.key in wanted):
            found.setdefault(row.key, row)
        if missing := sorted(wanted - set(found)):
            raise DataError(f"{len(missing)} samples are not rolled out yet, {missing[0]} first; {ROLLOUT}")
        rows = [found[key] for key in sorted(found)]
        used = {row.shard for row in rows}
        return rows, {part.shard: part.blake3 for part in done if part.shard in used}

    def snapshots(self) -> list[int]:
        """Numbers of all snapshots, rising."""
        return sorted(int(path.stem) for path in matching(self.root / "manifests", f"{_NUMBER}.json"))

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
        keys = [row.key for row in rows]
        if keys != sorted(set(keys)) or len(rows) != snapshot.samples or snapshot_hash(rows) != snapshot.hash:
            raise DataError(f"{path} does not hold the samples of snapshot {snapshot.number}; {ROLLOUT}")
        if not {row.shard for row in rows} <= set(snapshot.shards):
            raise DataError(f"{path} names a shard that snapshot {snapshot.number} does not know; {ROLLOUT}")
        return rows

    def _manifest_path(self, number: int) -> Place:
        return self.root / "manifests" / f"{number:04d}.json"


def _parse_recipe(path: Place, data: bytes) -> Recipe:
    try:
        content = json.loads(data)
        check_version(content, path)
        return Recipe.model_validate_json(data)
    except (ValidationError, ValueError, AttributeError, RecursionError) as error:
        raise DataError(f"{path} is no recipe of this rats ({' '.join(str(error).split())[:160]}); {ROLLOUT}") from None
