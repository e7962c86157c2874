"""An experiment in a copy of the project reuses the project's store: `dvc exp run --temp`, `--queue`, git worktrees."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.stages.test_dvc import commit, dvc_line, git, shrink
from tests.support.project import PROMPTS, rats


@pytest.fixture(scope="module")
def project(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project in a part of a repository, its models beside the repository, with a rollout of its train split."""
    top = tmp_path_factory.mktemp("copies")
    (top / "mine.csv").write_text("prompt,concept\n" + "".join(f"{text},{text.split()[-1]}\n" for text in PROMPTS))
    flags = ["--model", str(models / "flux"), "--reward", f"hpsv2={models / 'hpsv2'}"]
    rats(top, "init", "repository/sub", "--prompts", "mine.csv", *flags)
    mine = top / "repository" / "sub"
    shrink(mine / "params.yaml")
    no_judge = yaml.safe_load((mine / "params.yaml").read_text()) | {"evaluate": {"judges": []}}
    (mine / "params.yaml").write_text(yaml.safe_dump(no_judge))
    rats(top, "init", "repository/sub", "--dvc")
    git(mine.parent, "init", "--quiet")
    (mine.parent / ".gitignore").write_text("bin/\n")
    commit(mine.parent)
    made = json.loads(rats(mine, "stage", "rollout", "--json").stdout)
    assert made["teacher_forwards"] > 0
    return mine


def run(folder: Path, binaries: Path, *arguments: str) -> str:
    """Runs dvc, which finds itself and this checkout's rats; returns what it printed."""
    line, own = dvc_line(binaries, *arguments)
    (binaries / "bin" / "dvc").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m dvc "$@"\n')
    (binaries / "bin" / "dvc").chmod(0o755)
    done = subprocess.run(line, cwd=folder, env=own, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"dvc {' '.join(arguments)}\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


def report(text: str) -> dict[str, Any]:
    return {name: value for name, _, value in (line.partition(": ") for line in text.splitlines())}


def test_a_git_worktree_has_the_stores_samples(project: Path, tmp_path: Path) -> None:
    git(project.parent, "worktree", "add", "--quiet", str(tmp_path / "tree"))
    planned = json.loads(rats(tmp_path / "tree" / "sub", "stage", "rollout", "--dry-run", "--json").stdout)
    assert (planned["store"], planned["samples_missing"]) == (str(project / "store" / planned["fingerprint"]), 0)
    again = json.loads(rats(tmp_path / "tree" / "sub", "stage", "rollout", "--out", "data", "--json").stdout)
    assert again["teacher_forwards"] == 0
    assert not (tmp_path / "tree" / "sub" / "store").exists() and (tmp_path / "tree" / "sub" / "data").is_dir()


@pytest.mark.slow
def test_dvc_runs_no_teacher_again_in_a_folder_of_its_own(project: Path) -> None:
    said = run(project, project.parent, "exp", "run", "--temp", "--name", "alone", "rollout@train")
    assert report(said)["teacher forwards"] == "0"


@pytest.mark.slow
def test_dvc_runs_no_teacher_again_from_its_queue(project: Path) -> None:
    change = ("--set-param", "store.shard_samples=9")
    run(project, project.parent, "exp", "run", "--queue", "--name", "waited", *change, "rollout@train")
    run(project, project.parent, "exp", "queue-worker", "dvc-exp-test-1", "--quiet")  # in front, until the queue ends
    assert report(run(project, project.parent, "queue", "logs", "waited"))["teacher forwards"] == "0"


@pytest.mark.slow
def test_dvc_runs_no_teacher_again_in_a_worktree(project: Path, tmp_path: Path) -> None:
    git(project.parent, "worktree", "add", "--quiet", str(tmp_path / "another"))
    said = run(tmp_path / "another" / "sub", project.parent, "repro", "rollout@train")
    assert report(said)["teacher forwards"] == "0"
