"""A Dask cluster that is not ours: its scheduler and workers run in processes of their own, or in this one over TLS."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from distributed import LocalCluster, Security

from rats.stages.workers.target import Tls
from tests.support.project import environment


def nothing() -> int:
    return 40


def add(context: int, task: int) -> int:
    return context + task


def note(context: int, task: tuple[str, int, float]) -> int:
    """Appends its number and process to a file, works for a while, and returns its number."""
    path, number, seconds = task
    with open(path, "a") as file:
        file.write(f"{number} {os.getpid()}\n")
    time.sleep(seconds)
    return number


def die(context: int, task: tuple[str, int]) -> int:
    """Kills its process so many times, counted by the lines of a file; returns the number of executions."""
    path, times = task
    with open(path, "a") as file:
        file.write(f"0 {os.getpid()}\n")
    count = len(notes(Path(path)))
    if count <= times:
        os.kill(os.getpid(), signal.SIGKILL)
    return count


def notes(path: Path) -> list[tuple[int, int]]:
    """The number and the process of every execution so far."""
    lines = path.read_text().splitlines() if path.exists() else []
    return [(int(line.split()[0]), int(line.split()[1])) for line in lines]


def temporary_tls(folder: Path, security: Security) -> Tls:
    """An in-memory certificate of `Security.temporary()` as files."""
    folder.mkdir()
    files = {"ca": security.tls_ca_file, "cert": security.tls_client_cert, "key": security.tls_client_key}
    for name, text in files.items():
        (folder / f"{name}.pem").write_text(text)
    return Tls(*(folder / f"{name}.pem" for name in files))


@contextlib.contextmanager
def encrypted(security: Security) -> Iterator[str]:
    """The address of a tls:// scheduler with one worker that offers GPU=1."""
    options: dict[str, Any] = {"processes": False, "dashboard_address": "127.0.0.1:0", "resources": {"GPU": 1}}
    with LocalCluster(n_workers=1, protocol="tls://", security=security, host="127.0.0.1", **options) as cluster:
        yield cluster.scheduler_address


@contextlib.contextmanager
def started(module: str, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    """`python -m module ...` in the background, killed with its children at the end."""
    quiet = environment() | {"DASK_LOGGING__DISTRIBUTED": "critical"}
    line = [sys.executable, "-m", module, *arguments]
    process = subprocess.Popen(
        line, env=quiet, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@contextlib.contextmanager
def scheduler(folder: Path, *arguments: str) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """A scheduler of Dask's own command with its defaults, and its address."""
    file = folder / "scheduler.json"
    common = ("--host", "127.0.0.1", "--port", "0", "--no-dashboard", "--scheduler-file", str(file))
    with started("distributed.cli.dask_scheduler", *common, *arguments) as process:
        until(lambda: file.exists() and file.read_text().endswith("}"))
        yield process, json.loads(file.read_text())["address"]


@contextlib.contextmanager
def workers(address: str, count: int, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    """Worker processes with a nanny each, which starts a killed one again."""
    common = ("--nworkers", str(count), "--nthreads", "1", "--no-dashboard", "--memory-limit", "0")
    with started("distributed.cli.dask_worker", address, *common, *arguments) as process:
        yield process


def until(condition: Callable[[], Any], seconds: float = 60.0) -> Any:
    """What the condition gives, once it gives something true."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)
    return found


@contextlib.contextmanager
def killer(log: Path, every: int, count: int) -> Iterator[list[int]]:
    """Kills, `count` times, the process that wrote last into a file of `note`, after each `every` more executions."""
    killed: list[int] = []
    ended = threading.Event()

    def kill() -> None:
        while len(killed) < count and not ended.wait(0.01):
            rows = notes(log)
            if len(rows) >= (every + 1) * (len(killed) + 1) and rows[-1][1] not in killed:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(rows[-1][1], signal.SIGKILL)
                    killed.append(rows[-1][1])

    thread = threading.Thread(target=kill)
    thread.start()
    try:
        yield killed
    finally:
        ended.set()
        thread.join()
