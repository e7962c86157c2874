"""`--cluster slurm` with stand-ins for sbatch and scancel, which run the job scripts here."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dask
import dask_jobqueue  # noqa: F401  its defaults must be there before ours
import pytest
import yaml

from rats.schemas.errors import ConfigError
from rats.stages.workers import run as executor
from rats.stages.workers.run import WorkerTarget, run
from tests.support.cluster import add, note, notes, nothing

ROOT = Path(__file__).parents[3]
SBATCH = """#!/usr/bin/env bash
script="$JOBS/$$.sh"
cp "$1" "$script"
setsid bash "$script" > "$JOBS/$$.out" 2>&1 &
touch "$JOBS/$!.pid"
echo "Submitted batch job $!"
"""
SCANCEL = """#!/usr/bin/env bash
touch "$JOBS/$1.cancelled"
kill -9 -- "-$1"
"""
REFUSING = """#!/usr/bin/env bash
echo "sbatch: error: invalid partition specified: gpu" >&2
exit 1
"""


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder for the commands of a batch system, first in PATH; a job is one worker that offers GPU=1."""
    folder = tmp_path / "tools"
    folder.mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    job = {"cores": 1, "processes": 1, "memory": "1GB", "worker-extra-args": ["--resources", "GPU=1"]}
    with dask.config.set({f"jobqueue.slurm.{name}": value for name, value in job.items()}):
        yield folder


def install(folder: Path, **scripts: str) -> None:
    for name, text in scripts.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)


def test_what_the_batch_system_refuses_is_one_line_with_its_reason(tools: Path):
    install(tools, sbatch=REFUSING, scancel=SCANCEL)
    with pytest.raises(ConfigError, match="sbatch took no job: .*invalid partition specified: gpu") as caught:
        list(run(add, [1], nothing, WorkerTarget(workers=1, cluster="slurm")))
    assert "\n" not in str(caught.value)


def test_a_job_without_a_size_names_where_to_write_it(tools: Path):
    install(tools, sbatch=REFUSING)
    with (
        dask.config.set({"jobqueue.slurm.cores": None}),
        pytest.raises(ConfigError, match="how much cores and memory.*jobqueue.slurm in Dask's configuration"),
    ):
        list(run(add, [1], nothing, WorkerTarget(workers=1, cluster="slurm")))


def test_the_jobqueue_yaml_of_the_docs_makes_the_job_that_it_describes(tmp_path: Path, monkeypatch: Any):
    from dask_jobqueue.slurm import SLURMJob

    monkeypatch.chdir(tmp_path)
    values = yaml.safe_load((ROOT / "docs" / "jobqueue.yaml").read_text())
    with dask.config.set({f"jobqueue.slurm.{name}": value for name, value in values["jobqueue"]["slurm"].items()}):
        script = SLURMJob("tls://10.0.0.1:8786", name="job").job_script()
    for line in ("-p gpu", "-A my-project", "--cpus-per-task=8", "--mem=60G", "-t 08:00:00", "--gres=gpu:1"):
        assert f"#SBATCH {line}" in script
    assert "--nthreads 1 " in script and "--resources GPU=1" in script and "--lifetime 7h30m" in script


@pytest.mark.slow
def test_jobs_do_the_work_over_tls_and_a_job_that_ends_is_submitted_again(
    tools: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    install(tools, sbatch=SBATCH, scancel=SCANCEL)
    jobs, log = tmp_path / "jobs", tmp_path / "log"
    jobs.mkdir()
    monkeypatch.setenv("JOBS", str(jobs))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join((str(ROOT / "build" / "typing"), str(ROOT))))
    monkeypatch.setattr(executor, "RESUBMIT_SECONDS", 2.0)
    done = []
    with dask.config.set({"distributed.deploy.lost-worker-timeout": "1s"}):
        where = WorkerTarget(workers=1, cluster="slurm", resources={"GPU": 1}, wait_seconds=60)
        for number in run(note, [(str(log), number, 0.2) for number in range(20)], nothing, where):
            done.append(number)
            if len(done) == 3:
                os.killpg(int(next(jobs.glob("*.pid")).stem), signal.SIGKILL)
    assert sorted(done) == list(range(20)) and len({pid for _, pid in notes(log)}) == 2
    assert all("tls://" in script.read_text() for script in jobs.glob("*.sh"))
    ended = {job.stem for job in jobs.glob("*.cancelled")}
    assert ended and ended <= {job.stem for job in jobs.glob("*.pid")}
    assert [path.name for path in tmp_path.glob(".rats-tls-*")] == []
