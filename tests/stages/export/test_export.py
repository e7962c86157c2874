"""`rats export`: what plain diffusers draws from the folder is what `rats generate` draws from the run."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from diffusers import DiffusionPipeline
from PIL import Image
from safetensors.torch import load_file

from rats.pipeline.families.open import Model
from rats.pipeline.weights.hashes import hash_path
from rats.pipeline.weights.lora import WEIGHTS
from rats.schemas.reports import Cell, EvaluateReport
from rats.stages.evaluate.evaluate import evaluate_stage
from tests.support import tiny
from tests.support.exporting import PROMPT, drawn, export, ours, params
from tests.support.project import rats, tree


def test_a_run_with_adapters_leaves_them_alone_and_trains_nothing_else(home: Path) -> None:
    student = home / "runs/lora/student"
    assert [path.name for path in student.iterdir()] == [WEIGHTS]
    state = open_student_of(home, student).state_dict()
    base = open_student_of(home, None).state_dict()
    kept = {name.replace(".base_layer.", "."): value for name, value in state.items() if ".lora_" not in name}
    assert kept.keys() == base.keys() and all(torch.equal(kept[name], base[name]) for name in base)
    assert any(value.any() for name, value in state.items() if ".lora_B." in name)


def open_student_of(home: Path, folder: Path | None) -> torch.nn.Module:
    values = params(home)
    return Model.of(values).open_student(transformer=folder).network


def test_the_merged_pipeline_and_the_base_with_the_adapters_draw_what_generate_draws(home: Path, exported: Path):
    call, expected = json.loads((exported / "call.json").read_text()), ours(home, "lora")
    sigmas = call.pop("sigmas")
    assert call == {"height": 16, "width": 16, "max_sequence_length": 8, "guidance_scale": 2.5}
    merged = DiffusionPipeline.from_pretrained(exported / "pipeline")
    assert np.abs(drawn(merged, call) - expected).max() <= 1e-4 and not hasattr(merged.transformer, "peft_config")
    assert set(sigmas) == {"2", "3"} and sigmas["3"] == merged.scheduler.sigmas.tolist()
    base = DiffusionPipeline.from_pretrained(home / "models/flux")
    assert np.abs(drawn(base, call) - expected).max() > 1e-3
    base.load_lora_weights(exported / "lora", weight_name=WEIGHTS)
    assert np.abs(drawn(base, call) - expected).max() <= 1e-4


def test_a_whole_network_is_exported_in_the_base_s_pipeline(home: Path, tmp_path: Path) -> None:
    assert export(home, "full", tmp_path / "out")["parts"] == ["pipeline", "README.md", "call.json"]
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "out/pipeline")
    assert np.abs(drawn(pipeline, Model.of(params(home)).call()) - ours(home, "full")).max() <= 1e-4


def test_what_is_exported_names_no_path_of_this_machine(home: Path, exported: Path) -> None:
    files = [path for path in exported.rglob("*") if path.is_file()]
    assert [path.name for path in files if str(home).encode() in path.read_bytes()] == []


def test_the_commands_draw_and_measure_with_adapters(home: Path, tmp_path: Path) -> None:
    how = ("--run", "runs/lora", "--nfe", "3", "--seed", "4", "--no-enlarge")
    rats(home, "generate", PROMPT, *how, "--out", str(tmp_path / "a.png"))
    picture = np.asarray(Image.open(tmp_path / "a.png"))
    assert np.array_equal(picture, (ours(home, "lora") * 255).round().astype("uint8"))


def test_the_card_says_what_it_is_how_it_was_trained_and_how_it_did(home: Path, tmp_path: Path) -> None:
    record = json.loads((home / "runs/lora/run.json").read_text())
    cell = Cell(
        **{"system": "student", "variant": "lora", "nfe": 3, "evaluations": 3, "metric": "pickscore", "mean": 0.25},
        **{"role": "held_out", "split": "test", "ci_low": 0.2, "ci_high": 0.3, "delta_vs_teacher": -0.125},
        **{"delta_ci_low": -0.2, "delta_ci_high": 0.1, "num_prompts": 7, "num_concepts": 3},
    )
    report = EvaluateReport(cells=(cell,), students={"lora": record["student"]})
    (tmp_path / "evaluate.json").write_text(report.model_dump_json())
    flags = ("--no-merged", "--evaluation", str(tmp_path / "evaluate.json"))
    export(home, "lora", tmp_path / "out", *flags)
    card = (tmp_path / "out/README.md").read_text()
    assert yaml.safe_load(card.split("---")[1])["library_name"] == "diffusers"
    assert "| pickscore | held out | 3 | 0.25 [0.2, 0.3] | -0.125 [-0.2, 0.1] | 7 test |" in card
    assert "prompts.train" not in card
    assert f"hpsv2 (`{record['reward_fingerprint'][:12]}`)" in card and record["base"][:12] in card
    (tmp_path / "test.txt").write_text(f"{tiny.PROMPTS[1]}\na purple lake\n")
    export(home, "lora", tmp_path / "out", *flags, "--set", f"prompts.test={tmp_path / 'test.txt'}")
    leak = "1 of 2 prompts of prompts.test are in prompts.train too: what is measured on them is not held out."
    assert leak in (tmp_path / "out/README.md").read_text().splitlines()
    other = report.model_copy(update={"students": {"lora": "ab" * 32}})
    (tmp_path / "evaluate.json").write_text(other.model_dump_json())
    export(home, "lora", tmp_path / "out", *flags)
    assert "pickscore" not in (tmp_path / "out/README.md").read_text()


def test_evaluate_says_which_students_it_measured(home: Path, tmp_path: Path) -> None:
    values = params(home, "evaluate.variants=[lora]", "evaluate.judges=[]")
    report = evaluate_stage(values, home / "shards", home / "runs", tmp_path / "evaluate.json")
    assert report.students == {"lora": hash_path(home / "runs/lora/student")}
    assert {cell.variant for cell in report.cells if cell.system == "student"} == {"lora"}


def test_a_dry_run_says_what_it_would_write_and_writes_nothing(home: Path, tmp_path: Path) -> None:
    report = export(home, "lora", tmp_path / "out", "--dry-run", "--no-merged")
    assert report["parts"] == ["lora", "README.md", "call.json"] and not (tmp_path / "out").exists()


def test_an_export_replaces_an_export_and_nothing_else(home: Path, tmp_path: Path) -> None:
    export(home, "lora", tmp_path / "out", "--no-merged")
    first = tree(tmp_path / "out")
    export(home, "lora", tmp_path / "out", "--no-merged")
    assert tree(tmp_path / "out") == first
    (tmp_path / "out/thesis.tex").write_text("years of work")
    assert "holds something else" in export(home, "lora", tmp_path / "out", "--no-merged", code=73)
    assert (tmp_path / "out/thesis.tex").exists()


def test_a_run_of_another_model_or_call_or_a_changed_student_is_refused(home: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert "leave out --no-merged" in export(home, "full", out, "--no-merged", code=2)
    assert "--set teacher.guidance_scale=2.5" in export(home, "full", out, "--set", "teacher.guidance_scale=4", code=2)
    tiny.write_flux(tmp_path / "flux", seed=5, guidance_embeds=True)
    other = ("--set", f"model.path={tmp_path / 'flux'}")
    assert "trained with another vae" in export(home, "full", out, *other, code=65)
    shutil.copytree(home / "models/flux/vae", tmp_path / "flux/vae", dirs_exist_ok=True)
    assert "trained with another transformer" in export(home, "lora", out, *other, code=65)
    shutil.copytree(home / "runs/lora", tmp_path / "home/runs/lora")
    shutil.copy(home / "params.yaml", tmp_path / "home")
    (tmp_path / "home/runs/lora/student" / WEIGHTS).write_bytes(b"")
    assert "is not the network that the run has left" in export(tmp_path / "home", "lora", out, code=65)
    assert not out.exists()


CHILD = """
import sys
sys.modules["rats"] = None  # not even where it is installed
import numpy, torch
{code}
pipe.set_progress_bar_config(disable=True)
noise = torch.Generator().manual_seed(4)
image = pipe("{prompt}", num_inference_steps=3, generator=noise, output_type="np", **call).images[0]
state = pipe.transformer.state_dict().items()
adapters = {{"transformer." + name.replace(".default_0.", "."): p.numpy() for name, p in state if ".lora_" in name}}
numpy.savez("{out}", image=image, **adapters)
"""


@pytest.mark.slow  # two processes that import diffusers; the same in this process above
def test_the_card_s_own_code_draws_it_in_a_fresh_process_without_rats(
    home: Path, exported: Path, tmp_path: Path
) -> None:
    shutil.copytree(exported, tmp_path / "out")
    shutil.copytree(home / "models/flux", tmp_path / "out/flux")  # the base's name on the card, where there is no hub
    codes = re.findall(r"```python\n(.*?)```", (tmp_path / "out/README.md").read_text(), re.S)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    for number, (code, adapters) in enumerate(
        zip(codes, ({}, load_file(tmp_path / "out/lora" / WEIGHTS)), strict=True)
    ):
        result = tmp_path / f"{number}.npz"
        text = CHILD.format(code=code, prompt=PROMPT, out=result)
        line = [sys.executable, "-W", "ignore", "-c", text]
        done = subprocess.run(line, cwd=tmp_path / "out", env=environment, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr
        assert not re.search("(unexpected|missing) keys", done.stderr), done.stderr
        found = np.load(result)
        assert set(found.files) - {"image"} == set(adapters)
        assert all(np.array_equal(found[name], tensor.numpy()) for name, tensor in adapters.items())
        assert np.abs(found["image"] - ours(home, "lora")).max() <= (1e-6 if adapters else 1e-4)
