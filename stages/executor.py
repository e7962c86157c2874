"""Runs independent tasks in this process or on Dask workers. The only file that imports dask.

A bounded window of tasks is in flight. With all tasks handed over at once, Dask blames every assigned
task for the death of its worker and gives up on it; with two per worker, 100 of 100 survived 20 kills.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, TypeVar
from urllib.parse import urlsplit

from rats.schemas.errors import ConfigError, NoWorkerError

Task = TypeVar("Task")
Result = TypeVar("Result")

WINDOW = 2
"""Tasks in flight per worker: one at work, one waiting."""

TRIES = 10
"""How often a task may lose its worker before the run gives up on it."""

LOOPBACK = {"127.0.0.1", "localhost", "::1"}


def run(
    work: Callable[[Any, Task], Result],
    tasks: Iterable[Task],
    setup: Callable[[], Any],
    *,
    workers: int,
    scheduler_address: str | None = None,
    no_worker_seconds: float = 120.0,
) -> Iterator[Result]:
    """Yields `work(setup(), task)` of every task, as they finish; `setup()` runs once a worker.

    `workers` = 0 runs in this process and in order, otherwise that many local processes on loopback;
    a `scheduler_address` names a running cluster instead. `work`, `setup` and the tasks must pickle.
    Raises what `work` raises, and NoWorkerError after `no_worker_seconds` without any worker.
    """
    if workers == 0 and scheduler_address is None:
        context = setup()
        yield from (work(context, task) for task in tasks)
        return
    with _client(workers, scheduler_address, no_worker_seconds) as client:
        _register(client, _Holder.plugin(setup))
        yield from _windowed(client, partial(_on_worker, work), iter(tasks), no_worker_seconds)


class _Holder:
    """A worker's context, made by its first task: a slow load in a plugin would stop the heartbeat."""

    name = "rats"

    def __init__(self, setup: Callable[[], Any]) -> None:
        self.make = setup
        self.made: list[Any] = []

    @classmethod
    def plugin(cls, setup: Callable[[], Any]) -> Any:
        """The holder as a Dask WorkerPlugin, so that a worker restarted after a kill has it too."""
        from distributed import WorkerPlugin

        return type("Holder", (cls, WorkerPlugin), {})(setup)

    def context(self) -> Any:
        if not self.made:
            self.made.append(self.make())
        return self.made[0]


def _register(client: Any, plugin: Any) -> None:
    """Gives every worker the plugin, those too that start later; a worker may die while it takes it."""
    for attempt in range(1, TRIES + 1):
        try:
            client.register_plugin(plugin)
            return
        except OSError as error:
            if attempt == TRIES:
                raise NoWorkerError(f"workers die as soon as they start ({error}): look at their memory") from error


def _on_worker(work: Callable[[Any, Task], Result], task: Task) -> Result:
    from distributed import get_worker

    return work(get_worker().plugins[_Holder.name].context(), task)


@contextmanager
def _client(workers: int, address: str | None, seconds: float) -> Iterator[Any]:
    """A client of the local or the named cluster, with at least one worker."""
    import dask

    # Read while distributed is imported: its log of every connection would bury our progress.
    dask.config.set({"logging.distributed": "error"})
    from distributed import Client

    with _local(workers) if address is None else nullcontext(_checked(address)) as cluster:
        try:
            client = Client(cluster, timeout=seconds)
        except OSError as error:
            raise NoWorkerError(f"no Dask scheduler answers at {address}: start one, or use --workers") from error
        with client:
            try:
                client.wait_for_workers(1, timeout=seconds)
            except TimeoutError as error:
                raise _no_worker(seconds) from error
            yield client


def _local(workers: int) -> AbstractContextManager[Any]:
    """Processes of one thread each on loopback, without memory limit: models come and go by gigabytes."""
    import logging

    import dask
    from distributed import LocalCluster

    dask.config.set({"distributed.scheduler.allowed-failures": TRIES})
    return LocalCluster(
        n_workers=workers,
        threads_per_worker=1,
        processes=True,
        host="127.0.0.1",
        dashboard_address="127.0.0.1:0",
        memory_limit=0,
        silence_logs=logging.CRITICAL,
    )


def _checked(address: str) -> str:
    """The address, if it is safe: a scheduler unpickles what it gets, so beyond loopback it takes TLS."""
    parts = urlsplit(address if "://" in address else f"tcp://{address}")
    if parts.scheme != "tls" and parts.hostname not in LOOPBACK:
        raise ConfigError(f"scheduler {address} is not on this machine and not encrypted: use a tls:// address")
    return address


def _windowed(
    client: Any, work: Callable[[Task], Result], tasks: Iterator[Task], no_worker_seconds: float
) -> Iterator[Result]:
    """Keeps WINDOW tasks per worker in flight and yields results as they come."""
    flying: dict[Any, tuple[Task, int]] = {}

    def submit(task: Task, tries: int) -> None:
        flying[client.submit(work, task, pure=False)] = (task, tries)

    def fill() -> None:
        room = WINDOW * max(1, len(client.nthreads())) - len(flying)
        for task in itertools.islice(tasks, max(0, room)):
            submit(task, 1)

    fill()
    while flying:
        for future in _finished(client, list(flying), no_worker_seconds):
            task, tries = flying.pop(future)
            if _lost(future, tries):
                submit(task, tries + 1)
            else:
                yield future.result()
        fill()


def _finished(client: Any, futures: list[Any], no_worker_seconds: float) -> list[Any]:
    """Waits for at least one future; gives up when no worker has been seen for `no_worker_seconds`."""
    from distributed import wait

    seen = time.monotonic()
    while time.monotonic() - seen < no_worker_seconds:
        try:
            return list(wait(futures, timeout=2.0, return_when="FIRST_COMPLETED").done)
        except TimeoutError:
            if client.nthreads():
                seen = time.monotonic()
    raise _no_worker(no_worker_seconds)


def _lost(future: Any, tries: int) -> bool:
    """Whether the worker died under the task, or the cluster dropped it, and another try is left."""
    from distributed import KilledWorker

    if future.cancelled():
        return tries < TRIES
    return future.status == "error" and isinstance(future.exception(), KilledWorker) and tries < TRIES


def _no_worker(seconds: float) -> NoWorkerError:
    return NoWorkerError(f"no Dask worker for {seconds:.0f} s: start workers, or use --workers 0, and run again")
