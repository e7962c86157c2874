"""The benchmarks of stage two run: at the least size, so that they do not rot."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench import memory, step
from rats.schemas.params import Params
from rats.stages.rollout.rollout import rollout_stage
from tests.support.project import write_project


@pytest.fixture
def given(tmp_path: Path, models: Path) -> list[str]:
    """A tiny project with its shards, as options."""
    values = write_project(models, tmp_path, teacher={"true_cfg_scale": 1.0})
    rollout_stage(Params.model_validate(values), "train", tmp_path / "shards")
    return ["--params", str(tmp_path / "params.yaml"), "--shards", str(tmp_path / "shards")]


@pytest.mark.slow
def test_a_step_is_compared_with_a_live_teachers_and_experiments_are_drawn(
    tmp_path: Path, given: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--nfe", "2", "3", "--rounds", "1", "--rollout", "1", "--draw", str(tmp_path / "cost.png")]
    rows = step.main([*given, *options])
    assert [row["evaluations"] for row in rows] == [6, 6] and rows[0]["expected"] == 0.5
    assert all(row["ratio"].wall > 0 for row in rows)
    assert "5 experiments" in capsys.readouterr().out and (tmp_path / "cost.png").stat().st_size > 5000


def test_experiments_add_up() -> None:
    row = {"nfe": 2, "stored": step.Cost(1, 1), "live": step.Cost(4, 4)}
    found = step.experiments([row], [2, 2], step.Cost(0.5, 0.5), samples=100, steps=10)
    assert found["totals"] == {1: (60, 40), 2: (70, 80), 5: (100, 200)}


@pytest.mark.slow
def test_peak_memory_is_measured_in_a_process_of_its_own(given: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    peaks = memory.main([*given, "--nfe", "2", "--modes", "frozen", "live-ema, text encoders kept"])
    assert all(size > 0 for size in peaks.values()) and "| frozen |" in capsys.readouterr().out
