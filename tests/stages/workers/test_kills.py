"""Twenty kills on a cluster that is not ours, with Dask's own defaults: what is lost, and what without a window."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from distributed import Client, as_completed

from rats.schemas.errors import NoWorkerError
from rats.stages.workers.cluster import DEATHS
from rats.stages.workers.run import WorkerTarget, run
from tests.support import cluster
from tests.support.cluster import die, note, notes, nothing

pytestmark = pytest.mark.slow

KILLS = 20
TASKS = 100


def either(context: int, task: tuple[str, Any]) -> int:
    return {"die": die, "note": note}[task[0]](context, task[1])


def test_twenty_kills_lose_no_task_of_a_hundred_and_repeat_few(tmp_path: Path):
    log = tmp_path / "log"
    with cluster.scheduler(tmp_path) as (_, address), cluster.workers(address, 2, "--resources", "GPU=1"):
        where = WorkerTarget(scheduler_address=address, resources={"GPU": 1})
        with cluster.killer(log, every=4, count=KILLS) as killed:
            done = list(run(note, [(str(log), number, 0.2) for number in range(TASKS)], nothing, where))
    assert len(killed) == KILLS
    assert sorted(done) == list(range(TASKS))
    assert len(notes(log)) <= 1.5 * TASKS, f"{len(notes(log))} executions"


def test_all_tasks_at_once_lose_many_of_them_by_the_same_kills(tmp_path: Path):
    """The control: it is the window that saves them."""
    log = tmp_path / "log"
    with (
        cluster.scheduler(tmp_path) as (_, address),
        cluster.workers(address, 2, "--resources", "GPU=1"),
        cluster.killer(log, every=4, count=KILLS),
        Client(address) as client,
    ):
        tasks = [(str(log), number, 0.2) for number in range(TASKS)]
        futures = [client.submit(note, 40, task, pure=False, resources={"GPU": 1}) for task in tasks]
        ended = [future.status for future in as_completed(futures)]
    assert ended.count("error") >= 10, f"{ended.count('finished')} of {TASKS} survived"


def test_a_task_that_always_kills_its_worker_ends_the_run_and_not_the_results_before_it(tmp_path: Path):
    deaths, done = tmp_path / "deaths", []
    with cluster.scheduler(tmp_path) as (_, address), cluster.workers(address, 2, "--resources", "GPU=1"):
        where = WorkerTarget(scheduler_address=address, resources={"GPU": 1})
        tasks = [("note", (str(tmp_path / "log"), number, 0.1)) for number in range(5)]
        with pytest.raises(NoWorkerError, match=r"workers died or were lost under one task.*shard_samples"):
            for result in run(either, [*tasks, ("die", (str(deaths), 1000))], nothing, where):
                done.append(result)
    assert len(set(done)) == len(done) >= 3
    assert DEATHS <= len(notes(deaths)) <= DEATHS + 4
