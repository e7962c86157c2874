"""The benchmarks run: at the least size, so that they do not rot."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench import loader, rollout, store
from tests.support.project import write_project


def test_stage_one_is_compared_with_a_bare_loop(
    tmp_path: Path, models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_project(models, tmp_path, teacher={"true_cfg_scale": 1.0})
    options = ["--params", str(tmp_path / "params.yaml"), "--steps", "6", "--batches", "2", "--repeats", "2"]
    (row,) = rollout.main(options)
    assert row["bare"] > 0 and row["rats"] > 0 and row["ratio"] > 0
    assert "against FluxPipeline" in capsys.readouterr().out


def test_the_store_is_compared_with_webdataset_and_parquet(capsys: pytest.CaptureFixture[str]) -> None:
    store.main(["--samples", "3", "--repeats", "1", "--sizes", "miniature"])
    out = capsys.readouterr().out
    assert all(verb in out for verb in ("write", "ordered", "at_random", "verify", "WebDataset"))


def test_the_loader_is_compared_with_plain_webdataset(capsys: pytest.CaptureFixture[str]) -> None:
    loader.main(["--samples", "16", "--rounds", "1", "--tokens", "16"])
    out = capsys.readouterr().out
    assert all(word in out for word in ("rats", "webdataset", "samples/s", "speed ratio"))
