"""A project of tiny models in a folder, and the command line run in it as a user would."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from rats.stages.cli.console import guarded
from rats.stages.cli.main import app

ROOT = Path(__file__).parents[2]
PROMPTS = ("a red fox", "a green frog", "a blue whale", "two red apples", "a house at night", "a yellow star")


def settings(models: Path, folder: Path, **changes: Any) -> dict[str, Any]:
    """The smallest useful parameters; `changes` are blocks whose keys replace the ones here."""
    values: dict[str, Any] = {
        "model": {"path": str(models / "flux")},
        "prompts": {"train": str(folder / "prompts.txt")},
        "teacher": {
            "steps": 6,
            "nfe": [2, 3],
            "true_cfg_scale": 3.0,
            "max_sequence_length": 8,
            "height": 16,
            "width": 16,
        },
        "compute": {"micro_batch": 2},
        "store": {"path": str(folder / "store"), "shard_samples": 2, "workers": 0},
        "rewards": [{"name": "hpsv2", "adapter": "hpsv2", "path": str(models / "hpsv2")}],
        "train": {"reward": "hpsv2", "nfe": [2, 3], "steps": 2, "batch": 2, "micro_batch": 2},
    }
    for block, change in changes.items():
        values[block] = values.get(block, {}) | change if isinstance(change, dict) else change
    return values


def write_project(models: Path, folder: Path, **changes: Any) -> dict[str, Any]:
    """Writes `params.yaml` and `prompts.txt` into `folder`; returns the parameters."""
    values = settings(models, folder, **changes)
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    (folder / "params.yaml").write_text(yaml.safe_dump(values))
    return values


def environment() -> dict[str, str]:
    """This process's environment, in which a child imports the same `rats`."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}


def command(*arguments: str) -> list[str]:
    """`rats ...`, as the interpreter of the tests runs it."""
    return [sys.executable, "-m", "rats.stages.cli.main", *arguments]


@dataclass(frozen=True)
class Said:
    """What a command printed."""

    stdout: str
    stderr: str


def rats(folder: Path, *arguments: str, code: int = 0) -> Said:
    """Runs `rats` in `folder`, in this process (a new one takes seconds to import torch), and checks its exit code."""
    out, err, before = io.StringIO(), io.StringIO(), signal.getsignal(signal.SIGTERM)
    with contextlib.chdir(folder), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            guarded(lambda: app(list(arguments)))
        except SystemExit as ended:
            status = int(ended.code or 0)
        finally:
            signal.signal(signal.SIGTERM, before)
    said = Said(out.getvalue(), err.getvalue())
    assert status == code, f"rats {' '.join(arguments)}: exit {status}\n{said.stdout}\n{said.stderr}"
    return said


def spawn(folder: Path, *arguments: str, code: int = 0) -> Said:
    """Runs `rats` in `folder` in a process of its own, and checks its exit code."""
    line = command(*arguments)
    done = subprocess.run(line, cwd=folder, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == code, f"rats {' '.join(arguments)}: exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return Said(done.stdout, done.stderr)


def tree(folder: Path) -> dict[str, str]:
    """sha256 by name of all files below a folder."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
