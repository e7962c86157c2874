"""Real processes that are really killed: helpers of the slow tests, and the work that counts its executions.

Workers import this file, so it stays light.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from rats.stages.rollout import worker
from rats.stages.workers.tasks import ShardBusy, TaskResult

COUNTER = "RATS_TEST_EXECUTIONS"
"""Names the file to which every started execution of a task adds a line."""


def counted_task(context: worker.RolloutModels, task: worker.RolloutTask) -> TaskResult | ShardBusy:
    """`do_task`, which first writes down that it starts: what a killed worker never reports is counted too."""
    handle = os.open(os.environ[COUNTER], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    os.write(handle, f"{task.shard} {os.getpid()}\n".encode())  # one write of a line: whole, whoever else writes
    os.close(handle)
    return worker.do_task(context, task)


def executions(counter: Path) -> list[tuple[str, int]]:
    """Shard and process of every execution so far."""
    lines = counter.read_text().splitlines() if counter.exists() else []
    return [(shard, int(process)) for shard, process in (line.split() for line in lines)]


def kill_workers(counter: Path, kills: int, seed: int, over: Callable[[], bool]) -> int:
    """Kill -9 to `kills` workers in the middle of their work, when and whom by the seed; returns how many died.

    Between two kills 2 to 6 tasks are started. The victim is one of the workers that started a task last.
    """
    dice, done = random.Random(seed), 0
    goal = dice.randint(2, 6)
    while done < kills and not over():
        started = executions(counter)
        if len(started) >= goal:
            time.sleep(dice.uniform(0.0, 0.05))
            if kill(dice.choice([process for _, process in started[-2:]])):
                done, goal = done + 1, len(started) + dice.randint(2, 6)
        time.sleep(0.005)
    return done


def kill(process: int) -> bool:
    """Kill -9; whether it was alive and a worker of this process."""
    try:
        victim = psutil.Process(process)
        if os.getpid() not in [parent.pid for parent in victim.parents()] or victim.status() == psutil.STATUS_ZOMBIE:
            return False
        victim.kill()
        return True
    except psutil.Error:
        return False


@contextmanager
def tree_of(line: list[str], **how: Any) -> Iterator[subprocess.Popen[str]]:
    """A command in a process group of its own, all of whose processes are gone at the end."""
    with open(os.devnull, "w") as nowhere:
        process = subprocess.Popen(line, stdout=nowhere, stderr=nowhere, start_new_session=True, text=True, **how)
        try:
            yield process
        finally:
            kill_tree(process)


def kill_tree(process: subprocess.Popen[str]) -> None:
    """Kill -9 to a command and all that it started, at once."""
    try:
        below = psutil.Process(process.pid).children(recursive=True)
    except psutil.Error:
        below = []
    for part in below:
        with suppress(psutil.Error):
            part.suspend()  # so that none starts another while we go through them
    for part in below:
        with suppress(psutil.Error):
            part.kill()
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    psutil.wait_procs(below, timeout=30)
