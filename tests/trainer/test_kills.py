"""A training that is killed with -9, inside its saves too, and goes on: not one bit differs from an undisturbed one."""

from __future__ import annotations

import csv
import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import pytest

from rats.trainer.checkpoint import Checkpoints
from tests.support.toy import ToyReward, settings, train_in


class RandomReward(ToyReward):
    """Uses the global generators, as somebody's reward may: their states have to come back."""

    def score(self, images_B3HW, prompts):
        import numpy as np
        import torch

        noise = torch.randn(len(prompts)) + float(np.random.normal()) + random.gauss(0, 1)
        return super().score(images_B3HW, prompts) + 0.01 * noise


def kept_training(folder: Path, chosen) -> None:
    """A child process: train until killed or done."""
    from rats.trainer.randomness import seed_all

    seed_all(5)
    train_in(folder, chosen, resume=(folder / "checkpoints").exists(), reward=RandomReward())


def started(folder: Path, chosen):
    """A child that trains, forked from a server that has the imports behind it."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.support.toy", "tests.trainer.test_kills"])
    child = context.Process(target=kept_training, args=(folder, chosen))
    child.start()
    return child


def kill_and_resume(folder: Path, chosen, kills: int) -> tuple[int, int]:
    """Train in children that are killed; returns how many died, and how many of them inside a save."""
    dice, dead, inside = random.Random(0), 0, 0
    while True:
        child = started(folder, chosen)
        if dead < kills:
            steps = len(finished(folder)) + dice.randint(1, 2)
            wait_for(lambda goal=steps: len(finished(folder)) >= goal, child)
            if dead % 2:  # the next save has begun: its temporary folder is there
                wait_for(lambda: torn(folder), child)
            else:
                time.sleep(dice.random() * 0.02)
            os.kill(child.pid, signal.SIGKILL)
        child.join()
        if child.exitcode == 0:
            return dead, inside
        dead, inside = dead + 1, inside + bool(torn(folder))
        assert child.exitcode == -signal.SIGKILL
        for left in torn(folder):
            left.rename(folder / f"seen-{dead}")  # counted once


def finished(folder: Path) -> list[Path]:
    """All checkpoints; the limit of these runs keeps every one."""
    return [path for path in (folder / "checkpoints").glob("*") if path.name.isdigit()]


def torn(folder: Path) -> list[Path]:
    """Temporary folders of saves that have not ended."""
    return [path for path in (folder / "checkpoints").glob("*") if not path.name.isdigit()]


def wait_for(condition, child, seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition() and child.is_alive() and time.monotonic() < end:
        time.sleep(0.0005)


def undisturbed(folder: Path, chosen) -> None:
    child = started(folder, chosen)
    child.join()
    assert child.exitcode == 0


def trace(folder: Path) -> list[dict[str, str]]:
    """All columns but the clock's; numbers are written as repr, so equal texts are equal bits."""
    with (folder / "metrics.csv").open(newline="") as file:
        return [{name: value for name, value in row.items() if name != "seconds"} for row in csv.DictReader(file)]


def assert_same_bits(one: Path, other: Path, steps: int) -> None:
    assert trace(one) == trace(other) and len(trace(one)) == steps
    ends = [Checkpoints(folder / "checkpoints").newest() for folder in (one, other)]
    for file in ("network", "optimizer", "ema", "rng-00000"):
        assert ends[0].tensors()[file].keys() == ends[1].tensors()[file].keys()
        assert len({(end.path / f"{file}.safetensors").read_bytes() for end in ends}) == 1, file


def changes(steps: int) -> dict[str, object]:
    return {"steps": steps, "augment": 1.0, "ema": 0.9, "checkpoints_total_limit": steps}


def test_kill_minus_nine_changes_no_bit(tmp_path):
    undisturbed(tmp_path / "a", settings(checkpoint_every=10, **changes(10)))
    dead, inside = kill_and_resume(tmp_path / "b", settings(checkpoint_every=1, **changes(10)), kills=2)
    assert dead == 2 and inside >= 1
    assert_same_bits(tmp_path / "a", tmp_path / "b", 10)


@pytest.mark.slow
def test_thirty_kills_of_which_ten_inside_a_save_change_no_bit(tmp_path):
    undisturbed(tmp_path / "a", settings(checkpoint_every=70, **changes(70)))
    dead, inside = kill_and_resume(tmp_path / "b", settings(checkpoint_every=1, **changes(70)), kills=30)
    assert dead == 30 and inside >= 10
    assert_same_bits(tmp_path / "a", tmp_path / "b", 70)
