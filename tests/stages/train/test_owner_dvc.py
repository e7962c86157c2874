"""Two trainers, an orphan and `dvc repro` meet on one run folder: real processes, a tiny FLUX, DVC's own cache."""

from __future__ import annotations

import hashlib
import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from rats.stages.train.owner import read_owner
from rats.stages.train.record import read_record
from tests.stages.test_dvc import dvc, dvc_line
from tests.stages.train.test_train import home, params_of, rows  # noqa: F401
from tests.support.project import spawn

STEPS, SHORT = 600, 20
PIPELINE = """
stages:
  train:
    cmd: rats stage train --shards {shards} --out runs/rats --resume latest
    params: [train]
    outs: [runs/rats/student, runs/rats/metrics.csv]
    metrics: [runs/rats/run.json]
"""


@pytest.fixture
def project(home: Path, tmp_path: Path) -> Path:  # noqa: F811
    """A stage that trains from shards that are there, with DVC's cache linked to it."""
    write_params(tmp_path, params_of(home, steps=STEPS, checkpoint_every=1000).model_dump(mode="json"))
    (tmp_path / "dvc.yaml").write_text(PIPELINE.format(shards=home / "shards"))
    dvc(tmp_path, "init", "--no-scm", "--quiet")
    dvc(tmp_path, "config", "cache.type", "hardlink")
    return tmp_path


def write_params(folder: Path, values: dict) -> None:
    (folder / "params.yaml").write_text(yaml.safe_dump(values))


def started(folder: Path) -> subprocess.Popen[bytes]:
    line, own = dvc_line(folder, "repro")
    return subprocess.Popen(line, cwd=folder, env=own, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def wait_for(condition: Callable[[], object]) -> None:
    end = time.monotonic() + 240
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def done(run: Path) -> int:
    return len(rows(run)) if (run / "metrics.csv").exists() else 0


def assert_whole(run: Path, cache: Path, steps: int) -> None:
    """The metrics of one run, linked into the cache, in which every object hashes to its name."""
    assert [int(row["step"]) for row in rows(run)] == list(range(steps)) and read_record(run).steps == steps
    objects = [path for path in cache.rglob("*") if path.is_file()]
    for path in objects:
        name = path.parent.name + path.name.removesuffix(".dir")
        assert hashlib.md5(path.read_bytes()).hexdigest() == name
    assert any(path.samefile(run / "metrics.csv") for path in objects)


@pytest.mark.slow
def test_trainers_an_orphan_and_dvc_leave_the_metrics_of_one_run_and_a_whole_cache(project: Path) -> None:
    run, cache = project / "runs" / "rats", project / ".dvc" / "cache" / "files" / "md5"
    first = started(project)
    wait_for(lambda: done(run) > 2)
    orphan = read_owner(run)
    assert orphan is not None and orphan.parent == first.pid  # the shell between them is passed over
    flags = ("--shards", yaml.safe_load((project / "dvc.yaml").read_text())["stages"]["train"]["cmd"].split()[4])
    said = spawn(project, "stage", "train", *flags, "--out", "runs/rats", "--resume", "latest", code=75)
    assert f"belongs to process {orphan.process} on" in said.stderr
    first.kill()
    first.wait()
    assert done(run) < STEPS, "it had ended before it could become an orphan"
    assert "train" in dvc(project, "repro")  # clears the results, waits for the orphan, goes on where it has saved
    assert_whole(run, cache, STEPS)
    assert not os.path.exists(f"/proc/{orphan.process}")
    # another setting: a new run, and the old one's checkpoints are kept
    values = yaml.safe_load((project / "params.yaml").read_text())
    values["train"] |= {"lr": 0.002, "steps": SHORT}
    write_params(project, values)
    dvc(project, "repro")
    assert_whole(run, cache, SHORT)
    assert read_record(run).changes == () and rows(run)[-1]["lr"] == "0.002"
    assert (run / "replaced" / "0001" / "checkpoints" / f"{STEPS:06d}" / "state.json").is_file()
