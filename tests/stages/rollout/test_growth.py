"""A shard set that grows, is mended, is shared by two rollouts, or keeps all horizons."""

from __future__ import annotations

import shutil
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from rats.pipeline.store.publish import publish
from rats.pipeline.store.scores import reward_columns
from rats.pipeline.store.shard_set import ShardSet
from rats.pipeline.store.shards import read_sample
from rats.schemas.params import Params
from rats.stages.evaluate.evaluate import evaluate_stage
from rats.stages.rollout.rollout import rollout_stage
from rats.stages.train.train import train_stage
from tests.stages.rollout.test_rollout import SAMPLES, SHARDS, STEPS, counting
from tests.support.project import PROMPTS, tree, write_project

A_SHARD = STEPS * 2
"""Evaluations of a full micro-batch, which is a shard here: two a step."""


@pytest.fixture(scope="module")
def rolled(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with a rollout, published in `data`."""
    folder = tmp_path_factory.mktemp("growth")
    rollout_stage(Params.model_validate(write_project(models, folder)), "train", folder / "data")
    return folder


def project(rolled: Path, folder: Path, models: Path, **changes: Any) -> Params:
    """A copy of the project and its store, with other parameters."""
    shutil.copytree(rolled, folder, dirs_exist_ok=True)
    return Params.model_validate(write_project(models, folder, **changes))


def only_set(folder: Path) -> ShardSet:
    (root,) = (folder / "store").iterdir()
    return ShardSet.open(root)


def test_more_noises_and_more_prompts_roll_out_what_is_missing_and_the_old_snapshot_stays(
    rolled: Path, models: Path, tmp_path: Path
):
    before = tree(rolled / "data")
    params = project(rolled, tmp_path, models, teacher={"noises_per_prompt": 2})
    with counting() as forwards:
        report = rollout_stage(params, "train", tmp_path / "grown")
    assert (report.samples, report.shards_total, report.shards_reused) == (2 * SAMPLES, 2 * SHARDS, SHARDS)
    assert report.teacher_forwards == forwards() == SHARDS * A_SHARD
    (tmp_path / "prompts.txt").write_text("\n".join(["a tall tree", *PROMPTS]))
    with counting() as forwards:
        report = rollout_stage(params, "train", tmp_path / "grown")
    assert (report.samples, report.shards_reused, forwards()) == (2 * SAMPLES + 2, 2 * SHARDS, A_SHARD)
    shards = only_set(tmp_path)
    assert [shards.snapshot(number).samples for number in shards.snapshots()] == [6, 12, 14]
    # the first snapshot is what it was, in the published folder and in the store, and trains
    assert tree(tmp_path / "data") == before
    old = shards.snapshot(1)
    publish(shards, old, tmp_path / "again", list(reward_columns(shards)))
    assert tree(tmp_path / "again") == before
    trained = train_stage(params, "rats", tmp_path / "again", tmp_path / "run", None)
    assert (trained.snapshot, trained.teacher_forwards) == (old.hash, 0)


def test_a_set_of_all_horizons_trains_and_evaluates_and_holds_the_same_states(
    rolled: Path, models: Path, tmp_path: Path
):
    few = only_set(rolled)
    evaluation = {"pictures": 2, "judges": []}
    params = project(rolled, tmp_path, models, teacher={"horizons": "all"}, evaluate=evaluation)
    report = rollout_stage(params, "train", tmp_path / "all")
    assert report.shards_reused == 0
    every = ShardSet.open(tmp_path / "all")
    assert every.fingerprint != few.fingerprint
    assert every.recipe.horizons == every.recipe.sigmas == few.recipe.sigmas
    row, other = (shards.index(shards.snapshot())[0] for shards in (every, few))
    kept = [every.recipe.horizons.index(sigma) for sigma in few.recipe.horizons]
    assert len(kept) < STEPS + 1
    there, here = read_sample(every, row), read_sample(few, other)
    assert there["x"].shape[0] == STEPS + 1 and there["x0"].shape[0] == STEPS
    assert (there["x"][kept] == here["x"]).all() and (there["x0"][kept[:-1]] == here["x0"]).all()
    assert train_stage(params, "rats", tmp_path / "all", tmp_path / "runs" / "rats", None).steps == 2
    cells = evaluate_stage(params, tmp_path / "all", tmp_path / "runs", tmp_path / "evaluate.json").cells
    assert {cell.nfe for cell in cells if cell.system == "student"} == {2, 3}


def test_an_embedding_that_was_deleted_is_made_again_without_a_step_of_the_teacher(
    rolled: Path, models: Path, tmp_path: Path
):
    params = project(rolled, tmp_path, models)
    before = tree(tmp_path / "data")
    shutil.rmtree(tmp_path / "data")
    next(tmp_path.glob("store/*/embeddings/*.safetensors")).unlink()
    with counting() as forwards:
        report = rollout_stage(params, "train", tmp_path / "data")
    assert (report.shards_reused, report.teacher_forwards, forwards()) == (SHARDS, 0, 0)
    assert tree(tmp_path / "data") == before


@pytest.mark.parametrize("dies", [True, False])
def test_a_shard_that_another_process_is_making_comes_last_and_is_made_once(
    rolled: Path, models: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, dies: bool
):
    params = project(rolled, tmp_path, models)
    shards, undisturbed = only_set(tmp_path), tree(tmp_path / "data" / "shards")
    shutil.rmtree(tmp_path / "data")
    aside = tmp_path / "aside"
    (shards.root / "shards").rename(aside)
    (shards.root / "shards").mkdir()
    for plan in aside.glob("*.plan.json"):
        shutil.copy(plan, shards.root / "shards")

    def other() -> None:
        """Another rollout, at the first shard until the last is there: then it dies, or its shard is there."""
        with shards.claim("rollout-000000") as mine:
            claimed.append(mine)
            started.set()
            while shards.done("rollout-000002") is None and time.monotonic() < end:
                time.sleep(0.01)
            for file in [] if dies else sorted(aside.glob("rollout-000000.[dt]*"), reverse=True):
                shutil.copy(file, shards.root / "shards")

    started, claimed, end = threading.Event(), [], time.monotonic() + 60
    thread = threading.Thread(target=other)
    thread.start()
    started.wait()
    with caplog.at_level("INFO", "rats"):
        report = rollout_stage(params, "train", tmp_path / "data")
    thread.join()
    assert claimed == [True]
    assert caplog.text.count("another process is making rollout-000000") == 1
    assert report.teacher_forwards == (SHARDS if dies else SHARDS - 1) * A_SHARD
    assert tree(tmp_path / "data" / "shards") == undisturbed
