"""A client of the Dask cluster that a `WorkerTarget` names: started here, by a batch system, or running already.

With `run.py` the only file that imports dask. Every scheduler is on loopback or speaks TLS.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
import shlex
import shutil
import ssl
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from rats.schemas.errors import ConfigError, NoWorkerError, reason
from rats.stages.workers.target import Tls, WorkerTarget, checked_address

log = logging.getLogger(__name__)

CONNECT_SECONDS = 30.0
"""Seconds that a scheduler may take to answer, or to come back after the connection is lost."""

DEATHS = 10
"""How many workers may die while running one task before the run ends with an error."""

QUEUE_CLASSES = {
    "slurm": "SLURMCluster",
    "pbs": "PBSCluster",
    "sge": "SGECluster",
    "lsf": "LSFCluster",
    "htcondor": "HTCondorCluster",
    "oar": "OARCluster",
}


@contextmanager
def connected(where: WorkerTarget) -> Iterator[Any]:
    """A client of the cluster, which is closed again if it was started for this."""
    import dask

    # Read while distributed is imported: its log of every connection would bury our progress.
    dask.config.set({"logging.distributed": "critical", "distributed.scheduler.allowed-failures": DEATHS - 1})
    if where.performance_report is not None and importlib.util.find_spec("bokeh") is None:
        raise ConfigError("--performance-report needs bokeh: pip install 'rats[dashboard]'")
    seconds = min(CONNECT_SECONDS, where.patience)
    with (
        _cluster(where) as (target, security),
        _client(target, security, seconds) as client,
        _reported(client, where.performance_report),
    ):
        yield client


@contextmanager
def _client(target: Any, security: Any, seconds: float) -> Iterator[Any]:
    from distributed import Client

    try:
        client = Client(target, timeout=seconds, security=security)
    except ssl.SSLError as error:
        raise ConfigError(f"Dask's TLS files are not a PEM certificate and its key: {error}") from error
    except OSError as error:
        raise NoWorkerError(_no_scheduler(target, error)) from error
    with client:
        yield client


def _no_scheduler(address: str, error: OSError) -> str:
    reasons = [str(cause) for cause in _causes(error) if "SSL" in str(cause) or isinstance(cause, ssl.SSLError)]
    if reasons:
        return (
            f"scheduler {address} and we do not accept each other's certificates: use files of one CA ({reasons[-1]})"
        )
    return f"no Dask scheduler answers at {address}: start one, or use --workers"


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _cluster(where: WorkerTarget) -> AbstractContextManager[tuple[Any, Any]]:
    """What a Client connects to, and with which certificates."""
    if where.scheduler_address is not None:
        return nullcontext((checked_address(where.scheduler_address, where.tls), _security(where)))
    if where.cluster is None:
        return _owned(_local(where))
    if where.cluster == "cuda":
        return _owned(_cuda(where))
    return _jobs(where)


@contextmanager
def _owned(cluster: Any) -> Iterator[tuple[Any, Any]]:
    with cluster:
        yield cluster, cluster.security


def _security(where: WorkerTarget) -> Any:
    """The certificates of the command line, else those of Dask's configuration and environment."""
    from distributed import Security

    security = _from_files(where.tls) if where.tls is not None else Security()
    encrypted = str(where.scheduler_address).startswith("tls://")
    if encrypted and not (security.tls_ca_file and security.tls_client_cert):
        raise ConfigError(
            f"scheduler {where.scheduler_address} takes certificates: give --tls-ca-file, --tls-cert and --tls-key, "
            "or set distributed.comm.tls in Dask's configuration"
        )
    return security


def _from_files(tls: Tls) -> Any:
    """Dask's security settings with the same three files for every role."""
    from distributed import Security

    pair = {"cert": str(tls.cert), "key": str(tls.key or tls.cert)}
    roles = {f"tls_{role}_{part}": path for role in ("client", "scheduler", "worker") for part, path in pair.items()}
    return Security(require_encryption=True, tls_ca_file=str(tls.ca), **roles)


def _local(where: WorkerTarget) -> Any:
    """Local processes with one thread each, on loopback. No memory limit, since models take gigabytes at a time."""
    from distributed import LocalCluster

    return LocalCluster(n_workers=where.workers, processes=True, **_here(where))


def _here(where: WorkerTarget) -> dict[str, Any]:
    """Arguments of all clusters on this machine. Their workers offer the resources that one task needs."""
    import dask

    # by default a worker that is not back after 15 s is given up, and importing torch may take longer
    dask.config.set({"distributed.deploy.lost-worker-timeout": "1 day"})
    return {
        "threads_per_worker": 1,
        "host": "127.0.0.1",
        "dashboard_address": "127.0.0.1:0",
        "memory_limit": 0,
        "silence_logs": logging.CRITICAL,
        "resources": dict(where.resources) or None,
    }


