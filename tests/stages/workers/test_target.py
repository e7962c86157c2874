"""What a user can ask for and what is refused, before any cluster is there."""

from __future__ import annotations

from pathlib import Path

import pytest

from rats.schemas.errors import ConfigError
from rats.stages.workers.target import (
    Tls,
    WorkerTarget,
    able_workers,
    address_in,
    checked_address,
    no_worker_text,
    parse_resources,
)
from tests.support import tiny
from tests.support.project import rats, write_project

WORKERS = {
    "a": {"resources": {"GPU": 1.0}, "status": "running"},
    "b": {"resources": {}, "status": "running"},
    "c": {"resources": {"GPU": 2.0, "DISK": 5.0}, "status": "paused"},
    "d": {"resources": {"GPU": 4.0}, "status": "closing"},
}


@pytest.mark.parametrize(
    ("needs", "found"),
    [({}, {"a", "b", "c"}), ({"GPU": 1}, {"a", "c"}), ({"GPU": 2, "DISK": 1}, {"c"}), ({"GPU": 3}, set())],
)
def test_only_workers_that_are_up_and_offer_what_a_task_needs_count(needs: dict[str, float], found: set[str]):
    assert able_workers(WORKERS, needs) == found


def test_the_error_names_what_is_needed_and_what_is_offered():
    text = no_worker_text({name: WORKERS[name] for name in "abc"}, {"GPU": 3}, 120)
    assert "no Dask worker offers GPU=3 for 120 s: 3 are there and offer DISK=5, GPU=2 or GPU=1 or nothing" in text


def test_workers_that_hang_in_their_start_and_no_workers_have_another_text():
    assert "do not get past their start" in no_worker_text({"d": WORKERS["d"]}, {}, 5)
    assert "no Dask worker for 5 s" in no_worker_text({}, {"GPU": 1}, 5)


def test_resources_are_names_and_positive_numbers():
    assert parse_resources(["GPU=1", "DISK=0.5"]) == {"GPU": 1.0, "DISK": 0.5}
    for wrong in ("GPU", "GPU=", "=1", "GPU=0", "GPU=-1", "GPU=nan", "GPU=inf", "GPU=one"):
        with pytest.raises(ConfigError, match="NAME=NUMBER"):
            parse_resources([wrong])


@pytest.mark.parametrize("address", ["127.0.0.1:8786", "tcp://localhost:8786", "tcp://[::1]:8786", "tls://node7:8786"])
def test_addresses_on_this_machine_or_with_tls_are_taken(address: str):
    assert checked_address(address) == address


def test_a_scheduler_elsewhere_needs_tls():
    for address in ("tcp://192.0.2.1:8786", "node7:8786", "ucx://node7:8786", "tcp://127.0.0.1.example.org:8786"):
        with pytest.raises(ConfigError, match="tls://"):
            checked_address(address)


@pytest.mark.parametrize(
    ("address", "hint"),
    [
        ("http://127.0.0.1:8787/status", "that of its page"),
        ("https://node7:8787", "that of its page"),
        ("ftp://node7:8786", "speaks no ftp"),
        ("tls://node7", "has no port"),
        ("localhost", "has no port"),
        ("tcp://:8786", "has no host"),
        ("tcp://127.0.0.1:eight", "is no address of a scheduler"),
        ("tcp://127.0.0.1:99999", "is no address of a scheduler"),
        ("tcp://[::1:8786", "is no address of a scheduler"),
        ("", "has no host"),
    ],
)
def test_what_is_no_address_of_a_scheduler_is_said_before_anything_runs(address: str, hint: str):
    for refused in (lambda: checked_address(address), lambda: WorkerTarget(scheduler_address=address)):
        with pytest.raises(ConfigError, match=f"{hint}.*tls://HOST:8786"):
            refused()


def test_tls_files_for_an_address_without_tls_are_refused():
    file = Path(__file__)
    with pytest.raises(ConfigError, match="not encrypted"):
        checked_address("tcp://127.0.0.1:8786", Tls(file, file))


def test_the_scheduler_file_must_be_one(tmp_path: Path):
    (tmp_path / "good").write_text('{"address": "tcp://127.0.0.1:1"}')
    (tmp_path / "bad").write_text("[]")
    assert address_in(tmp_path / "good") == "tcp://127.0.0.1:1"
    for name in ("bad", "none"):
        with pytest.raises(ConfigError, match=f"{name} is not the scheduler file"):
            address_in(tmp_path / name)


def test_a_batch_queue_is_waited_for_longer_than_workers_of_our_own():
    assert WorkerTarget().patience == 120
    assert WorkerTarget(workers=2, cluster="slurm").patience == 86400
    assert WorkerTarget(workers=2, cluster="slurm", wait_seconds=5).patience == 5


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("project")
    tiny.write_flux(folder / "flux")
    write_project(folder, folder, rewards=[], store={"path": str(folder / "store")})
    return folder


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (["--scheduler-address", "tcp://127.0.0.1:1", "--workers", "2"], "--workers starts local processes"),
        (["--scheduler-address", "tcp://127.0.0.1:1", "--cluster", "slurm", "--workers", "1"], "leave out one"),
        (["--scheduler-address", "tcp://127.0.0.1:1", "--scheduler-file", "x.json"], "the same thing"),
        (["--scheduler-file", "x.json"], "x.json is not the scheduler file"),
        (["--scheduler-address", "tls://127.0.0.1:1", "--tls-cert", "x.pem"], "both --tls-ca-file and --tls-cert"),
        (
            ["--scheduler-address", "tls://127.0.0.1:1", "--tls-ca-file", "x.pem", "--tls-cert", "x.pem"],
            "no file x.pem",
        ),
        (["--tls-ca-file", "params.yaml", "--tls-cert", "params.yaml"], "workers here stay on loopback"),
        (["--cluster", "kubernetes", "--workers", "2"], "unknown cluster 'kubernetes': use one of slurm, pbs"),
        (["--cluster", "slurm"], "how many jobs on slurm"),
        (["--worker-resources", "GPU"], "write NAME=NUMBER"),
        (["--performance-report", "x.html", "--workers", "0"], "--workers 0 has none"),
    ],
)
def test_flags_that_do_not_go_together_are_exit_code_2_before_any_work(project: Path, flags: list[str], text: str):
    said = rats(project, "stage", "rollout", "--dry-run", *flags, code=2)
    assert text in said.stderr and said.stderr.count("\n") == 1
