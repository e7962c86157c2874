"""The executor by itself: plain functions, no models (workers import this file, so it stays light)."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from rats.schemas.errors import ConfigError, DataError, NoWorkerError
from rats.stages.workers.run import WorkerTarget, run


def nothing() -> int:
    return 40


def add(context: int, task: int) -> int:
    return context + task


def refuse(context: int, task: int) -> int:
    raise DataError(f"task {task} is bad")


def die_once(context: int, task: Path) -> str:
    if not task.exists():
        task.write_text("died")
        os.kill(os.getpid(), signal.SIGKILL)
    return task.name


def test_in_process_the_results_come_in_order():
    assert list(run(add, [1, 2, 3], nothing, WorkerTarget(workers=0))) == [41, 42, 43]


def test_an_error_of_the_work_comes_through_as_it_is(tmp_path: Path):
    with pytest.raises(DataError, match="task 1 is bad"):
        list(run(refuse, [1], nothing, WorkerTarget(workers=0)))
    with pytest.raises(DataError, match="task 1 is bad"):
        list(run(refuse, [1], nothing, WorkerTarget(workers=1)))


def test_tasks_that_kill_their_worker_are_done_by_the_next_one(tmp_path: Path):
    tasks = [tmp_path / f"task{i}" for i in range(3)]
    assert sorted(run(die_once, tasks, nothing, WorkerTarget(workers=2))) == [task.name for task in tasks]


def test_no_scheduler_is_an_error_with_exit_code_69():
    with pytest.raises(NoWorkerError, match="no Dask scheduler") as caught:
        list(run(add, [1], nothing, WorkerTarget(workers=0, scheduler_address="tcp://127.0.0.1:9", wait_seconds=2)))
    assert caught.value.exit_code == 69


def test_a_scheduler_elsewhere_needs_tls():
    with pytest.raises(ConfigError, match="tls://"):
        list(run(add, [1], nothing, WorkerTarget(workers=0, scheduler_address="tcp://192.0.2.1:8786")))
