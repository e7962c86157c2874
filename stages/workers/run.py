"""Runs independent tasks in this process or on Dask workers. With `cluster.py` the only file with dask.

Only a few tasks per worker are in flight. If all were submitted at once, Dask would blame every assigned task for the
death of its worker and give up on it. With two per worker, 100 of 100 tasks survived 20 kills.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, TypeVar

from rats.schemas.errors import ConfigError, NoWorkerError, RatsError
from rats.stages.workers.cluster import CONNECT_SECONDS, DEATHS, connected, submit
from rats.stages.workers.target import QUEUES, Tls, WorkerTarget, able_workers, no_worker_text

__all__ = ["Tls", "WorkerTarget", "run"]

log = logging.getLogger(__name__)

Task = TypeVar("Task")
Result = TypeVar("Result")

TASKS_PER_WORKER = 2
"""Tasks in flight per worker: one runs, one waits."""

TICK = 1.0
"""Seconds between two queries of the workers."""

RESUBMIT_SECONDS = 30.0
"""Seconds after which ended jobs of a batch system are submitted again."""

SAY_SECONDS = 60.0
"""Seconds between two log lines while waiting for workers."""

RESULT_SECONDS = 10.0
"""Seconds for fetching a result, which is a few counts. After that it was lost with its worker."""


def run(
    work: Callable[[Any, Task], Result], tasks: Iterable[Task], setup: Callable[[], Any], where: WorkerTarget
) -> Iterator[Result]:
    """Yields `work(setup(), task)` for every task, as they finish; `setup()` runs once on each worker.

    Without workers, tasks run in this process and in order. `work`, `setup` and the tasks must be picklable. A worker
    runs one task at a time. Every result is yielded once, even if workers die later.

    Raises:
        ConfigError: what `where` asks for cannot be had: an extra, certificates, a batch system.
        NoWorkerError: no worker for `where.patience` seconds, the scheduler is lost, or a task whose
            workers die again and again.
        Exception: what `work` raises.
    """
    if where.in_process:
        context = setup()
        yield from (work(context, task) for task in tasks)
        return
    with connected(where) as client, _held(client, _Holder.plugin(setup)) as holder:
        try:
            yield from _windowed(
                client, _WorkerPool(client, where, holder), partial(_on_worker, holder.name, work), iter(tasks)
            )
        except Exception as error:
            if isinstance(error, RatsError) or client.status == "running":
                raise
            raise _lost_scheduler() from error


class _Holder:
    """Holds a worker's context, which its first task makes: slow loading in a plugin would stop the heartbeat."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self.name = f"rats-{uuid.uuid4().hex}"  # two runs may share workers, but not their contexts
        self.make = make
        self.made: list[Any] = []

    @classmethod
    def plugin(cls, make: Callable[[], Any]) -> Any:
        """The holder as a Dask WorkerPlugin, so that a restarted worker gets it too."""
        from distributed import WorkerPlugin

        return type("Holder", (cls, WorkerPlugin), {})(make)

    def setup(self, worker: Any) -> None:
        """Dask calls this on the worker. One thread works at a time: context and torch's thread count are shared."""
        self.turn = threading.Lock()

    def do(self, work: Callable[[Any, Task], Result], task: Task) -> Result:
        with self.turn:
            if not self.made:
                self.made.append(self.make())
            return work(self.made[0], task)


def _on_worker(holder: str, work: Callable[[Any, Task], Result], task: Task) -> Any:
    from distributed import get_worker

    return get_worker().plugins[holder].do(work, task)


@contextmanager
def _held(client: Any, holder: Any) -> Iterator[Any]:
    """Frees the context on workers that live on: it may hold gigabytes."""
    try:
        yield holder
    finally:
        if client.cluster is None and client.status == "running":
            with suppress(Exception):  # a worker that dies now has nothing to give back
                drop = client.scheduler.unregister_worker_plugin
                client.sync(drop, name=holder.name, callback_timeout=RESULT_SECONDS)


