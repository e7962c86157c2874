"""Stage one under `kill -9`, with real processes: nothing is lost, nothing is made twice in vain, all bytes are equal.

Slow; test_rollout.py and test_growth.py beside it have a small version of each in the default suite.
"""

from __future__ import annotations

import json
import random
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from rats.pipeline.store.shard_set import ShardSet
from rats.schemas.params import Params
from rats.stages.rollout import rollout
from rats.stages.rollout.rollout import rollout_stage
from rats.stages.workers.target import WorkerTarget
from tests.stages.rollout.test_rollout import wait_for
from tests.stages.test_dvc import commit, dvc_line, git
from tests.support.kills import COUNTER, counted_task, executions, kill_tree, kill_workers, tree_of
from tests.support.project import PROMPTS, command, environment, tree, write_project

pytestmark = pytest.mark.slow

SHARDS, KILLS = 100, 20
DVC_KILLS = 5
SMALL: dict[str, Any] = {
    "teacher": {"steps": 4, "nfe": [2, 3], "noises_per_prompt": 20, "true_cfg_scale": 3.0},
    "compute": {"micro_batch": 1},
    "store": {"shard_samples": 1},
}
SMALL["teacher"] |= {"max_sequence_length": 8, "height": 16, "width": 16}


def project(models: Path, folder: Path, prompts: tuple[str, ...] = PROMPTS[:5], workers: int = 0) -> Params:
    """100 shards of one sample each."""
    blocks = SMALL | {"store": {**SMALL["store"], "path": str(folder / "store"), "workers": workers}}
    values = write_project(models, folder, **blocks)
    (folder / "prompts.txt").write_text("\n".join(prompts))
    return Params.model_validate(values)


