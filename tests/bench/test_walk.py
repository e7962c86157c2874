"""The walk of a rollout's parameters: what is found out of the model is found out once."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench import walk
from tests.support.project import write_project


def test_a_rollout_looks_up_reads_and_hashes_its_model_once(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_project(models, tmp_path)
    found = walk.main(["--params", str(tmp_path / "params.yaml"), "--rooms"])
    # the driver for its recipe, then the worker, which holds what lies here against it
    for part in (found["recipe"], found["worker"]):
        assert part["model looked up"] == part["most often one file"] == part["model_index.json read"] == 1
    assert found["recipe"]["files hashed"] == len(hashed(models / "flux", ("scheduler",)))
    assert found["worker"]["files hashed"] == len(
        hashed(models / "flux", ("scheduler", "vae"))
    )  # no address has the VAE
    assert found["recipe"]["components outlined"] == 2  # network and decoder
    # between the two, the driver opens what the worker will open, without values: nothing is hashed or looked up again
    assert found["tasks"]["files hashed"] == found["tasks"]["model looked up"] == 0
    assert found["all"]["returns"] > sum(found[part]["rooms"] for part in walk.PARTS)
    said = capsys.readouterr().out
    assert "files hashed" in said and "recipe: schemas/params.py > " in said


def hashed(folder: Path, but: tuple[str, ...]) -> list[Path]:
    """Files of the components, of all `but` these."""
    return [path for path in folder.glob("*/*") if path.is_file() and path.parent.name not in but]
