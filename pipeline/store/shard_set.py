"""A shard set: `<store>/<fingerprint>/`, in a local folder or a remote store. Files are added and never changed.

All access is by `ShardSet`. `layout` has the names of the files; docs/design.md#a-shard-set-on-disk has the reasons.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from pydantic import ValidationError

from rats.pipeline.files.places import Place, matching, open_place
from rats.pipeline.files.reading import hash_bytes
from rats.pipeline.store import layout
from rats.pipeline.store.documents import check_version, create_document, read_all_documents, read_document
from rats.pipeline.store.parquet import encode_rows, read_rows
from rats.pipeline.store.plans import distinct_keys, needed_plans, new_plans
from rats.schemas.canonical import canonical_json, sha256
from rats.schemas.errors import DataError, RetryLaterError, reason, remedy
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
FOREIGN = "delete it and the shard beside it and run `rats stage rollout`, which makes them again"
ROLLOUT = "run `rats stage rollout`"
_LOCK_SECONDS = 60.0


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
        path = self.path(layout.RECIPE)
        with remedy("name a folder that `rats stage rollout` has published"):
            data = path.read()
        with remedy("copy it to where the link is"):
            self.root.refuse_links()
        self.recipe = _parse_recipe(path, data)
        self.fingerprint = sha256(data)
        if len(self.root.name) == 64 and self.root.name != self.fingerprint:
            raise DataError(f"{self.root} holds recipe {self.fingerprint[:12]}, not the one of its name", REMAKE)

    @classmethod
    def open(cls, folder: Place | Path | str) -> ShardSet:
        """Open a store's `<fingerprint>` folder or a published one; a text may be a URL.

        Raises:
            DataError: no shard set, a recipe that is damaged or of another set, or a later format version.
        """
        return cls(open_place(folder))

    @classmethod
    def open_or_create(cls, store: Place | Path | str, recipe: Recipe) -> ShardSet:
        """The set of `recipe` in `store`, created if there is none."""
        root = open_place(store) / fingerprint(recipe)
        if not is_set(root):
            (root / layout.RECIPE.name()).write(canonical_json(recipe.model_dump(mode="json")))
        return cls(root)

    def path(self, kind: layout.Kind, **parts: str | int) -> Place:
        """The path of the file of a kind with these parts."""
        return self.root / kind.name(**parts)

    def shard_path(self, shard: str) -> Place:
        """The tar of a shard. It exists once it is whole."""
        return self.path(layout.SHARD, shard=shard)

    def done_path(self, shard: str) -> Place:
        """The document of a finished shard."""
        return self.path(layout.DONE, shard=shard)

    def plan_path(self, shard: str) -> Place:
        """The document with the plan of a shard."""
        return self.path(layout.PLAN, shard=shard)

    def embedding_path(self, prompt_id: str) -> Place:
        """Where a prompt's embeddings lie (`embeddings` reads and writes them)."""
        return self.path(layout.EMBEDDING, prompt=prompt_id)

    def scores_folder(self, reward_fp: str) -> Place:
        """The folder of one reward's scores."""
        return self.path(layout.REWARD, reward=reward_fp).parent

    def encoded(self) -> set[str]:
        """Ids of all prompts that have embeddings."""
        folder = layout.EMBEDDING.folder
        names = (layout.EMBEDDING.parts(f"{folder}/{name}") for name in (self.root / folder).sizes())
        return {parts["prompt"] for parts in names if parts}

    @contextmanager
    def lock(self, name: str) -> Iterator[None]:
        """A lock among the processes of this machine, released if its holder dies. No lock in a remote store."""
        with self._held(name, _LOCK_SECONDS) as held:
            if not held:
                place = self.path(layout.LOCK, lock=name)
                raise RetryLaterError(f"{place} is held by another process", "run the same command later")
            yield

    def claim(self, shard: str) -> AbstractContextManager[bool]:
        """Whether this process may make the shard now: False while another process of this machine makes it.

        Always True in a remote store, where two processes may make the same shard; the first to finish wins.
        """
        return self._held(f"{shard}.claim", 0.0)

    def _held(self, name: str, seconds: float) -> AbstractContextManager[bool]:
        return self.path(layout.LOCK, lock=name).lock(seconds)

    def plan(
        self, wanted: Sequence[PlannedSample], shard_samples: int, known: Iterable[ShardDone] = ()
    ) -> list[ShardPlan]:
        """Plans of the shards that hold `wanted`. Samples that are in no plan yet get new shards.

        A plan is written before its first sample is made, and never changed. So a run that was killed, or that has
        more prompts now, finds its old shards. New shards are filled in the order of keys, not of the prompt file.
        The finished shards in `known` are not read again.
        """
        keys = distinct_keys(wanted)
        with self.lock("plan"):
            while True:
                plans = self.plans()
                new = new_plans(wanted, plans, shard_samples)
                # another process has just taken a number: read the plans again
                if all(create_document(self.plan_path(plan.shard), plan) for plan in new):
                    break
        return needed_plans([*plans, *new], self.finished(known), keys)

    def plans(self) -> list[ShardPlan]:
        """All plans of the set, by shard."""
        paths = matching(self.root, layout.PLAN.wildcard())
        with remedy("restore it from a copy of the store"):
            return read_all_documents(paths, ShardPlan)

    @remedy(REMAKE)
    def done(self, shard: str) -> ShardDone | None:
        """What a finished shard holds; None if it is not made yet, or its tar was deleted.

        Raises:
            DataError: the tar's size is not what was recorded.
        """
        tar, path = self.shard_path(shard), self.done_path(shard)
        if not path.exists() or not tar.exists():
            return None
        return self._checked(shard, read_document(path, ShardDone), tar.stat().st_size)

    @remedy(REMAKE)
    def finished(self, known: Iterable[ShardDone] = ()) -> list[ShardDone]:
        """`done` of every finished shard, in the order of names. Documents in `known` are not read again."""
        tars = self._finished_tars()
        documents = {done.shard: done for done in known}
        new = [shard for shard in tars if shard not in documents]
        read = read_all_documents([self.done_path(shard) for shard in new], ShardDone)
        documents |= dict(zip(new, read, strict=True))
        return [self._checked(shard, documents[shard], size) for shard, size in tars.items()]

    def _finished_tars(self) -> dict[str, int]:
        """Sizes of the tars that have a document, by shard; one listing of the folder."""
        folder = layout.DONE.folder
        found = {f"{folder}/{name}": size for name, size in (self.root / folder).sizes().items()}
        shards = sorted(parts["shard"] for name in found if (parts := layout.DONE.parts_of_alike(name)))
        tars = {shard: layout.SHARD.name(shard=shard) for shard in shards}
        return {shard: found[tar] for shard, tar in tars.items() if tar in found}

    def _checked(self, shard: str, done: ShardDone, size: int) -> ShardDone:
        if {done.shard, *(row.shard for row in done.rows)} != {shard}:
            raise DataError(f"{self.done_path(shard)} describes another shard")
        if done.fingerprint not in (None, self.fingerprint):
            there, here = str(done.fingerprint)[:12], self.fingerprint[:12]
            raise DataError(f"{self.done_path(shard)} is of recipe {there}, this set is {here}", FOREIGN)
        if size != done.bytes:
            raise DataError(f"{self.shard_path(shard)} is damaged ({size} bytes, {done.bytes} recorded)")
        return done

    def write_snapshot(self, wanted: Iterable[str], known: Iterable[ShardDone] = ()) -> Snapshot:
        """Writes a snapshot of the samples with these keys, or returns the existing one with the same content.

        The finished shards in `known` are not read again.

        Raises:
            DataError: a key is in no finished shard.
        """
        with self.lock("snapshot"):
            rows, shards = self._rows_of(set(wanted), self.finished(known))
            name = snapshot_hash(rows)
            while True:
                old = self.root.concurrently(self.snapshot, self.snapshots())
                if same := [snapshot for snapshot in old if snapshot.hash == name and snapshot.shards == shards]:
                    return same[-1]
                if new := self._new_snapshot(rows, shards, 1 + self._last_number()):
                    return new

    def _new_snapshot(self, rows: list[IndexRow], shards: dict[str, str], number: int) -> Snapshot | None:
        """Writes the index, then the manifest with its hash. Returns None if another process took the number."""
        index, data = self.path(layout.INDEX, number=number), encode_rows(IndexRow, rows)
        snapshot = Snapshot(
            number=number,
            fingerprint=self.fingerprint,
            hash=snapshot_hash(rows),
            samples=len(rows),
            shards=shards,
            index=index.name,
            index_blake3=hash_bytes(data),
        )
        if self.root.has_locks:
            index.write(data)  # under the lock, an existing index was left by a killed writer
        elif not index.create(data):
            return None
        return snapshot if create_document(self.path(layout.MANIFEST, number=number), snapshot) else None

    def _last_number(self) -> int:
        """The last snapshot's number. Without locks, indexes count too: another snapshot may be under way."""
        indexes = () if self.root.has_locks else self._numbers(layout.INDEX)
        return max([*self.snapshots(), *indexes], default=0)

    def _rows_of(self, wanted: set[str], done: Sequence[ShardDone]) -> tuple[list[IndexRow], dict[str, str]]:
        """Index rows in the order of keys, and the hashes of the shards they lie in.

        A sample that lies in two shards, after an import, counts in the first.
        """
        found: dict[str, IndexRow] = {}
        for row in (row for part in done for row in part.rows if row.key in wanted):
            found.setdefault(row.key, row)
        if missing := sorted(wanted - set(found)):
            raise DataError(f"{len(missing)} samples are not rolled out yet, {missing[0]} first", ROLLOUT)
        rows = [found[key] for key in sorted(found)]
        used = {row.shard for row in rows}
        return rows, {part.shard: part.blake3 for part in done if part.shard in used}

    def snapshots(self) -> list[int]:
        """Numbers of all snapshots, rising."""
        return self._numbers(layout.MANIFEST)

    def _numbers(self, kind: layout.Kind) -> list[int]:
        return sorted(int(path.stem) for path in matching(self.root, kind.wildcard()))

    @remedy(ROLLOUT)
    def snapshot(self, number: int | None = None) -> Snapshot:
        """A snapshot by number, the newest by default.

        Raises:
            DataError: there is none, it is damaged, or it belongs to another recipe.
        """
        numbers = self.snapshots()
        if not numbers and number is None:
            raise DataError(f"{self.root} has no snapshot")
        path = self.path(layout.MANIFEST, number=numbers[-1] if number is None else number)
        snapshot = read_document(path, Snapshot)
        if snapshot.fingerprint != self.fingerprint:
            raise DataError(f"{path} is of recipe {snapshot.fingerprint[:12]}, this set is {self.fingerprint[:12]}")
        return snapshot

    @remedy(ROLLOUT)
    def index(self, snapshot: Snapshot) -> list[IndexRow]:
        """The snapshot's rows in the order of keys, checked against its hash."""
        path = self.root / layout.index_of(snapshot)
        rows = read_rows(path, IndexRow, snapshot.index_blake3)
        keys = [row.key for row in rows]
        if keys != sorted(set(keys)) or len(rows) != snapshot.samples or snapshot_hash(rows) != snapshot.hash:
            raise DataError(f"{path} does not hold the samples of snapshot {snapshot.number}")
        if not {row.shard for row in rows} <= set(snapshot.shards):
            raise DataError(f"{path} names a shard that snapshot {snapshot.number} does not know")
        return rows


def is_set(folder: Place | Path) -> bool:
    """Whether the folder holds a shard set."""
    return (folder / layout.RECIPE.name()).exists()


def _parse_recipe(path: Place, data: bytes) -> Recipe:
    try:
        content = json.loads(data)
        check_version(content, path)
        return Recipe.model_validate_json(data)
    except (ValidationError, ValueError, AttributeError, RecursionError) as error:
        raise DataError(f"{path} is no recipe of this rats ({reason(error)})", ROLLOUT) from None
