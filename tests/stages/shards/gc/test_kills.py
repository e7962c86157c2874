"""`rats shards gc` among the living and the killed: kills on the way, work under way, leftovers, what is not ours."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rats.pipeline.store.scores import read_scores, reward_column
from rats.pipeline.store.shard_set import ShardSet
from rats.stages.shards.verify import verify
from tests.support.experiments import collected, files, name_it, stranger, write_params
from tests.support.project import rats, tree
from tests.support.shards import params, recipe_of, score, wanted, write_samples

CHILD = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
LIVE, DEAD = os.getpid(), int(CHILD.stdout)


@pytest.mark.parametrize("number", [0, 1, 2, 3])
def test_what_was_written_lately_stays(shards: ShardSet, number: int) -> None:
    name_it(shards)
    for path in Path(shards.root).rglob("*"):
        os.utime(path, (0, 0))
    young = ["manifests/0002.json", "shards/rollout-000003.plan.json", "index/0001.parquet", "recipe.json"][number]
    os.utime(Path(shards.root) / young)
    collected(shards, older_than=24)
    assert (Path(shards.root) / young).exists() and verify(shards.root)["ok"]
    assert len(shards.finished()) == [4, 3, 2, 2][number]


def test_a_whole_set_stays_for_one_young_file(shards: ShardSet) -> None:
    name_it(ShardSet.open_or_create(Path(shards.root).parent, recipe_of(params(seed=1))))
    before = files(shards)
    for older_than in (24.0, 0.0):
        result = collected(shards, older_than=older_than)
        assert Path(shards.root).exists() == bool(older_than)
        assert "written to lately" in str(result["keep"]) or not older_than
        assert files(shards) == (before if older_than else set())


@pytest.mark.parametrize("lock", ["rollout-000002.claim", "plan"])
def test_a_set_in_which_somebody_works_is_left_alone_and_the_others_go(shards: ShardSet, lock: str) -> None:
    store = Path(shards.root).parent
    unused = ShardSet.open_or_create(store, recipe_of(params(seed=1)))
    write_samples(unused, wanted(2))
    name_it(shards)
    before = files(shards)
    with shards.lock(lock):
        said = rats(store.parent / "work", "shards", "gc", "../store", "--delete", "--older-than", "0", code=75)
    assert files(shards) == before and not Path(unused.root).exists()
    assert "is being worked on" in said.stderr and "the whole set" in said.stdout
    rats(store.parent / "work", "shards", "gc", "../store", "--delete", "--older-than", "0")
    assert len(files(shards)) < len(before)


class Killed(BaseException):
    """What stands in for a kill."""


def killed_at(step: int, patch: pytest.MonkeyPatch, work: Callable[[], object]) -> bool:
    """Whether `work` was stopped at its step-th unlink."""
    real, calls = os.unlink, [0]

    def unlink(*arguments: Any, **options: Any) -> None:
        calls[0] += 1
        if calls[0] > step:
            raise Killed
        real(*arguments, **options)

    with patch.context() as context:
        context.setattr(os, "unlink", unlink)
        try:
            work()
        except Killed:
            return True
    return False


@pytest.mark.parametrize("stride", [7, pytest.param(1, marks=pytest.mark.slow)])
def test_a_kill_at_any_step_leaves_a_set_that_verifies_and_resumes(
    shards: ShardSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stride: int
) -> None:
    name_it(shards, shards.snapshot(1).hash)
    write_params(shards, stranger(["hps"]))
    first, second = shards.snapshot(1), shards.snapshot(2)
    for step in range(60):
        copy = tmp_path / f"copy-{step}"
        shutil.copytree(tmp_path / "work", copy / "work")
        shutil.copytree(tmp_path / "store", copy / "store", ignore=shutil.ignore_patterns("locks"))
        mine = ShardSet.open(copy / "store" / shards.fingerprint)
        stopped = killed_at(step, monkeypatch, lambda mine=mine: collected(mine))  # type: ignore[misc]
        assert verify(mine.root)["ok"]  # among others, no finished shard is without its plan
        keys = [row.key for row in mine.index(mine.snapshot(1))]
        assert len(read_scores(mine, reward_column(mine, "hps")[0], keys)) == len(keys)
        if stopped and step % stride:
            continue
        if step % (2 * stride) == 0:  # the same command goes on
            collected(mine)
            assert collected(mine)["remove"] == [] and mine.snapshots() == [1, 3] and verify(mine.root)["ok"]
        again = write_samples(mine, wanted(6))
        assert again.hash == second.hash and mine.snapshot(1) == first
        assert {done.shard for done in mine.finished()} == set(again.shards)
        score(mine)
        assert len(read_scores(mine, reward_column(mine, "hps")[0], [sample.key for sample in wanted(6)])) == 12
        if not stopped:
            assert step > 20
            return
    raise AssertionError("it never got through")


def test_a_kill_while_a_whole_set_goes_leaves_no_set_and_the_next_gc_the_rest(
    shards: ShardSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Path(shards.root).parent
    name_it(ShardSet.open_or_create(store, recipe_of(params(seed=1))))
    assert killed_at(3, monkeypatch, lambda: collected(shards))
    assert not Path(shards.root).exists() and collected(shards)["remove"] == []
    (left,) = store.glob(".*.tmp")
    left.rename(store / left.name.replace(f"-{LIVE}-", f"-{DEAD}-"))
    result = collected(shards)
    assert [row["why"] for row in result["remove"]] == ["left by a killed process"] and len(list(store.iterdir())) == 1


def test_leftovers_go_once_their_writer_is_dead(shards: ShardSet) -> None:
    name_it(shards, *(shards.snapshot(number).hash for number in shards.snapshots()))
    folder, host = Path(shards.root) / "shards", socket.gethostname()
    left = {
        pid: folder / f".rollout-000004.tar.{pid}-00000000.tmp"
        for pid in (f"{host}-{DEAD}", f"{host}-{LIVE}", "x-1", "y-1")
    }
    for path in left.values():
        path.write_bytes(b"torn")
    os.utime(left["y-1"], (0, 0))
    collected(shards)
    assert [path.exists() for path in left.values()] == [False, True, True, False]


def test_a_shard_that_a_killed_writer_did_not_vouch_for_goes_and_its_plan_stays(shards: ShardSet) -> None:
    name_it(shards, *(shards.snapshot(number).hash for number in shards.snapshots()))
    (plan,) = shards.plan(wanted(7), 4)[-1:]
    Path(shards.shard_path(plan.shard)).write_bytes(b"torn")
    collected(shards)
    assert not shards.shard_path(plan.shard).exists() and shards.plans()[-1] == plan


@pytest.mark.parametrize("case", ["link", "folder", "notes", "damage"])
def test_a_set_that_is_not_understood_is_left_alone(shards: ShardSet, tmp_path: Path, case: str) -> None:
    name_it(ShardSet.open_or_create(Path(shards.root).parent, recipe_of(params(seed=1))))
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    root = Path(shards.root)
    if case == "link":
        shutil.move(root / "index" / "0001.parquet", elsewhere)
        (root / "index" / "0001.parquet").symlink_to(elsewhere / "0001.parquet")
    elif case == "folder":
        shutil.move(root, elsewhere)
        root.symlink_to(elsewhere / root.name)
    elif case == "notes":
        (root / "thesis.txt").write_text("years")
    else:
        (root / "manifests" / "0002.json").write_bytes(b"{}")
    before = tree(tmp_path)
    result = collected(shards)
    assert "left alone" in str(result["keep"]) and result["remove"] == []
    assert set(tree(tmp_path)) == set(before)
