"""Runs tasks of one shard each, while other processes may work on the same shards.

The process that claims a shard makes it. If a shard is claimed by another process, its task is put back behind the
others. Then it waits for the claim, and finds the shard done, or makes it if the other process has died.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

from rats.pipeline.store.shard_set import ShardSet
from rats.stages.progress import progress
from rats.stages.workers.run import WorkerTarget, run

log = logging.getLogger(__name__)

CLAIM_WAIT_SECONDS = 5.0
"""How long a worker waits for a shard that another process makes, before it takes another task."""

POLL_SECONDS = 0.1


@dataclass(frozen=True, kw_only=True)
class ShardTask:
    """A task for one shard. If another process has claimed it, the task waits for `wait` seconds."""

    shard: str
    wait: float = 0.0


@dataclass(frozen=True)
class TaskResult:
    """What a task did: samples of its shard, evaluations of the teacher's network, and rows of scores written."""

    samples: int
    teacher_forwards: int
    scored: int


@dataclass(frozen=True)
class ShardBusy:
    """Another process works on this shard: nothing was done."""

    shard: str


Task = TypeVar("Task", bound=ShardTask)


class TaskQueue(Generic[Task]):
    """Tasks in order. One that is put back comes after all others. It may be empty and filled again."""

    def __init__(self, tasks: Sequence[Task]) -> None:
        """All tasks."""
        self._waiting = deque(tasks)
        self._by_shard = {task.shard: task for task in tasks}

    def __iter__(self) -> Iterator[Task]:
        """The queue itself."""
        return self

    def __next__(self) -> Task:
        """The next task."""
        if not self._waiting:
            raise StopIteration
        return self._waiting.popleft()

    def put_back(self, shard: str) -> None:
        """Puts the shard's task at the end; it will then wait for the claim."""
        first = self._by_shard[shard].wait == 0.0
        if first:
            log.info("another process is making %s: it is waited for when the rest is done", shard)
            self._by_shard[shard] = replace(self._by_shard[shard], wait=CLAIM_WAIT_SECONDS)
        self._waiting.append(self._by_shard[shard])


def run_tasks(
    work: Callable[[Any, Task], TaskResult | ShardBusy],
    tasks: Sequence[Task],
    setup: Callable[[], Any],
    where: WorkerTarget,
    label: str,
    samples: int,
) -> list[TaskResult]:
    """Runs all tasks, with progress over their `samples`. Returns their results in the order in which they end.

    `work`, `setup` and the tasks must pickle (see `run.run`).
    """
    if not tasks:
        return []
    made: list[TaskResult] = []
    queue = TaskQueue(tasks)
    where = replace(where, workers=min(where.workers, len(tasks)))
    with progress(label, samples, "samples") as advance:
        for result in run(work, queue, setup, where):
            if isinstance(result, ShardBusy):
                queue.put_back(result.shard)
            else:
                made.append(result)
                advance(result.samples)
    return made


@contextmanager
def claimed(shards: ShardSet, shard: str, seconds: float) -> Iterator[bool]:
    """Claims a shard, waiting up to `seconds`. Gives False if another process still has the claim."""
    end = time.monotonic() + seconds
    while True:
        with shards.claim(shard) as mine:
            if mine or time.monotonic() >= end:
                yield mine
                return
        time.sleep(POLL_SECONDS)
