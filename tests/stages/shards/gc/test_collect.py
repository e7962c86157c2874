"""`rats shards gc`: what no experiment reaches is shown, and deleted only when asked."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from rats.pipeline.families.open import Model
from rats.pipeline.prompts import planned_samples, read_prompts
from rats.pipeline.store.publish import publish
from rats.pipeline.store.scores import read_scores, reward_column, reward_columns
from rats.pipeline.store.shard_set import ShardSet
from rats.schemas.errors import ConfigError, StorageError
from rats.schemas.params import load_params
from rats.stages.rollout.rollout import read_recipe
from rats.stages.shards.gc.collect import collect
from rats.stages.shards.gc.roots import could_make
from rats.stages.shards.verify import verify
from tests.support.experiments import collected, files, name_it, stranger, write_params
from tests.support.project import rats, tree, write_project
from tests.support.shards import params, recipe_of, score, wanted, write_samples
from tests.support.styles import write_lora


def test_nothing_is_touched_before_it_is_asked_for(shards: ShardSet, tmp_path: Path) -> None:
    write_samples(ShardSet.open_or_create(tmp_path / "store", recipe_of(params(seed=1))), wanted(2))
    name_it(shards, shards.snapshot(1).hash)
    before = tree(tmp_path)
    result = collected(shards, delete=False)
    assert tree(tmp_path) == before
    assert len(result["remove"]) == 4 and not result["deleted"]
    assert result["command"].endswith("--older-than 0 --delete")
    assert result["bytes"] == sum(row["bytes"] for row in result["remove"]) > 0


def test_a_set_that_nothing_names_goes_whole_and_no_other(shards: ShardSet) -> None:
    store = Path(shards.root).parent
    unused = ShardSet.open_or_create(store, recipe_of(params(seed=1)))
    write_samples(unused, wanted(4))
    name_it(shards, *(shards.snapshot(number).hash for number in shards.snapshots()))
    before = files(shards)
    result = collected(shards)
    (row,) = result["remove"]
    assert (row["set"], row["what"]) == (unused.fingerprint, "the whole set")
    assert [path.name for path in store.iterdir()] == [shards.root.name] and files(shards) == before
    assert collected(shards)["remove"] == []


def test_of_a_named_set_the_named_and_the_newest_snapshot_stay_with_all_they_need(shards: ShardSet) -> None:
    rows = shards.index(shards.snapshot(1))
    name_it(shards, shards.snapshot(1).hash)
    result = collected(shards)
    assert shards.snapshots() == [1, 3] and shards.index(shards.snapshot(1)) == rows
    assert [done.shard for done in shards.finished()] == ["rollout-000000", "rollout-000001"]
    whats = [row["what"] for row in result["remove"]]
    assert whats == ["snapshot 2", "shard rollout-000002 and 1 more", "3 embeddings"]
    assert set(verify(shards.root)["unfinished"]) == set() and len(reward_columns(shards)) == 2
    for column in reward_columns(shards):
        assert len(read_scores(shards, column, [row.key for row in rows])) == 6


def as_record(shards: ShardSet, work: Path) -> None:
    name_it(shards, shards.snapshot(2).hash)


def as_damaged_checkpoint(shards: ShardSet, work: Path) -> None:
    path = name_it(shards, shards.snapshot(2).hash, file="work/runs/rats/checkpoints/000050/state.json")
    path.write_bytes(path.read_bytes()[:-4])


def as_published_copy(shards: ShardSet, work: Path) -> None:
    publish(shards, shards.snapshot(2), work / "linked", [])
    shutil.copytree(work / "linked", work / "out")
    shutil.rmtree(work / "linked")


def as_link_elsewhere(shards: ShardSet, work: Path) -> None:
    publish(shards, shards.snapshot(2), work.parent / "no-root" / "out", [])


def as_evaluation_that_names_no_recipe(shards: ShardSet, work: Path) -> None:
    (work / "evaluate.json").write_text(json.dumps({"cells": [], "snapshot": shards.snapshot(2).hash}))


def as_copy_in_the_cache_of_dvc(shards: ShardSet, work: Path) -> None:
    (work / ".dvc" / "cache" / "ab").mkdir(parents=True)
    shutil.copyfile(Path(shards.root) / "manifests" / "0002.json", work / ".dvc" / "cache" / "ab" / "cdef")


def as_linked_folder_of_runs(shards: ShardSet, work: Path) -> None:
    name_it(shards, shards.snapshot(2).hash, file="big-disk/rats/run.json")
    (work / "runs").symlink_to(work.parent / "big-disk")


@pytest.mark.parametrize(
    "reach",
    [
        as_record,
        as_damaged_checkpoint,
        as_published_copy,
        as_link_elsewhere,
        as_evaluation_that_names_no_recipe,
        as_copy_in_the_cache_of_dvc,
        as_linked_folder_of_runs,
    ],
)
def test_whatever_names_a_snapshot_holds_it(shards: ShardSet, reach: Callable[[ShardSet, Path], None]) -> None:
    reach(shards, Path(shards.root).parents[1] / "work")
    collected(shards)
    assert shards.snapshots() == [2, 3] and len(shards.finished()) == 4
    assert verify(shards.root)["samples"] == 4


def test_scores_by_a_reward_that_no_parameter_file_has_go(shards: ShardSet) -> None:
    name_it(shards, *(shards.snapshot(number).hash for number in shards.snapshots()))
    write_params(shards, stranger(["hps"]))
    assert [row["what"].partition(" (")[0] for row in collected(shards)["remove"]] == ["scores by old"]
    assert [record.name for record in reward_columns(shards).values()] == ["hps"]
    assert verify(shards.root)["rewards"] == 1
    score(shards, "old")
    column = reward_column(shards, "old")[0]
    name_it(shards, column, file="work/runs/other/run.json")
    name_it(shards, *(shards.snapshot(number).hash for number in shards.snapshots()))
    assert collected(shards)["remove"] == []


def test_a_parameter_file_holds_what_it_could_make_and_all_of_it_if_its_model_is_not_here(shards: ShardSet) -> None:
    assert could_make(params(), shards.recipe) and not could_make(params(seed=1), shards.recipe)
    assert not could_make(params(steps=40), shards.recipe)
    before = files(shards)
    write_params(shards, params(), "work/other.yaml")
    assert "its model cannot be read here" in str(collected(shards)["keep"]) and files(shards) == before
    write_params(shards, params(seed=1), "work/other.yaml")
    collected(shards)
    assert files(shards) == set()


def test_a_parameter_file_holds_the_samples_it_asks_for_of_the_set_that_its_model_makes(
    models: Path, tmp_path: Path
) -> None:
    (tmp_path / "work").mkdir()
    shutil.copytree(models / "flux", tmp_path / "work" / "flux")
    changes = {"path": "flux", "loras": [{"path": "style", "weight": 0.7}]}
    write_project(models, tmp_path / "work", model=changes, prompts={"train": "prompts.txt"})
    with contextlib.chdir(tmp_path / "work"):
        params = load_params(Path("params.yaml"))
        write_lora(Model.of(load_params(Path("params.yaml"), ["model.loras=[]"])), Path("style"))
        recipe = read_recipe(params, Model.of(params))
    mine = ShardSet.open_or_create(tmp_path / "store", recipe)
    asked = planned_samples(read_prompts(tmp_path / "work" / "prompts.txt"), 1)
    write_samples(mine, asked, shard_samples=2)
    write_samples(mine, wanted(2), shard_samples=2)
    (tmp_path / "work" / "prompts.txt").write_text(asked[0].prompt)
    collected(mine)
    kept = {row.key for done in mine.finished() for row in done.rows}
    assert asked[0].key in kept and len(kept) < len(asked) + 4 and mine.snapshots() == [2]
    for path in (tmp_path / "work" / "flux" / "transformer").glob("*.json"):
        path.write_text(path.read_text() + " ")  # other weights
    collected(mine)
    assert not Path(mine.root).exists()


@pytest.mark.parametrize("text", ["model: {pth: m}\nprompts: {train: p}\ntrain: {}", "model: [prompts, train"])
def test_a_parameter_file_that_cannot_be_read_holds_everything(shards: ShardSet, tmp_path: Path, text: str) -> None:
    (tmp_path / "work" / "params.yaml").write_text(text)
    before = files(shards)
    assert "params.yaml may mean it" in str(collected(shards)["keep"]) and files(shards) == before


def test_it_refuses_where_it_cannot_know(shards: ShardSet, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no experiment below"):
        collected(shards)
    for store, words in (
        ("s3://bucket/store", "remote|rats"),
        (str(shards.root), "is one set"),
        ("nowhere", "no folder"),
    ):
        with pytest.raises(ConfigError, match=words):
            collect(store, [tmp_path])
    with pytest.raises(ConfigError, match="no folder"):
        collect(str(tmp_path / "store"), [tmp_path / "nowhere"])
    locked = tmp_path / "work" / "locked"
    locked.mkdir(mode=0)
    if not os.access(locked, os.R_OK):
        with pytest.raises(StorageError, match="may name a set"):
            collected(shards)
    assert files(shards)


def test_the_command_shows_a_table_a_total_and_the_command_that_would_delete(shards: ShardSet, tmp_path: Path) -> None:
    name_it(shards, shards.snapshot(1).hash)
    said = rats(tmp_path, "shards", "gc", "store", "--older-than", "0").stdout
    assert "snapshot 2  (no experiment names it)" in said and "keep: " in said and "run.json" in said
    line = said.splitlines()[-1].partition("this would: rats ")[2]
    rats(tmp_path, *line.split())
    assert shards.snapshots() == [1, 3]


def test_what_an_experiment_in_another_worktree_of_git_names_is_kept(shards: ShardSet, tmp_path: Path) -> None:
    run = ["git", "-c", "user.name=test", "-c", "user.email=test@example.org"]
    tree_of = ["worktree", "add", "-q", str(tmp_path / "tree")]
    for words in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "state"], tree_of):
        subprocess.run([*run, *words], cwd=tmp_path, check=True, capture_output=True)
    assert [row["what"] for row in collected(shards, delete=False)["remove"]] == ["the whole set"]
    (tmp_path / "tree" / "run.json").write_text(json.dumps({"recipe": shards.fingerprint}))
    assert "the whole set" not in [row["what"] for row in collected(shards, delete=False)["remove"]]
