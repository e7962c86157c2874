"""The main job at tiny size, as a user runs it: `rats init`, `dvc repro`, an experiment."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.project import PROMPTS, environment, rats, tree

SIZES = {
    "teacher": {
        "steps": 5,
        "nfe": [2, 3],
        "true_cfg_scale": 3.0,
        "max_sequence_length": 8,
        "height": 16,
        "width": 16,
        "noises_per_prompt": 2,
    },
    "compute": {"micro_batch": 4},
    "store": {"workers": 0},
    "train": {"nfe": [2, 3], "steps": 3, "batch": 2, "micro_batch": 2, "lr": 0.001, "checkpoint_every": 2},
    "evaluate": {"pictures": 2},
}
VARIANTS = {"rats": {}, "constant": {"gate.form": "constant", "gate.value_from": "runs/rats"}}


@pytest.fixture(scope="module")
def project(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project made by `rats init` for one's own model, prompts and rewards, at tiny size, committed to git."""
    folder = tmp_path_factory.mktemp("dvc")
    things = ("door", "lake", "tree", "boat")
    rows = [(f"{text}", text.split()[-1]) for text in PROMPTS] + [(f"a {thing} at dawn", thing) for thing in things]
    (folder / "mine.csv").write_text("prompt,concept\n" + "".join(f"{text},{concept}\n" for text, concept in rows))
    shutil.copytree(models, folder / "mine" / "models")
    paths = ["--model", "mine/models/flux"]
    for name in ("hpsv2", "pickscore"):
        paths += ["--reward", f"{name}=mine/models/{name}"]
    rats(folder, "init", "mine", "--prompts", "mine.csv", *paths)
    mine = folder / "mine"
    shrink(mine / "params.yaml")
    control(mine / "params.yaml")
    rats(folder, "init", "mine", "--dvc")
    git(mine, "init", "--quiet")
    (mine / ".gitignore").write_text((mine / ".gitignore").read_text() + "/models/\n/bin/\n")
    commit(mine)
    return mine


def shrink(path: Path) -> None:
    values = yaml.safe_load(path.read_text())
    for block, change in SIZES.items():
        values[block] |= change
    path.write_text(yaml.safe_dump(values))


def control(path: Path) -> None:
    """Adds the control whose gate is constant."""
    values = yaml.safe_load(path.read_text())
    values["evaluate"]["variants"] = list(VARIANTS)
    path.write_text(yaml.safe_dump(values | {"variants": VARIANTS}))


def git(folder: Path, *arguments: str) -> None:
    who = ["-c", "user.name=test", "-c", "user.email=test@example.org"]
    subprocess.run(["git", *who, *arguments], cwd=folder, check=True, capture_output=True)


def commit(folder: Path) -> None:
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--message", "state")


def dvc_line(folder: Path, *arguments: str) -> tuple[list[str], dict[str, str]]:
    """The command line and the environment of a dvc that finds this checkout's `rats` first on its PATH."""
    binaries = folder / "bin"
    binaries.mkdir(exist_ok=True)
    (binaries / "rats").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m rats.stages.cli.main "$@"\n')
    (binaries / "rats").chmod(0o755)
    names = {"GIT_AUTHOR_NAME": "test", "GIT_COMMITTER_NAME": "test"}
    mails = {"GIT_AUTHOR_EMAIL": "test@example.org", "GIT_COMMITTER_EMAIL": "test@example.org"}
    own = (
        environment() | names | mails | {"PATH": f"{binaries}{os.pathsep}{os.environ['PATH']}", "DVC_NO_ANALYTICS": "1"}
    )
    return [sys.executable, "-m", "dvc", *arguments], own


def dvc(folder: Path, *arguments: str) -> str:
    """Runs dvc; returns what it printed."""
    line, own = dvc_line(folder, *arguments)
    done = subprocess.run(line, cwd=folder, env=own, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, f"dvc {' '.join(arguments)}\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


def ran(output: str) -> set[str]:
    """Names of the stages that dvc ran."""
    return {line.split("'")[1] for line in output.splitlines() if line.startswith("Running stage '")}


def read(path: Path) -> Any:
    return json.loads(path.read_text())


ALL = {"rollout@train", "rollout@test", "train@rats", "control@constant", "evaluate", "report"}


def test_the_whole_pipeline_runs_once_then_only_what_changed(project: Path):
    assert ran(dvc(project, "repro")) == ALL
    check_results(project)
    assert ran(dvc(project, "repro")) == set()
    published = tree(project / "data")
    # another alpha asks for no rollout
    values = yaml.safe_load((project / "params.yaml").read_text())
    values["train"]["alpha"] = 2
    (project / "params.yaml").write_text(yaml.safe_dump(values))
    assert ran(dvc(project, "repro", "--dry")) == {"train@rats", "control@constant"}  # what has changed so far
    # lost outputs come back from the store without the teacher
    shutil.rmtree(project / "data")
    report = json.loads(rats(project, "stage", "rollout", "--out", "data/teacher/train", "--json").stdout)
    assert report["teacher_forwards"] == 0
    assert (
        tree(project / "data" / "teacher" / "train").items()
        <= {name.removeprefix("teacher/train/"): value for name, value in published.items()}.items()
    )


@pytest.mark.slow
def test_an_experiment_with_another_alpha_runs_no_rollout_and_has_other_results(project: Path):
    dvc(project, "repro")
    store, published = tree(project / "store"), tree(project / "data")
    reports = tree(project / "reports")
    commit(project)
    assert ran(dvc(project, "exp", "run", "-S", "train.alpha=3")) == ALL - {"rollout@train", "rollout@test"}
    assert (tree(project / "store"), tree(project / "data")) == (store, published)
    assert tree(project / "reports")["evaluate.json"] != reports["evaluate.json"]


def check_results(project: Path) -> None:
    """All reports are there and say what docs/design.md promises."""
    rollout = read(project / "reports" / "rollout-train.json")
    assert rollout["teacher_forwards"] > 0 and rollout["samples"] > 0
    for variant in VARIANTS:
        record = read(project / "runs" / variant / "run.json")
        assert (record["teacher_forwards"], record["teacher_reward_calls"], record["steps"]) == (0, 0, 3)
        assert (project / "runs" / variant / "student" / "config.json").is_file()
        assert len((project / "runs" / variant / "metrics.csv").read_text().splitlines()) == 4
    assert read(project / "runs" / "constant" / "run.json")["gate_value"] == pytest.approx(
        read(project / "runs" / "rats" / "run.json")["gate_mean"]
    )
    cells = read(project / "reports" / "evaluate.json")["cells"]
    systems = {(cell["system"], cell["variant"], cell["nfe"]) for cell in cells}
    assert {("student", variant, nfe) for variant in VARIANTS for nfe in (2, 3)} < systems
    assert {cell["metric"] for cell in cells} >= {"hpsv2", "pickscore"}
    page = (project / "reports" / "report.html").read_text()
    assert "data:image/png;base64," in page and 'src="http' not in page
    # published by hardlink: the store, the workspace and DVC's cache hold one copy
    shard = next((project / "data" / "teacher" / "train").glob("shards/*.tar"))
    assert shard.stat().st_nlink >= 2
