"""The demonstration project: small, on the embedded model, and readable by every stage."""

from __future__ import annotations

import os
from pathlib import Path

import yaml

from rats.pipeline.prompts import read_prompts
from rats.schemas.params import load_params
from rats.stages.demo import ROOT
from tests.support.project import rats, tree


def test_a_demonstration_is_of_the_embedded_model_with_few_prompts_and_steps(tmp_path: Path) -> None:
    said = rats(tmp_path, "init", "--demo", "my demo").stdout
    folder, default = tmp_path / "my demo", load_params(ROOT / "params.yaml")
    params = load_params(folder / "params.yaml")
    for ours, theirs in ((params.model.path, default.model.path), (params.rewards[1].path, default.rewards[1].path)):
        assert os.path.samefile(folder / ours, ROOT / theirs)
    assert [(folder / str(judge.real_features)).is_file() for judge in params.evaluate.judges] == [True]
    splits = ("train", "validation", "test")
    prompts = {split: read_prompts(folder / getattr(params.prompts, split)) for split in splits}
    concepts = {split: {prompt.concept for prompt in found} for split, found in prompts.items()}
    assert all(len(found) == len(concepts[split]) for split, found in prompts.items())
    assert not concepts["train"] & concepts["test"] and len(concepts["test"]) == 16
    assert params.train.steps < default.train.steps / 3 and params.teacher.seed == default.teacher.seed
    assert "cd 'my demo'" in said and "rats stage rollout --split test --out data/teacher/test" in said
    assert yaml.safe_load((folder / "dvc.yaml").read_text())["stages"]["train"]["foreach"] == ["rats"]


def test_a_demonstration_replaces_nothing_unless_told(tmp_path: Path) -> None:
    rats(tmp_path, "init", "--demo", "demo")
    (tmp_path / "demo/params.yaml").write_text("mine")
    before = tree(tmp_path)
    assert "is there already" in rats(tmp_path, "init", "--demo", "demo", code=73).stderr
    assert tree(tmp_path) == before
    rats(tmp_path, "init", "--demo", "demo", "--force")
    assert load_params(tmp_path / "demo/params.yaml").train.steps == 30
