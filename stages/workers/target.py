"""Where tasks run, as the user chooses it, and the checks of that choice. Without Dask, see `executor`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, urlsplit

from rats.schemas.errors import ConfigError

LOOPBACK = {"127.0.0.1", "localhost", "::1"}

QUEUES = ("slurm", "pbs", "sge", "lsf", "htcondor", "oar")
"""Batch systems that dask-jobqueue starts workers on."""

PROTOCOLS = ("tcp", "tls", "ucx")
"""What Dask's schedulers speak between processes."""

CLUSTERS = (*QUEUES, "cuda")

WORKER_WAIT_SECONDS = 120.0
QUEUE_WAIT_SECONDS = 86400.0
"""A job may wait in its queue for hours."""


@dataclass(frozen=True)
class Tls:
    """PEM files of an encrypted cluster: the CA's certificate, ours, and our key (None: it is in `cert`)."""

    ca: Path
    cert: Path
    key: Path | None = None

    def __post_init__(self) -> None:
        missing = [path for path in (self.ca, self.cert, self.key) if path is not None and not path.is_file()]
        if missing:
            raise ConfigError(f"no file {missing[0]}: --tls-ca-file, --tls-cert and --tls-key name PEM files")


@dataclass(frozen=True)
class WorkerTarget:
    """Where tasks run: in this process (`workers` 0), on local processes, or on a cluster.

    Attributes:
        workers: local processes, or jobs of a batch system; with `cluster` "cuda" 0 means every visible GPU.
        scheduler_address: a running Dask scheduler, whose own workers are used.
        cluster: one of `CLUSTERS`, made from the configuration of dask-jobqueue or by dask-cuda.
        tls: the certificates; None takes those of Dask's configuration.
        resources: what one task needs of a worker, e.g. {"GPU": 1}.
        performance_report: an HTML file about what the workers did when.
        wait_seconds: how long to wait while no worker can take a task; None is 120 s, in a batch queue a day.
    """

    workers: int = 1
    scheduler_address: str | None = None
    cluster: str | None = None
    tls: Tls | None = None
    resources: Mapping[str, float] = field(default_factory=dict)
    performance_report: Path | None = None
    wait_seconds: float | None = None

    def __post_init__(self) -> None:
        if self.scheduler_address is not None:
            _parts(self.scheduler_address)
        if self.cluster is not None and self.cluster not in CLUSTERS:
            raise ConfigError(f"unknown cluster {self.cluster!r}: use one of {', '.join(CLUSTERS)}")
        if self.cluster is not None and self.scheduler_address is not None:
            raise ConfigError("--cluster makes a scheduler, --scheduler-address names one: leave out one of them")
        if self.cluster in QUEUES and self.workers < 1:
            raise ConfigError(f"how many jobs on {self.cluster}? Say it with --workers")
        if self.performance_report is not None and self.in_process:
            raise ConfigError(
                "--performance-report is about workers, and --workers 0 has none: use --workers 1 or more"
            )

    @property
    def in_process(self) -> bool:
        return self.workers == 0 and self.scheduler_address is None and self.cluster is None

    @property
    def patience(self) -> float:
        """Seconds to wait while no worker can take a task."""
        if self.wait_seconds is not None:
            return self.wait_seconds
        return QUEUE_WAIT_SECONDS if self.cluster in QUEUES else WORKER_WAIT_SECONDS


def checked_address(address: str, tls: Tls | None = None) -> str:
    """The address, if it is safe. A scheduler unpickles what it receives, so beyond loopback it must use TLS."""
    parts = _parts(address)
    if parts.scheme == "tls":
        return address
    if tls is not None:
        raise ConfigError(f"scheduler {address} is not encrypted, so the TLS files are of no use: use a tls:// address")
    if parts.hostname not in LOOPBACK:
        raise ConfigError(f"scheduler {address} is not on this machine and not encrypted: use a tls:// address")
    return address


def _parts(address: str) -> SplitResult:
    """Scheme, host and port of a scheduler; ConfigError where one of them is missing or is not Dask's."""
    wanted = "write tls://HOST:8786, or tcp://127.0.0.1:8786 on this machine, as `dask scheduler` says at its start"
    try:
        parts = urlsplit(address if "://" in address else f"tcp://{address}")
        port = parts.port
    except ValueError as error:
        raise ConfigError(f"{address!r} is no address of a scheduler ({error}): {wanted}") from None
    if parts.scheme not in PROTOCOLS:
        page = "it is that of its page" if parts.scheme in ("http", "https") else f"it speaks no {parts.scheme}"
        raise ConfigError(f"{address!r} is no address of a scheduler ({page}): {wanted}")
    if not parts.hostname or not port:
        raise ConfigError(f"{address!r} has no {'port' if parts.hostname else 'host'}: {wanted}")
    return parts


def address_in(path: Path) -> str:
    """The address in a file that `dask scheduler --scheduler-file` wrote."""
    try:
        return str(json.loads(path.read_text())["address"])
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ConfigError(f"{path} is not the scheduler file of a running Dask scheduler: {error}") from error


def parse_resources(texts: Iterable[str]) -> dict[str, float]:
    """`["GPU=1"]` -> `{"GPU": 1.0}`."""
    found = {}
    for text in texts:
        name, _, count = text.partition("=")
        try:
            found[name] = float(count)
        except ValueError:
            found[name] = 0.0
        if not name or not 0 < found[name] < float("inf"):
            raise ConfigError(f"{text!r} is no resource of a worker: write NAME=NUMBER, e.g. GPU=1")
    return found


def able_workers(workers: Mapping[str, Mapping[str, Any]], needs: Mapping[str, float]) -> set[str]:
    """The addresses of workers that offer what a task needs. Each runs one task at a time, whatever it offers.

    A worker that is neither running nor paused has not finished its start, and may never do so.
    """
    awake = {name: worker for name, worker in workers.items() if worker.get("status") in ("running", "paused")}
    offers = {name: worker.get("resources") or {} for name, worker in awake.items()}
    return {name for name, offer in offers.items() if all(offer.get(key, 0) >= count for key, count in needs.items())}


def no_worker_text(workers: Mapping[str, Mapping[str, Any]], needs: Mapping[str, float], seconds: float) -> str:
    """One line that says why no worker could take a task for `seconds`."""
    if not workers:
        return f"no Dask worker for {seconds:.0f} s: start workers, or use --workers 0, and run the same command again"
    if able_workers(workers, {}) != set(workers) or able_workers(workers, needs):
        return f"Dask workers do not get past their start for {seconds:.0f} s: look at their logs; is this rats there?"
    offers = sorted({_listed(worker.get("resources") or {}) for worker in workers.values()})
    return (
        f"no Dask worker offers {_listed(needs)} for {seconds:.0f} s: {len(workers)} are there and offer "
        f"{' or '.join(offers)}; start some by `dask worker --resources {_listed(needs, ',')}`, then run again"
    )


def _listed(resources: Mapping[str, float], comma: str = ", ") -> str:
    return comma.join(f"{name}={count:g}" for name, count in sorted(resources.items())) or "nothing"