def _cuda(where: WorkerTarget) -> Any:
    """One process for each visible GPU, which it sees as cuda:0; no spilling, our tasks return counts."""
    cuda = _extra("dask_cuda", "cuda", where)
    try:
        return cuda.LocalCUDACluster(n_workers=where.workers or None, device_memory_limit=None, **_here(where))
    except Exception as error:  # of NVML too, which has a class of its own
        raise ConfigError(
            f"cannot start a worker for each GPU: {error}; see nvidia-smi, or leave out --cluster"
        ) from error


@contextmanager
def _jobs(where: WorkerTarget) -> Iterator[tuple[Any, Any]]:
    """Jobs of a batch system, as jobqueue.yaml describes them; temporary certificates unless there are files."""
    import dask

    queue = str(where.cluster)
    make = getattr(_extra("dask_jobqueue", "slurm", where), QUEUE_CLASSES[queue])
    command = shlex.split(make.job_cls.submit_command)[0]
    if shutil.which(command) is None:
        raise ConfigError(f"no {command} here: run on a machine that can submit {queue} jobs")
    configured = dask.config.get(f"jobqueue.{queue}", None) or {}
    # the dashboard has no TLS, so it is on loopback unless the configuration says otherwise
    scheduler = {"dashboard_address": "127.0.0.1:0", **(configured.get("scheduler-options") or {})}
    with _job_certificates(where, configured.get("shared-temp-directory")) as security:
        try:
            make.job_cls("tls://", name="check")  # a cluster that fails half-made is not closed by anybody
            cluster = make(job_cls=_telling(make.job_cls), security=security, scheduler_options=scheduler)
        except (ValueError, RuntimeError, OSError) as error:
            text = f"cannot describe a {queue} job: {reason(error)}"
            raise ConfigError(f"{text} (jobqueue.{queue} in Dask's configuration)") from error
        with _owned(cluster) as owned:
            refused = submit(cluster, where.workers)
            if refused:
                cluster.worker_spec.clear()  # else closing would submit them once more
                raise ConfigError(f"{command} took no job: {refused}")
            yield owned


@contextmanager
def _job_certificates(where: WorkerTarget, shared: str | None) -> Iterator[Any]:
    """The files of the command line, else new ones in a folder that the jobs can reach and only this user can read."""
    if where.tls is not None:
        yield _from_files(where.tls)
        return
    from distributed import Security

    folder = os.path.expanduser(os.path.expandvars(shared or os.getcwd()))
    try:
        made = Security.temporary()
    except ImportError as error:
        raise ConfigError(f"--cluster {where.cluster} needs cryptography: pip install 'rats[slurm]'") from error
    with tempfile.TemporaryDirectory(prefix=".rats-tls-", dir=folder) as private:
        paths = [Path(private, f"{name}.pem") for name in ("ca", "cert", "key")]
        for path, text in zip(paths, (made.tls_ca_file, made.tls_client_cert, made.tls_client_key), strict=True):
            path.write_text(text)
        yield _from_files(Tls(*paths))


def submit(cluster: Any, jobs: int) -> str:
    """Submits missing jobs, also those that ended. Returns why some were refused, or an empty text."""
    cluster.scale(jobs=jobs)
    cluster.sync(_settled, cluster)
    refused = cluster.job_cls.refused
    texts = {reason(error, 1000) for error in refused.values()}
    for name in refused:
        cluster.workers.pop(name, None)
    refused.clear()
    return "; ".join(sorted(texts))


async def _settled(cluster: Any) -> None:
    await cluster


def _telling(job_cls: Any) -> Any:
    """A job class that keeps submission errors in `refused`: Dask would only log a traceback."""
    from distributed.deploy.spec import ProcessInterface

    class Job(job_cls):
        refused: dict[str, Exception] = {}

        async def start(self) -> None:
            try:
                await super().start()
            except (RuntimeError, ValueError, OSError) as error:
                self.refused[self.name] = error
                await ProcessInterface.start(self)

    return Job


def _extra(module: str, extra: str, where: WorkerTarget) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(f"--cluster {where.cluster} needs {module}: pip install 'rats[{extra}]' ({error})") from error


@contextmanager
def _reported(client: Any, path: Path | None) -> Iterator[None]:
    """Writes Dask's performance report. If that fails, the run goes on with a warning."""
    if path is None:
        yield
        return
    from distributed import performance_report

    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        report = performance_report(filename=f"{folder}/report.html")
        report.__enter__()
        try:
            yield
        finally:
            _save(client, report, Path(folder) / "report.html", path)


def _save(client: Any, report: Any, page: Path, path: Path) -> None:
    if client.status != "running":
        log.warning("no performance report: the scheduler is gone")
        return
    try:
        report.__exit__(None, None, None)
    except (ImportError, RuntimeError) as error:  # a scheduler without bokeh raises at the end only
        log.warning("no performance report: %s", error)
    else:
        page.replace(path)
