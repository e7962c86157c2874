"""Imports a verified shard set (`untrusted`) into a store, under its fingerprint."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rats.pipeline.files.places import Place
from rats.pipeline.files.reading import hash_file
from rats.pipeline.store import layout
from rats.pipeline.store.documents import create_document, write_document
from rats.pipeline.store.scores import record_reward, scores_done, write_scores
from rats.pipeline.store.shard_set import ShardSet
from rats.schemas.errors import DataError, RetryLaterError, remedy
from rats.schemas.manifest import PlannedSample, ShardDone, ShardPlan, Snapshot
from rats.stages.shards.untrusted import FETCH, Advance, VerifiedSet

AGAIN = "run the same command again"


@dataclass(frozen=True)
class ImportResult:
    """What an import did. `added` maps the old names of the new shards to their names in the store."""

    shards: ShardSet
    snapshot: Snapshot
    added: dict[str, str]
    embeddings: int
    scores: int


def take_in(foreign: VerifiedSet, store: Place, advance: Advance = lambda count: None) -> ImportResult:
    """Adds the parts of a set that the store lacks, and a snapshot of its samples. After a kill, call it again.

    Every copied file is compared with the verified one before it gets its name. A shard keeps its number unless that is
    taken, and its tar's bytes never change. Samples that the store has already stay where they are. A shard with some
    new samples is added as a whole.

    Args:
        foreign: The set.
        store: Where sets lie by fingerprint, local or remote.
        advance: Told of each shard's samples.

    Raises:
        DataError: the store has a sample or an embedding of this recipe with other bytes, or the folder was changed.
        RetryLaterError: another process is making one of the shards.
    """
    shards = ShardSet.open_or_create(store, foreign.shards.recipe)
    there = shards.finished()
    missing = _missing(shards, foreign, there)
    embeddings = _take_embeddings(shards, foreign)
    names = _names(shards, missing)
    for part in foreign.parts:
        if part in missing:
            _take_shard(foreign.shards, shards, part, names[part.shard])
        advance(len(part.rows))
    there = shards.finished(there)
    scores = _take_scores(shards, foreign, there)
    snapshot = shards.write_snapshot((row.key for row in foreign.index), there)
    if snapshot.hash != foreign.snapshot.hash:
        raise DataError(f"{shards.root} does not hold what was imported (snapshot {snapshot.number})", AGAIN)
    return ImportResult(shards, snapshot, names, embeddings, scores)


def _missing(shards: ShardSet, foreign: VerifiedSet, finished: Sequence[ShardDone]) -> list[ShardDone]:
    """Shards with a sample that the store lacks."""
    there = {row.key: row.blake3 for part in finished for row in part.rows}
    for row in (row for part in foreign.parts for row in part.rows):
        if there.get(row.key, row.blake3) != row.blake3:
            raise DataError(
                f"one recipe gave different bytes: sample {row.key} is {there[row.key][:12]} in {shards.root} and "
                f"{row.blake3[:12]} in {foreign.shards.root}",
                "they come from machines of different kinds, keep them in two stores",
            )
    return [part for part in foreign.parts if not {row.key for row in part.rows} <= set(there)]


def _names(shards: ShardSet, parts: Sequence[ShardDone]) -> dict[str, str]:
    """Name in the store of each shard by its own, planned as a rollout plans them."""
    with shards.lock("plan"):
        while True:
            names, new = choose_names(parts, shards.plans(), (shards.root / layout.SHARD.folder).sizes())
            # a number that another driver of a remote store has just taken: look again
            if all(create_document(shards.plan_path(plan.shard), plan) for plan in new):
                return names


def choose_names(
    parts: Sequence[ShardDone], plans: Sequence[ShardPlan], files: Iterable[str]
) -> tuple[dict[str, str], list[ShardPlan]]:
    """Names in this store for the shards of another one, and the plans that must be written first.

    If this store has a plan with the same samples, the shard takes its name. Else it keeps its own name if that is
    free, or takes the number after the last.

    Args:
        parts: The shards.
        plans: All plans of the store.
        files: Names of the files in its `shards/`.
    """
    planned = {plan.samples: plan.shard for plan in plans}
    taken = {plan.shard for plan in plans} | {name.partition(".")[0] for name in files}
    # names that other shards keep are not given away
    kept = {part.shard for part in parts}
    last = max((layout.shard_number(name) for name in taken | kept if layout.is_shard(name)), default=-1)
    names, new = {}, []
    for part in parts:
        samples = tuple(
            PlannedSample.model_validate(row.model_dump(include=set(PlannedSample.model_fields))) for row in part.rows
        )
        name = planned.get(samples) or (part.shard if part.shard not in taken else None)
        if name is None:
            last += 1
            name = layout.shard_name(last)
        names[part.shard] = name
        if samples not in planned:
            new.append(ShardPlan(shard=name, samples=samples))
    return names, new


def _take_shard(source: ShardSet, shards: ShardSet, part: ShardDone, name: str) -> None:
    """Copies the tar, then writes its document."""
    done = ShardDone(
        shard=name,
        bytes=part.bytes,
        blake3=part.blake3,
        rows=tuple(row.model_copy(update={"shard": name}) for row in part.rows),
        fingerprint=shards.fingerprint,
        maker=part.maker,
    )
    with shards.claim(name) as mine:
        if not mine:
            raise RetryLaterError(f"{shards.shard_path(name)} is being made by another process", f"{AGAIN} later")
        if shards.done(name) is None:
            _copy(source.shard_path(part.shard), shards.shard_path(name), part.blake3)
            write_document(shards.done_path(name), done)


def _take_embeddings(shards: ShardSet, foreign: VerifiedSet) -> int:
    """Copies the embeddings; returns how many were new. This comes before the shards, since a rollout encodes only the
    prompts of shards that it makes.
    """
    count = 0
    for prompt, digest in foreign.embeddings.items():
        target = shards.embedding_path(prompt)
        if not target.exists():
            _copy(foreign.shards.embedding_path(prompt), target, digest)
            count += 1
        elif _hash(target) != digest:
            raise DataError(
                f"one recipe gave different bytes: {target} is not {foreign.shards.embedding_path(prompt)}",
                "keep the two in two stores",
            )
    return count


def _take_scores(shards: ShardSet, foreign: VerifiedSet, finished: Sequence[ShardDone]) -> int:
    """Writes scores for every shard that lacks them and whose samples are all scored; returns the number of tables."""
    count = 0
    keys = {row.key for part in foreign.parts for row in part.rows}
    for column, record in foreign.records.items():
        rows = foreign.scores[column]
        for part in finished:
            own = [row.key for row in part.rows]
            if keys.isdisjoint(own) or not rows.keys() >= set(own):
                continue
            if scores_done(shards, column, part.shard, part.blake3):
                continue
            record_reward(shards, record.name, record.hashes)
            write_scores(shards, column, part.shard, [rows[key] for key in own])
            count += 1
    return count


def _copy(source: Place, target: Place, blake3: str) -> None:
    """Copies a file. It gets its name after its hash was compared."""
    with target.temporary() as temporary:
        with remedy(FETCH), source.open_plain() as file, temporary.open("wb") as copy:
            shutil.copyfileobj(file, copy, 1 << 20)
        if _hash(temporary) != blake3:
            raise DataError(f"{source} was changed while it was being imported", AGAIN)
        target.put(temporary)


@remedy(AGAIN)
def _hash(place: Place) -> str:
    return hash_file(place)[0]
