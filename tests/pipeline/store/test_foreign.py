"""One recipe: what vouches for a shard or its scores says of which set, and is refused elsewhere."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from rats.pipeline.store.documents import read_document, write_document
from rats.pipeline.store.publish import publish
from rats.pipeline.store.scores import record_reward, score_rows, scores_done
from rats.pipeline.store.shard_set import ShardSet
from rats.pipeline.store.shards import verify_shard, write_shard
from rats.schemas.errors import DataError
from rats.schemas.manifest import ScoresDone, ShardDone
from tests.support.shards import fill, params, recipe_of, score, wanted, write_set

SHARD = "rollout-000001"


@pytest.fixture
def mixed(tmp_path: Path) -> tuple[ShardSet, ShardSet]:
    """A whole set in which one shard, with its document, was replaced by that of another recipe; and the other set."""
    ours = write_set(tmp_path / "store")
    foreign = ShardSet.open_or_create(tmp_path / "store", recipe_of(params(seed=7)))
    for plan in foreign.plan(wanted(), 4):
        write_shard(foreign, plan, fill(foreign, plan))
    for path in (foreign.shard_path(SHARD), foreign.done_path(SHARD)):
        shutil.copy(path.local, (ours.root / "shards").local)
    return ours, foreign


READERS: list[Callable[[ShardSet], object]] = [
    lambda shards: shards.done(SHARD),
    lambda shards: shards.finished(),
    lambda shards: verify_shard(shards, SHARD),
    lambda shards: shards.plan(wanted(), 4),
    lambda shards: shards.write_snapshot(sample.key for sample in wanted()),
    lambda shards: publish(shards, shards.snapshot(), Path("out"), []),
]


@pytest.mark.parametrize("read", READERS)
def test_a_shard_of_another_recipe_is_refused_by_both_fingerprints(
    mixed: tuple[ShardSet, ShardSet], read: Callable[[ShardSet], object]
) -> None:
    ours, foreign = mixed
    text = f"of recipe {foreign.fingerprint[:12]}, this set is {ours.fingerprint[:12]}; delete it and the shard"
    with pytest.raises(DataError, match=text):
        read(ours)
    assert foreign.done(SHARD) is not None


def test_a_shard_of_before_fingerprints_were_recorded_is_still_read(tmp_path: Path) -> None:
    shards = write_set(tmp_path)
    path = shards.done_path(SHARD)
    older = read_document(path, ShardDone).model_copy(update={"fingerprint": None})
    write_document(path, older)
    assert shards.done(SHARD) == older and verify_shard(shards, SHARD) == older


def test_scores_of_another_column_are_refused_and_those_of_before_are_read(tmp_path: Path) -> None:
    shards = write_set(tmp_path)
    source, other = score(shards), record_reward(shards, "pick", {"reward": "5" * 64, "vae": "b" * 64})
    for suffix in ("parquet", "done.json"):
        shutil.copy((shards.scores_folder(source) / f"{SHARD}.{suffix}").local, shards.scores_folder(other).local)
    for read in (scores_done, score_rows):
        with pytest.raises(DataError, match=f"of column {source[:12]}, not of its folder"):
            read(shards, other, SHARD)
    path = shards.scores_folder(source) / f"{SHARD}.done.json"
    write_document(path, read_document(path, ScoresDone).model_copy(update={"column": None}))
    assert scores_done(shards, source, SHARD) and len(score_rows(shards, source, SHARD)) == 4
