"""One student on one or two ranks: real processes over gloo, started by torchrun and by accelerate."""

from __future__ import annotations

import csv
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
TOLERANCE = 1e-6
"""The reduction adds up two halves of a batch: the last bits of a sum depend on the order."""


def command(out: Path, mode: str, ranks: int, steps: int = 6, launcher: list[str] | None = None) -> list[str]:
    return [
        sys.executable,
        *(launcher or [*TORCHRUN, str(ranks)]),
        "-m",
        "tests.support.ranks",
        str(out),
        mode,
        str(steps),
    ]


def environment() -> dict[str, str]:
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}


def start(arguments: list[str]) -> subprocess.Popen:
    return subprocess.Popen(arguments, env=environment(), cwd=ROOT, stderr=subprocess.PIPE, text=True)


def trained(*runs: list[str]) -> None:
    """Run side by side; each must end well."""
    for child in [start(run) for run in runs]:
        _, errors = child.communicate(timeout=120)
        assert child.returncode == 0, errors[-2000:]


def rows(out: Path) -> list[dict[str, str]]:
    with (out / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def assert_same_run(one: Path, other: Path) -> None:
    for a, b in zip(rows(one), rows(other), strict=True):
        for name in set(a) - {"seconds"}:
            assert (a[name] == "") == (b[name] == "") and float(a[name] or 0) == pytest.approx(
                float(b[name] or 0), rel=1e-5, abs=TOLERANCE
            ), name
    for file in ("network", "ema"):
        ends = [load_file(sorted((out / "checkpoints").iterdir())[-1] / f"{file}.safetensors") for out in (one, other)]
        for name, tensor in ends[0].items():
            torch.testing.assert_close(ends[1][name], tensor, rtol=1e-5, atol=TOLERANCE)


def test_two_ranks_make_the_update_of_one(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    trained(command(one, "ddp", 1), command(two, "fsdp", 2))  # sharded: the harder of the two ways
    assert_same_run(one, two)


@pytest.mark.slow
def test_two_ranks_that_each_hold_the_network_make_the_update_of_one(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    trained(command(one, "ddp", 1), command(two, "ddp", 2))
    assert_same_run(one, two)


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_ranks(tmp_path):
    one, changed = tmp_path / "one", tmp_path / "changed"
    trained(command(one, "ddp", 1))
    trained(command(changed, "fsdp", 2, steps=3))
    trained(command(changed, "ddp", 1))
    assert_same_run(one, changed)


@pytest.mark.slow
def test_accelerate_launch_works_as_it_is(tmp_path):
    launcher = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1"]
    launcher += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    one, two = tmp_path / "one", tmp_path / "two"
    trained(command(one, "ddp", 1), command(two, "ddp", 2, launcher=launcher))
    assert_same_run(one, two)


def processor_seconds_of_children() -> float:
    """Of all descendants that have ended and were waited for."""
    return sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])


@pytest.mark.slow
def test_sigterm_ends_all_ranks_with_a_checkpoint_and_no_child_left(tmp_path):
    reaped = processor_seconds_of_children()
    child = start(command(tmp_path, "ddp", 2, steps=100_000))
    end = time.monotonic() + 60
    while not (tmp_path / "metrics.csv").exists() or len(rows(tmp_path)) < 3:
        assert child.poll() is None and time.monotonic() < end
        time.sleep(0.05)
    family = psutil.Process(child.pid).children(recursive=True)
    before = sum(sum(process.cpu_times()[:2]) for process in [psutil.Process(child.pid), *family])
    child.send_signal(signal.SIGTERM)
    child.communicate(timeout=60)
    # their own time, not the clock's: on a busy machine they wait for the processor
    assert processor_seconds_of_children() - reaped - before < 5 and child.returncode != 0
    assert not any(process.is_running() and process.status() != "zombie" for process in family)
    newest = max(int(path.name) for path in (tmp_path / "checkpoints").iterdir())
    assert newest == len(rows(tmp_path))
