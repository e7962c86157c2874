"""The executor on clusters that are not ours: TLS, resources, workers that come, a scheduler that goes."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from distributed import LocalCluster, Security

from rats.schemas.errors import ConfigError, NoWorkerError
from rats.stages.workers.run import Tls, WorkerTarget, run
from tests.support import cluster
from tests.support.cluster import add, note, notes, nothing


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Tls]]:
    """The address of an encrypted scheduler with one worker that offers GPU=1, and files that fit."""
    security = Security.temporary()
    files = cluster.temporary_tls(tmp_path_factory.mktemp("tls") / "ours", security)
    with cluster.encrypted(security) as address:
        yield address, files


def where(cluster_and_files: tuple[str, Tls], /, **changes: Any) -> WorkerTarget:
    address, files = cluster_and_files
    return replace(WorkerTarget(scheduler_address=address, tls=files, wait_seconds=10), **changes)


def test_an_encrypted_scheduler_takes_tasks_that_need_what_its_worker_offers(tls: tuple[str, Tls]):
    assert sorted(run(add, [1, 2, 3], nothing, where(tls, resources={"GPU": 1}))) == [41, 42, 43]


def test_a_key_may_lie_in_the_file_of_its_certificate(tls: tuple[str, Tls], tmp_path: Path):
    address, files = tls
    assert files.key is not None
    (tmp_path / "both.pem").write_text(files.key.read_text() + files.cert.read_text())
    assert list(run(add, [1], nothing, where((address, Tls(files.ca, tmp_path / "both.pem"))))) == [41]


def test_the_certificates_of_dasks_own_configuration_do_as_well(tls: tuple[str, Tls]):
    import dask

    files = {"ca-file": tls[1].ca, "client.cert": tls[1].cert, "client.key": tls[1].key}
    with dask.config.set({f"distributed.comm.tls.{name}": str(path) for name, path in files.items()}):
        assert list(run(add, [1], nothing, where(tls, tls=None))) == [41]


@pytest.mark.parametrize("theirs", ["ca", "cert"])
@pytest.mark.filterwarnings("ignore")
def test_certificates_of_another_authority_are_exit_code_69_at_once(tls: tuple[str, Tls], tmp_path: Path, theirs: str):
    other = cluster.temporary_tls(tmp_path / "other", Security.temporary())
    mixed = replace(tls[1], ca=other.ca) if theirs == "ca" else replace(other, ca=tls[1].ca)
    start = time.monotonic()
    with pytest.raises(NoWorkerError, match="do not accept each other's certificates"):
        list(run(add, [1], nothing, where(tls, tls=mixed)))
    assert time.monotonic() - start < 5


def test_no_certificates_and_files_that_are_none_are_exit_code_2(tls: tuple[str, Tls]):
    with pytest.raises(ConfigError, match="give --tls-ca-file"):
        list(run(add, [1], nothing, where(tls, tls=None)))
    with pytest.raises(ConfigError, match="not a PEM certificate"):
        list(run(add, [1], nothing, where(tls, tls=Tls(Path(__file__), Path(__file__)))))


def test_a_resource_that_nobody_offers_is_an_error_and_no_endless_wait(tls: tuple[str, Tls]):
    with pytest.raises(NoWorkerError, match=r"offers GPU=2 for 1 s: 1 are there and offer GPU=1") as caught:
        list(run(add, [1], nothing, where(tls, resources={"GPU": 2}, wait_seconds=1)))
    assert caught.value.exit_code == 69


def test_the_performance_report_is_a_page_of_dask(tls: tuple[str, Tls], tmp_path: Path):
    page = tmp_path / "reports" / "dask.html"
    assert list(run(add, [1], nothing, where(tls, performance_report=page))) == [41]
    assert "Bokeh" in page.read_text() and [path.name for path in page.parent.iterdir()] == ["dask.html"]


def together(context: list[int], task: int) -> int:
    """How many tasks share the context at this moment."""
    context.append(task)
    time.sleep(0.02)
    count = len(context)
    context.remove(task)
    return count


def test_a_worker_of_many_threads_does_one_task_at_a_time():
    options = {"processes": False, "protocol": "tcp://", "dashboard_address": "127.0.0.1:0", "host": "127.0.0.1"}
    with LocalCluster(n_workers=1, threads_per_worker=4, **options) as four:
        seen = list(run(together, range(6), list, WorkerTarget(scheduler_address=four.scheduler_address)))
    assert seen == [1] * 6


def worker_of(context: int, task: int) -> str:
    from distributed import get_worker

    time.sleep(0.1)
    return get_worker().address


def test_workers_that_come_later_get_tasks_too():
    options = {
        "processes": False,
        "protocol": "tcp://",
        "dashboard_address": "127.0.0.1:0",
        "host": "127.0.0.1",
        "threads_per_worker": 1,
    }
    with LocalCluster(n_workers=1, **options) as growing:
        results = run(worker_of, range(40), nothing, WorkerTarget(scheduler_address=growing.scheduler_address))
        assert len({next(results) for _ in range(3)}) == 1
        growing.scale(3)
        assert len(set(results)) == 3


@pytest.mark.parametrize("name", ["slurm", "cuda"])
def test_a_missing_extra_is_named_with_its_install_line(monkeypatch: pytest.MonkeyPatch, name: str):
    monkeypatch.setitem(sys.modules, {"slurm": "dask_jobqueue", "cuda": "dask_cuda"}[name], None)
    with pytest.raises(ConfigError, match=rf"pip install 'rats\[{name}\]'"):
        list(run(add, [1], nothing, WorkerTarget(workers=1, cluster=name)))


def test_a_performance_report_without_bokeh_names_the_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setitem(sys.modules, "bokeh", None)
    with pytest.raises(ConfigError, match=r"rats\[dashboard\]"):
        list(run(add, [1], nothing, WorkerTarget(workers=1, performance_report=tmp_path / "x.html")))


def test_a_machine_without_the_batch_system_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="no sbatch here"):
        list(run(add, [1], nothing, WorkerTarget(workers=1, cluster="slurm")))


@pytest.mark.slow
def test_kills_lose_no_task_and_a_lost_scheduler_is_exit_code_69_with_the_results_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("DASK_DISTRIBUTED__WORKER__MULTIPROCESSING_METHOD", "forkserver")
    with cluster.scheduler(tmp_path) as (process, address):
        there = WorkerTarget(scheduler_address=address, resources={"GPU": 1}, wait_seconds=20)
        with pytest.raises(NoWorkerError, match="no Dask worker for 1 s"):
            list(run(note, [], nothing, replace(there, wait_seconds=1)))
        with cluster.workers(address, 2, "--resources", "GPU=1"):
            log = tmp_path / "log"
            with cluster.killer(log, every=3, count=3):
                done = list(run(note, [(str(log), number, 0.1) for number in range(12)], nothing, there))
            assert sorted(done) == list(range(12))
            assert len({pid for _, pid in notes(log)}) >= 3 + 1
            # Dask's default gives up on a task after four deaths; the fifth is of a task that was handed in again.
            assert list(run(cluster.die, [(str(tmp_path / "deaths"), 5)], nothing, there)) == [6]
            results = run(
                note, [(str(log), number, 0.1) for number in range(12)], nothing, replace(there, wait_seconds=2)
            )
            first = [next(results), next(results)]
            process.kill()
            with pytest.raises(NoWorkerError, match="scheduler is gone.*run the same command again"):
                first.extend(results)
            assert len(set(first)) == len(first) >= 2
