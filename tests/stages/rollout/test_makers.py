"""One version: who computed a shard is recorded, and a worker whose software differs makes nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from rats.pipeline.machine import maker
from rats.pipeline.store.documents import write_document
from rats.pipeline.store.scores import finished_scores
from rats.pipeline.store.shard_set import ShardSet
from rats.schemas.errors import ConfigError
from rats.schemas.params import Params
from rats.stages.rollout.rollout import rollout_stage
from rats.stages.workers.run import WorkerTarget
from tests.support import cluster
from tests.support.project import rats, write_project


@pytest.fixture
def rolled(models: Path, tmp_path: Path) -> tuple[Params, ShardSet]:
    """Three shards that this process has made."""
    params = Params.model_validate(write_project(models, tmp_path))
    return params, ShardSet.open(tmp_path / "store" / rollout_stage(params, "train").fingerprint)


def test_a_worker_with_other_kernels_is_refused_and_writes_nothing(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = Params.model_validate(write_project(models, tmp_path))
    with cluster.scheduler(tmp_path) as (_, address):
        with monkeypatch.context() as theirs:
            theirs.setenv("ATEN_CPU_CAPABILITY", "default")
            worker = cluster.workers(address, 1)
            worker.__enter__()
        try:
            with pytest.raises(ConfigError, match="ATEN_CPU_CAPABILITY is default there and unset at the driver"):
                rollout_stage(params, "train", where=WorkerTarget(scheduler_address=address))
        finally:
            worker.__exit__(None, None, None)
    assert list((tmp_path / "store").glob("*/shards/*.tar")) == []


def test_every_shard_and_every_table_of_scores_says_its_maker(rolled: tuple[Params, ShardSet], tmp_path: Path) -> None:
    params, shards = rolled
    here = maker(params)
    assert [part.maker for part in shards.finished()] == [here] * 3
    assert [part.maker for part in finished_scores(shards)] == [here] * 3
    assert [part.fingerprint for part in shards.finished()] == [shards.fingerprint] * 3
    said = rats(tmp_path, "shards", "info", str(shards.root)).stdout
    assert "3 shards, 3 tables of scores: " in said and f"torch {here.versions['torch']}" in said
    assert "cpu, 1 thread, micro-batch 2" in said and here.machine["processor"] in said


def test_shards_of_other_software_or_another_machine_are_said(
    rolled: tuple[Params, ShardSet], caplog: pytest.LogCaptureFixture
) -> None:
    params, shards = rolled
    first, second, third = shards.finished()
    assert second.maker is not None
    made = second.maker
    old = {"versions": made.versions | {"torch": "1.2.3"}, "machine": made.machine | {"processor": "abacus"}}
    other = second.model_copy(update={"maker": made.model_copy(update=old)})
    write_document(shards.done_path(second.shard), other)
    shards.done_path(third.shard).unlink()
    with caplog.at_level("WARNING", "rats"):
        rollout_stage(params, "train")
    software, machine = (record.getMessage() for record in caplog.records)
    assert "1 of 2 shards are of other software" in software and f"torch of {second.shard} is 1.2.3, not" in software
    assert "1 of 3 shards are of other machines" in machine and f"processor of {second.shard} is abacus" in machine
    caplog.clear()
    with caplog.at_level("WARNING", "rats"):
        rollout_stage(params, "train")  # nothing is computed, so nothing is said
    assert caplog.records == [] and first.maker == maker(params)
