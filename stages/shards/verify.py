"""`rats shards verify`: reads every byte of a set and lists everything that is damaged or missing."""

from __future__ import annotations

import time
from collections.abc import Iterable
from functools import partial
from typing import Any

from rats.pipeline.files.places import Place
from rats.pipeline.store import layout
from rats.pipeline.store.documents import read_document
from rats.pipeline.store.embeddings import verify_embedding
from rats.pipeline.store.parquet import read_rows
from rats.pipeline.store.scores import REMEDY as RESCORE
from rats.pipeline.store.scores import read_scores_done
from rats.pipeline.store.shard_set import REMAKE, ROLLOUT, ShardSet
from rats.pipeline.store.shards import verify_shard
from rats.schemas.errors import DataError
from rats.schemas.manifest import IndexRow, RewardRecord, ScoreRow, ShardDone, ShardPlan, Snapshot
from rats.stages.progress import progress
from rats.stages.shards.audit import MB, Audit, listing

RESTORE = "restore it from a copy of the store"


def verify(folder: Place) -> dict[str, Any]:
    """Reads and checks a whole set, in a store or published: recipe, plans, shards, snapshots, scores, embeddings.

    Every damaged or missing file is one line in the log. In a store, unfinished work (a planned shard, a column that
    lacks shards) is no damage. In a published folder it is.

    Returns:
        Counts; `bytes` read, `gb_per_second` (10^9 bytes); `unfinished`, a line each.

    Raises:
        DataError: at the end, with the number of damaged or missing files and the first of them. If the recipe cannot
            be read, at once: nothing else can be checked without it.
    """
    start = time.monotonic()
    shards = ShardSet.open(folder)
    audit = Audit(shards, listing(shards.root))
    total = sum(audit.files.values())
    with progress(f"verify {shards.fingerprint[:12]}", total // MB, "MB") as advance:
        audit.advance = advance
        result = _verify_all(audit)
    if audit.damage:
        count, first = len(audit.damage), next(iter(audit.damage))
        files = "files" if count > 1 else "file"
        raise DataError(f"{shards.root} has {count} damaged or missing {files}, first: {first}")
    seconds = time.monotonic() - start
    speed = audit.read / 1e9 / seconds
    return result | {"bytes": audit.read, "seconds": seconds, "gb_per_second": speed, "ok": True}


def _verify_all(audit: Audit) -> dict[str, Any]:
    audit.look(lambda: None, layout.RECIPE.name())  # opening the set has read it
    snapshots = _snapshots(audit)
    plans = {shard: _plan(audit, shard) for shard in audit.found(layout.PLAN, "shard")}
    named = {shard for snapshot in snapshots for shard in snapshot.shards}
    # shards before indexes and scores, which are compared with them
    done = _shards(audit, plans, named)
    indexes = [_index(audit, snapshot, done) for snapshot in snapshots]
    columns = sorted({name.split("/")[1] for name in audit.files if name.startswith(f"{layout.REWARD.top}/")})
    for column in columns:
        _column(audit, column, done)
    embeddings = audit.found(layout.EMBEDDING, "prompt")
    for prompt in embeddings:
        audit.look(partial(verify_embedding, audit.shards, prompt), layout.EMBEDDING.name(prompt=prompt))
    _complete(audit, indexes)
    return {
        "samples": snapshots[-1].samples if snapshots else 0,
        "snapshots": len(snapshots),
        "shards": len(done),
        "rewards": len(columns),
        "embeddings": len(embeddings),
        "unfinished": audit.unfinished,
    }


def _snapshots(audit: Audit) -> list[Snapshot]:
    """All undamaged snapshots, in the order of their numbers."""
    found = [_snapshot(audit, number) for number in audit.shards.snapshots()]
    return [snapshot for snapshot in found if snapshot is not None]


def _snapshot(audit: Audit, number: int) -> Snapshot | None:
    name = layout.MANIFEST.name(number=number)
    snapshot = audit.look(lambda: audit.shards.snapshot(number), name)
    if snapshot and snapshot.number != number:
        audit.report(f"{audit.shards.root / name} is snapshot {snapshot.number}, not the one of its name; {RESTORE}")
    return snapshot


def _plan(audit: Audit, shard: str) -> ShardPlan | None:
    name = layout.PLAN.name(shard=shard)
    plan = audit.look(lambda: read_document(audit.shards.root / name, ShardPlan), name, way_out=RESTORE)
    if plan and plan.shard != shard:
        audit.report(f"{audit.shards.root / name} plans {plan.shard}, not the shard of its name; {RESTORE}")
    return plan


def _shards(audit: Audit, plans: dict[str, ShardPlan | None], wanted: Iterable[str]) -> dict[str, ShardDone]:
    """Reads every finished shard and those that a snapshot names. Returns the documents of the undamaged ones."""
    finished = set(audit.found(layout.DONE, "shard"))
    if to_do := len(set(plans) - finished):
        audit.unfinished.append(f"{to_do} planned shards are still to be made")
    whole = {}
    for shard in sorted(finished.union(wanted)):
        if done := _shard(audit, shard):
            whole[shard] = done
            _check_plan(audit, done, plans)
            audit.rows.update(map(hash, done.rows))
    return whole


def _shard(audit: Audit, shard: str) -> ShardDone | None:
    names = [kind.name(shard=shard) for kind in (layout.SHARD, layout.DONE)]
    # a list, so that each missing file is reported and not only the first
    missing = [audit.missing(name, ROLLOUT) for name in names]
    if any(missing):
        return None
    return audit.look(lambda: verify_shard(audit.shards, shard), *names)


def _check_plan(audit: Audit, done: ShardDone, plans: dict[str, ShardPlan | None]) -> None:
    """Checks that a shard in a store holds the samples of its plan."""
    name = layout.PLAN.name(shard=done.shard)
    if audit.published or audit.missing(name, RESTORE):
        return
    plan = plans.get(done.shard)
    if plan and [sample.key for sample in plan.samples] != [row.key for row in done.rows]:
        audit.report(f"{audit.shards.shard_path(done.shard)} holds other samples than {name} says; {REMAKE}")


def _index(audit: Audit, snapshot: Snapshot, done: dict[str, ShardDone]) -> list[IndexRow] | None:
    """A snapshot's rows. Checks that each is in the present version of the shard that it names."""
    root, name = audit.shards.root, layout.index_of(snapshot)
    rows = audit.look(lambda: audit.shards.index(snapshot), name)
    manifest = audit.shards.path(layout.MANIFEST, number=snapshot.number)
    for shard, digest in snapshot.shards.items():
        if shard in done and done[shard].blake3 != digest:
            now = done[shard].blake3
            audit.report(f"{manifest} names another {shard} ({digest[:12]}, now {now[:12]}); {ROLLOUT}")
    # rows of a damaged shard are left out: the shard is reported already
    strange = [row for row in rows or [] if row.shard in done and hash(row) not in audit.rows]
    if strange:
        audit.report(f"{root / name} has {len(strange)} samples that no shard has, {strange[0].key} first; {ROLLOUT}")
    return rows


def _column(audit: Audit, column: str, done: dict[str, ShardDone]) -> None:
    """Checks a column: its record, and the scores of every shard that has some."""
    record = layout.REWARD.name(reward=column)
    if not audit.missing(record, RESCORE):
        _record(audit, record, column)
    scored = audit.found(layout.SCORES_DONE, "shard", reward=column)
    for shard in scored:
        if not audit.missing(layout.SCORES.name(reward=column, shard=shard), RESCORE):
            _scores(audit, column, shard, done.get(shard))
    lacking = sorted(set(done) - set(scored))
    if audit.published:
        for shard in lacking:
            audit.missing(layout.SCORES_DONE.name(reward=column, shard=shard), RESCORE)
    elif lacking:
        audit.unfinished.append(f"scores {column[:12]} lack {len(lacking)} of {len(done)} shards")


def _record(audit: Audit, name: str, column: str) -> None:
    path = audit.shards.root / name
    record = audit.look(lambda: read_document(path, RewardRecord), name, way_out=RESCORE)
    if record and record.fingerprint != column:
        audit.report(f"{path} is the record of {record.fingerprint[:12]}, not of its folder; {RESCORE}")


def _scores(audit: Audit, column: str, shard: str, done: ShardDone | None) -> None:
    """Checks one shard's scores: the table's hash, that it is of the present shard, and has a row for each sample."""
    document = layout.SCORES_DONE.name(reward=column, shard=shard)
    seal = audit.look(lambda: read_scores_done(audit.shards, column, shard), document)
    if seal is None:
        return
    name = layout.SCORES.name(reward=column, shard=shard)
    table = audit.shards.root / name
    rows = audit.look(lambda: read_rows(table, ScoreRow, seal.blake3), name, way_out=RESCORE)
    if rows is None or done is None:
        return
    is_of_shard = (seal.shard, seal.shard_blake3, seal.rows) == (shard, done.blake3, len(rows))
    keys = [row.key for row in rows]
    if not is_of_shard or keys != sorted(row.key for row in done.rows):
        audit.report(f"{table} scores another {shard}; {RESCORE}")


def _complete(audit: Audit, indexes: list[list[IndexRow] | None]) -> None:
    """Checks that the newest snapshot can be trained on: it exists, and every prompt has its embedding."""
    if audit.published and not audit.found(layout.MANIFEST, "number"):
        audit.report(f"{audit.shards.root / layout.MANIFEST.folder} is missing; {ROLLOUT}")
    newest = indexes[-1] if indexes else None
    for prompt in sorted({row.prompt_id for row in newest or []}):
        audit.missing(layout.EMBEDDING.name(prompt=prompt), ROLLOUT)
