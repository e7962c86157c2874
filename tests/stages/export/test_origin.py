"""`rats generate` and `rats export` refuse another model than the run's, and another grid than it was trained on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from diffusers import FlowMatchEulerDiscreteScheduler

from rats.pipeline.families.open import Model
from rats.pipeline.weights.lora import WEIGHTS
from rats.stages.train.origin import check_grid
from rats.stages.train.record import read_record
from tests.support import tiny
from tests.support.exporting import PROMPT, drawn, export, ours, params
from tests.support.project import rats


def generate(home: Path, run: str, out: Path, *overrides: str, code: int = 0) -> str:
    """What it says."""
    flags = [flag for override in overrides for flag in ("--set", override)]
    line = ("generate", PROMPT, "--run", f"runs/{run}", "--nfe", "3", "--seed", "4", "--out", str(out), *flags)
    return rats(home, *line, code=code).stderr


def test_generate_refuses_another_model_than_the_run_s(home: Path, tmp_path: Path) -> None:
    other = tiny.write_flux(tmp_path / "flux", seed=5, guidance_embeds=True)
    out, own = tmp_path / "a.png", Model.of(params(home)).folder
    said = generate(home, "full", out, f"model.path={other}", code=65)
    assert "runs/full was trained with another vae" in said and own.hash_of("vae")[:12] in said
    assert str(other / "vae") in said and "--set model.path=" in said
    shutil.copytree(home / "models/flux/vae", other / "vae", dirs_exist_ok=True)
    said = generate(home, "lora", out, f"model.path={other}", code=65)
    assert "runs/lora was trained with another transformer" in said and own.hash_of("transformer")[:12] in said
    assert not out.exists()
    generate(home, "full", out, f"model.path={other}")  # a whole network needs the decoder alone
    assert out.exists()


def test_generate_refuses_a_student_that_is_not_the_run_s(home: Path, tmp_path: Path) -> None:
    shutil.copytree(home / "runs", tmp_path / "runs")
    shutil.copy(home / "params.yaml", tmp_path)
    shutil.copy(home / "runs/full/run.json", tmp_path / "runs/lora/run.json")
    assert "is not the network that the run has left" in generate(tmp_path, "lora", tmp_path / "a.png", code=65)


def test_generate_says_what_it_draws_unlike_in_training(home: Path, tmp_path: Path, caplog) -> None:
    generate(home, "lora", tmp_path / "a.png", "teacher.guidance_scale=4")
    assert "was trained with guidance_scale = 2.5, it draws with 4.0" in caplog.text


@pytest.fixture
def moved(home: Path, tmp_path: Path) -> Path:
    """The model with another shift: the grid moves as it would by another version of diffusers."""
    model = Path(shutil.copytree(home / "models/flux", tmp_path / "moved"))
    config = model / "scheduler/scheduler_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"shift": 5.0}))
    return model


def test_a_grid_that_has_moved_is_refused_by_generate_and_export(home: Path, moved: Path, tmp_path: Path) -> None:
    drawing = generate(home, "lora", tmp_path / "a.png", f"model.path={moved}", code=65)
    exporting = export(home, "full", tmp_path / "out", "--set", f"model.path={moved}", code=65)
    for said in (drawing, exporting):
        assert "was trained on the sigmas 1, 0.75, 0 for 2 steps" in " ".join(said.split())
        assert "the scheduler gives 1, 0.8333, 0" in " ".join(said.split()) and "sigmas=" in said
    assert not (tmp_path / "a.png").exists() and not (tmp_path / "out").exists()


def test_the_run_s_own_sigmas_undo_the_move_in_a_plain_pipeline(home: Path, moved: Path) -> None:
    """The way out that the refusal and the card name."""
    model = Model.of(params(home, f"model.path={moved}"))
    pipeline = model.open_pipeline(home / "runs/lora/student")
    assert np.abs(drawn(pipeline, model.call()) - ours(home, "lora")).max() > 1e-3
    sigmas = json.loads((home / "runs/lora/run.json").read_text())["sigmas"]["3"]
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    again = drawn(pipeline, model.call() | {"sigmas": sigmas[:-1]})
    assert np.abs(again - ours(home, "lora")).max() <= 1e-5


def test_a_record_without_sigmas_and_the_rounding_of_one_are_let_pass(home: Path, moved: Path) -> None:
    record, run = read_record(home / "runs/lora"), home / "runs/lora"
    assert record.sigmas is not None
    check_grid(Model.of(params(home, f"model.path={moved}")), run, record.model_copy(update={"sigmas": None}))
    rounded = {steps: tuple(sigma + 1e-7 for sigma in grid) for steps, grid in record.sigmas.items()}
    check_grid(Model.of(params(home)), run, record.model_copy(update={"sigmas": rounded}))


def test_the_card_shows_the_grid_of_each_number_of_steps(exported: Path) -> None:
    card = (exported / "README.md").read_text()
    assert "| 2 | 1, 0.75, 0 |" in card and "| 3 | 1, 0.857143, 0.6, 0 |" in card
    assert 'sigmas=sigmas["2"][:-1]' in card and f'weight_name="{WEIGHTS}"' in card