@pytest.fixture(scope="module")
def undisturbed(models: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Hashes of what an undisturbed rollout publishes."""
    folder = tmp_path_factory.mktemp("undisturbed")
    report = rollout_stage(project(models, folder), "train", folder / "data")
    assert (report.shards_total, report.samples) == (SHARDS, SHARDS)
    return tree(folder / "data")


def check(folder: Path, undisturbed: dict[str, str]) -> None:
    """Nothing lost, no key twice, no byte other, and no part of a file under a final name or left over."""
    assert tree(folder / "data") == undisturbed
    (root,) = (folder / "store").iterdir()
    keys = [row.key for done in ShardSet.open(root).finished() for row in done.rows]
    assert len(keys) == len(set(keys)) == SHARDS


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_twenty_killed_workers_lose_nothing_and_cost_at_most_half_the_work_again(
    models: Path, tmp_path: Path, undisturbed: dict[str, str], monkeypatch: pytest.MonkeyPatch, seed: int
):
    params, counter = project(models, tmp_path), tmp_path / "executions"
    monkeypatch.setenv(COUNTER, str(counter))
    monkeypatch.setenv("PYTHONPATH", environment()["PYTHONPATH"])
    monkeypatch.setattr(rollout, "do_task", counted_task)
    ended, killed = threading.Event(), []
    killer = threading.Thread(target=lambda: killed.append(kill_workers(counter, KILLS, seed, over=ended.is_set)))
    killer.start()
    try:
        report = rollout_stage(params, "train", tmp_path / "data", WorkerTarget(workers=2))
    finally:
        ended.set()
        killer.join()
    started = executions(counter)
    print(f"seed {seed}: {killed[0]} kills, {len(started)} executions of {SHARDS} shards, {report.seconds:.0f} s")
    assert killed == [KILLS]
    assert SHARDS < len(started) <= 1.5 * SHARDS
    check(tmp_path, undisturbed)


def test_twenty_kills_of_the_whole_tree_reuse_every_finished_shard(
    models: Path, tmp_path: Path, undisturbed: dict[str, str]
):
    params = project(models, tmp_path)
    dice = random.Random(0)
    for attempt in range(KILLS):
        before = finished(tmp_path)
        line = command("stage", "rollout", "--workers", "1" if attempt % 5 == 4 else "0", "--out", "data")
        with tree_of(line, cwd=tmp_path, env=environment()) as process:
            goal = len(before) + dice.randint(1, 4)
            wait_for(lambda goal=goal: len(finished(tmp_path)) >= goal)
            time.sleep(dice.uniform(0.0, 0.05))
            assert process.poll() is None
            kill_tree(process)
        assert before.items() <= finished(tmp_path).items()
    before = finished(tmp_path)
    assert KILLS <= len(before) < SHARDS
    report = rollout_stage(params, "train", tmp_path / "data")
    assert report.shards_reused >= len(before) and before.items() <= finished(tmp_path).items()
    check(tmp_path, undisturbed)


def finished(folder: Path) -> dict[str, tuple[int, int]]:
    """Inode and time of every finished shard: one that is made again, to the same bytes, has others."""
    done = [path for path in folder.glob("store/*/shards/*.tar") if Path(f"{path}"[:-4] + ".done.json").exists()]
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in done}


def test_killed_repros_reuse_every_finished_shard(models: Path, tmp_path: Path, undisturbed: dict[str, str]):
    project(models, tmp_path)
    stage = {"cmd": "rats stage rollout --workers 0 --out data", "deps": ["prompts.txt"], "outs": ["data"]}
    (tmp_path / "dvc.yaml").write_text(f"stages:\n  rollout: {stage}\n")
    (tmp_path / ".gitignore").write_text("/store/\n/bin/\n/data\n")
    git(tmp_path, "init", "--quiet")
    line, own = dvc_line(tmp_path, "init", "--quiet")
    subprocess.run(line, cwd=tmp_path, env=own, check=True, capture_output=True)
    (tmp_path / ".dvc" / "config").write_text('[cache]\n    type = "reflink,hardlink,copy"\n')
    commit(tmp_path)
    line, own = dvc_line(tmp_path, "repro")
    for kill in range(DVC_KILLS):
        before = finished(tmp_path)
        with tree_of(line, cwd=tmp_path, env=own) as process:
            goal = len(before) + 3 + kill
            wait_for(lambda goal=goal: len(finished(tmp_path)) >= goal)
            kill_tree(process)
        assert before.items() <= finished(tmp_path).items()
    before = finished(tmp_path)
    assert len(before) < SHARDS
    subprocess.run(line, cwd=tmp_path, env=own, check=True, capture_output=True, timeout=600)
    assert before.items() <= finished(tmp_path).items()
    check(tmp_path, undisturbed)


@pytest.mark.parametrize(("workers", "order", "seed"), [(0, 1, "1"), (1, -1, "2"), (2, -1, "3")])
def test_workers_order_and_hash_seed_change_no_byte(
    models: Path, tmp_path: Path, undisturbed: dict[str, str], workers: int, order: int, seed: str
):
    project(models, tmp_path, PROMPTS[:5][::order])
    line = command("stage", "rollout", "--workers", str(workers), "--out", "data")
    subprocess.run(line, cwd=tmp_path, env=environment() | {"PYTHONHASHSEED": seed}, check=True, capture_output=True)
    check(tmp_path, undisturbed)


def test_two_rollouts_at_once_make_each_shard_once(models: Path, tmp_path: Path, undisturbed: dict[str, str]):
    project(models, tmp_path)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    both = [
        subprocess.Popen(
            command("stage", "rollout", "--workers", "0", "--out", out, "--json"),
            cwd=tmp_path,
            env=environment(),
            **pipes,
        )
        for out in ("data", "other")
    ]
    said = [process.communicate(timeout=600) for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    forwards = [json.loads(out)["teacher_forwards"] for out, _ in said]
    assert sum(forwards) == SHARDS * 4 * 2 and min(forwards) > 0, forwards
    assert tree(tmp_path / "other") == undisturbed
    check(tmp_path, undisturbed)