class _WorkerPool:
    """The workers that can take a task now, queried once a `TICK`. Raises NoWorkerError after too long without one."""

    def __init__(self, client: Any, where: WorkerTarget, holder: Any) -> None:
        self.client = client
        self.where = where
        self.holder = holder
        self.size = 0
        self.known: set[str] = set()
        self.greeted = ""
        self.seen = self.said = self.asked = time.monotonic()
        self.looked = 0.0

    def able(self) -> int:
        """The number of workers that can take a task."""
        if time.monotonic() - self.looked >= TICK:
            self._look()
            self.looked = time.monotonic()
        return self.size

    def wait(self) -> None:
        """Returns as soon as one worker can take a task."""
        while not self.able():
            time.sleep(0.05 if time.monotonic() - self.seen < TICK else TICK / 2)

    def _look(self) -> None:
        state = self._state()
        self._greet(state)
        workers = state.get("workers", {})
        fit = able_workers(workers, self.where.resources)
        self.size = len(fit)
        staying, self.known = self.known & fit, fit  # a worker that dies during its start is listed for a moment
        if staying:
            self.seen = time.monotonic()
        elif time.monotonic() - self.seen > self.where.patience:
            raise NoWorkerError(no_worker_text(workers, self.where.resources, self.where.patience))
        elif time.monotonic() - self.said > SAY_SECONDS:
            self.said = time.monotonic()
            log.info("waiting for a worker: %s", no_worker_text(workers, self.where.resources, self.said - self.seen))
        self._submit_jobs(len(workers))

    def _state(self) -> dict[str, Any]:
        """The scheduler's state. If the connection is lost, waits up to `CONNECT_SECONDS` for it, then raises."""
        if self.client.status == "connecting":
            log.warning("the Dask scheduler does not answer, waiting for it up to %.0f s", CONNECT_SECONDS)
        while self.client.status == "connecting":
            time.sleep(TICK / 10)
        if self.client.status != "running":
            raise _lost_scheduler()
        try:
            return dict(self.client.sync(self.client.scheduler.identity))
        except OSError:  # the client learns of a lost connection a moment later than we
            return {}

    def _greet(self, state: dict[str, Any]) -> None:
        """Registers the plugin for all workers, also later ones. A scheduler that was restarted needs it again."""
        if state and state["id"] != self.greeted:
            _register(self.client, self.holder)
            self.greeted = state["id"]

    def _submit_jobs(self, there: int) -> None:
        """Submits jobs again that ended by their walltime or by preemption."""
        cluster = self.client.cluster
        if self.where.cluster not in QUEUES or time.monotonic() - self.asked < RESUBMIT_SECONDS:
            return
        self.asked = time.monotonic()
        refused = submit(cluster, self.where.workers)
        if refused:
            log.warning("%d workers are there, and not all jobs are taken: %s", there, refused)


def _register(client: Any, plugin: Any) -> None:
    """Registers the plugin; tries again if a worker dies meanwhile."""
    for attempt in range(1, DEATHS + 1):
        try:
            client.run_on_scheduler(_here)
            client.register_plugin(plugin)
            return
        except OSError as error:
            if attempt == DEATHS:
                raise NoWorkerError(f"workers die as soon as they start ({error}): look at their memory") from error
        except Exception as error:
            text = "scheduler or workers cannot load this rats: install the same version there"
            raise ConfigError(f"{text} ({error})") from error


def _here() -> None:
    """Does nothing. It is pickled by name, so it runs only where this version of rats is installed."""


def _windowed(
    client: Any, crew: _WorkerPool, work: Callable[[Task], Result], tasks: Iterator[Task]
) -> Iterator[Result]:
    """Keeps WINDOW tasks per able worker in flight and yields results as they come."""
    flying: dict[Any, tuple[Task, int]] = {}

    def submit(task: Task, deaths: int) -> None:
        future = client.submit(work, task, pure=False, resources=dict(crew.where.resources) or None)
        flying[future] = (task, deaths)

    def fill() -> None:
        room = TASKS_PER_WORKER * max(1, crew.able()) - len(flying)
        for task in itertools.islice(tasks, max(0, room)):
            submit(task, 0)

    crew.wait()
    fill()
    while flying:
        for future in _finished(list(flying)):
            task, deaths = flying.pop(future)
            died = _deaths(future)
            if died:
                submit(task, _within_bounds(deaths + died))
                continue
            try:
                result = future.result(timeout=RESULT_SECONDS)
            except Exception:
                if future.status == "error" and not _deaths(future):
                    raise
                flying[future] = (task, deaths)  # its worker died with the result: Dask makes it again
            else:
                # else Dask computes it again when its worker dies: garbage, such as a traceback, may still hold it
                future.release()
                yield result
        fill()


def _finished(futures: list[Any]) -> list[Any]:
    """The futures that have ended, with or without a result; waits at most one `TICK`."""
    from distributed import wait

    try:
        wait(futures, timeout=TICK, return_when="FIRST_COMPLETED")
    except Exception as error:  # a timeout, or cancelled futures: both show in the status
        log.debug("waiting for tasks: %r", error)
    return [future for future in futures if future.done()]


def _deaths(future: Any) -> int:
    """How many workers died while running the task, if it has no result because of that; else 0."""
    from distributed.scheduler import KilledWorker, NoValidWorkerError

    if future.cancelled():
        return 1
    error = future.exception() if future.status == "error" else None
    if isinstance(error, KilledWorker):
        return int(error.allowed_failures) + 1
    return 1 if isinstance(error, NoValidWorkerError) else 0


def _within_bounds(deaths: int) -> int:
    if deaths < DEATHS:
        return deaths
    raise NoWorkerError(
        f"{deaths} workers died or were lost under one task: look at their logs, give them more memory or time, "
        "or make smaller shards (store.shard_samples), and run the same command again"
    )


def _lost_scheduler() -> NoWorkerError:
    return NoWorkerError("the Dask scheduler is gone; what is finished stays: run the same command again")
