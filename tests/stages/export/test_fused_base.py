"""A teacher with a style LoRA in it: shards, student, pictures and export are all of that teacher."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline
from safetensors.torch import load_file

from rats.pipeline.families.open import Model
from rats.pipeline.store.shard_set import ShardSet
from rats.schemas.params import load_params
from rats.schemas.recipe import IN_RECIPE
from rats.stages.generate import open_pipeline
from rats.stages.plan.plan import plan_rollout
from tests.support import tiny
from tests.support.exporting import SHORT, drawn, export
from tests.support.project import rats, write_project
from tests.support.styles import write_lora

LORA = {"rank": 2, "alpha": 5.0}
WEIGHT = 0.8


@pytest.fixture(scope="module")
def home(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with a rollout and a run of adapters, both of the tiny FLUX with a LoRA in it."""
    folder = tmp_path_factory.mktemp("styled")
    changes: dict[str, Any] = {
        "train": SHORT,
        "variants": {"lora": {"lora": LORA}, "full": {}},
        "evaluate": {"variants": ["lora"]},
    }
    write_project(models, folder, **changes)
    style = write_lora(Model.of(load_params(folder / "params.yaml")), folder / "style")
    loras = [{"path": str(style), "weight": WEIGHT}]
    write_project(models, folder, model={"loras": loras}, **changes)
    (folder / "prompts.txt").write_text("\n".join(tiny.PROMPTS[:2]))
    rats(folder, "stage", "rollout", "--out", "shards")
    for name in ("lora", "full"):
        rats(folder, "stage", "train", "--variant", name, "--shards", "shards", "--out", f"runs/{name}")
    return folder


def model_of(home: Path, *overrides: str) -> Model:
    return Model.of(load_params(home / "params.yaml", overrides))


def test_the_shards_are_the_styled_teachers_and_its_students_run_knows_it(home: Path) -> None:
    plain, styled = (load_params(home / "params.yaml", change) for change in (["model.loras=[]"], []))
    assert plan_rollout(plain, "train")["fingerprint"] != plan_rollout(styled, "train")["fingerprint"]
    assert plan_rollout(plain, "train")["samples_missing"] == 2 and not plan_rollout(styled, "train")["samples_missing"]
    network = model_of(home).folder.hash_of("transformer")
    recipe = ShardSet.open(home / "shards").recipe
    assert recipe.weights["transformer"] == network == json.loads((home / "runs/lora/run.json").read_text())["base"]
    assert "model.loras" not in IN_RECIPE, "its content is, by the network's hash"


@pytest.mark.parametrize("other", ["[]", "[{path: style, weight: 0.7}]"])
def test_another_weight_or_none_is_another_base_for_every_command(home: Path, tmp_path: Path, other: str) -> None:
    change, out = ("--set", f"model.loras={other}"), ("--out", str(tmp_path / "out.png"))
    draw = ("generate", "a red fox", "--run", "runs/lora", "--nfe", "3")
    assert "trained with another transformer" in rats(home, *draw, *out, *change, code=65).stderr
    assert "trained with another transformer" in export(home, "lora", tmp_path / "out", *change, code=65)
    train = ("stage", "train", "--variant", "lora", "--shards", "shards", "--out", str(tmp_path / "run"))
    assert "was made with another transformer" in rats(home, *train, *change, code=65).stderr


def test_the_exported_pipeline_and_the_cards_own_code_draw_as_rats_does(
    home: Path, tmp_path: Path, models: Path
) -> None:
    export(home, "lora", tmp_path / "out")
    model = model_of(home)
    ours = drawn(open_pipeline(model, home / "runs/lora"), model.call())
    plain = model_of(home, "model.loras=[]")
    assert np.abs(drawn(open_pipeline(plain, None), model.call()) - ours).max() > 1e-3
    pipe = FluxPipeline.from_pretrained(tmp_path / "out/pipeline")
    assert np.abs(drawn(pipe, model.call()) - ours).max() <= 1e-5
    card = (tmp_path / "out/README.md").read_text()
    pipe = FluxPipeline.from_pretrained(models / "flux")
    here = {'"."': repr(str(home / "style")), '"lora"': repr(str(tmp_path / "out/lora"))}
    lines = re.findall(r"^pipe\.(?:load|fuse|unload).*", card, re.MULTILINE)
    assert len(lines) == 4 and f"pipe.fuse_lora(lora_scale={WEIGHT})" in lines
    for line in lines:
        exec(next((line.replace(old, new) for old, new in here.items() if old in line), line), {"pipe": pipe})
    assert np.abs(drawn(pipe, model.call()) - ours).max() <= 1e-5
    assert f"at {WEIGHT}" in card and "without\nit the adapters draw another picture" in card
    assert str(home) not in card


def test_a_whole_network_is_trained_from_the_styled_base_and_is_not_styled_twice(home: Path, tmp_path: Path) -> None:
    trained = load_file(home / "runs/full/student/diffusion_pytorch_model.safetensors")
    far = [
        sum(float((model.base_network().state_dict()[name] - trained[name]).square().sum()) for name in trained)
        for model in (model_of(home), model_of(home, "model.loras=[]"))
    ]
    assert 0 < far[0] < 0.5 * far[1]
    opened = open_pipeline(model_of(home), home / "runs/full").transformer.state_dict()
    assert all(torch.equal(opened[name], trained[name]) for name in trained)


def test_doctor_and_plan_say_what_is_fused(home: Path) -> None:
    said = f"{home}/style/pytorch_lora_weights.safetensors at {WEIGHT}"
    assert said in rats(home, "doctor", "--set", "evaluate.judges=[]").stdout
    assert f"{said}, fused into the network" in rats(home, "plan", "--rate", "2").stdout
    assert json.loads(rats(home, "plan", "--rate", "2", "--json").stdout)["loras"] == [said]
