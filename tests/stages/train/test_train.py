"""Stage two on a tiny FLUX and a tiny PickScore in their real formats, from shards that stage one has made."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from blake3 import blake3
from diffusers import FluxTransformer2DModel

from rats.pipeline.families.open import Model
from rats.pipeline.rewards.clip import PickScore
from rats.pipeline.store.scores import read_scores, reward_column
from rats.pipeline.store.shard_set import ShardSet
from rats.pipeline.store.shards import read_sample
from rats.schemas.errors import ConfigError, DataError
from rats.schemas.params import Params
from rats.stages.rollout.rollout import rollout_stage
from rats.stages.train.train import train_stage
from tests.support import tiny

TRAIN: dict[str, Any] = {
    "nfe": (2, 3),
    "steps": 4,
    "batch": 4,
    "micro_batch": 4,
    "lr": 1e-3,
    "warmup": 2,
    "reward": "pick",
    "checkpoint_every": 2,
    "log_gradients_every": 2,
}
VARIANTS: dict[str, Any] = {
    "rats": {},
    "constant": {"gate.form": "constant", "gate.value_from": "runs/rats"},
    "long": {"steps": 40, "checkpoint_every": 100},
}


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """Models, prompts and published shards, made once; tests take copies of what they change."""
    folder = tmp_path_factory.mktemp("home")
    tiny.write_flux(folder / "flux")
    tiny.write_pickscore(folder / "pick")
    (folder / "prompts.txt").write_text("\n".join(tiny.PROMPTS[:4]) + "\n")
    rollout_stage(params_of(folder), "train", folder / "shards")
    return folder


def params_of(home: Path, teacher: dict[str, Any] | None = None, **changes: Any) -> Params:
    sampling = {"steps": 6, "nfe": (2, 3), "height": tiny.SIZE, "width": tiny.SIZE, "noises_per_prompt": 2}
    sampling |= {"max_sequence_length": tiny.LENGTH, "true_cfg_scale": 2.0}
    return Params.model_validate(
        {
            "model": {"path": str(home / "flux")},
            "prompts": {"train": str(home / "prompts.txt")},
            "teacher": sampling | (teacher or {}),
            "compute": {"micro_batch": 4},
            "store": {"path": str(home / "store"), "shard_samples": 4, "workers": 0},
            "rewards": [{"name": "pick", "adapter": "pickscore", "path": str(home / "pick")}],
            "train": TRAIN | changes,
            "variants": VARIANTS,
        }
    )


def rows(run: Path) -> list[dict[str, str]]:
    with (run / "metrics.csv").open(newline="") as file:
        return [{name: value for name, value in row.items() if name != "seconds"} for row in csv.DictReader(file)]


@pytest.fixture(scope="module")
def finished(home) -> Path:
    """An undisturbed run."""
    train_stage(params_of(home), "rats", home / "shards", home / "runs" / "rats")
    return home / "runs" / "rats"


def test_a_run_leaves_a_student_that_diffusers_loads_and_that_has_moved(home, finished):
    student = FluxTransformer2DModel.from_pretrained(finished / "student")
    base = FluxTransformer2DModel.from_pretrained(home / "flux" / "transformer")
    assert any(not torch.equal(p, q) for p, q in zip(student.parameters(), base.parameters(), strict=True))
    assert "_name_or_path" not in (finished / "student" / "config.json").read_text()


def test_the_record_says_what_was_trained_on_what(home, finished):
    record, shards = json.loads((finished / "run.json").read_text()), ShardSet.open(home / "shards")
    assert (record["variant"], record["steps"], record["nfe"]) == ("rats", 4, [2, 3])
    assert (record["recipe"], record["snapshot"]) == (shards.fingerprint, shards.snapshot().hash)
    assert 0 < record["gate_mean"] < 1 and record["tau"] > 0
    assert Path(record["checkpoint"]).is_dir() and record["student_forwards"] == 2 * (2 + 3)


def test_the_gate_mean_of_the_record_is_the_mean_of_the_column(finished):
    record = json.loads((finished / "run.json").read_text())
    means = [float(row["gate_mean"]) for row in rows(finished)]
    assert record["gate_mean"] == pytest.approx(sum(means) / len(means))


def test_no_teacher_runs_and_no_picture_of_the_teacher_is_scored(home, tmp_path, monkeypatch):
    seen, score = [], PickScore.score

    def recorded(self, images_B3HW, prompts):
        seen.append(images_B3HW)
        return score(self, images_B3HW, prompts)

    monkeypatch.setattr(PickScore, "score", recorded)
    report = train_stage(params_of(home), "rats", home / "shards", tmp_path / "run")
    assert (report.teacher_forwards, report.teacher_reward_calls) == (0, 0)
    monkeypatch.undo()
    shards, params = ShardSet.open(home / "shards"), params_of(home)
    student = Model.of(params).open_student()
    finals = [torch.from_numpy(read_sample(shards, row)["x"][-1].copy()) for row in shards.index(shards.snapshot())]
    drawn = {digest(picture) for picture in student.decode(torch.stack(finals).float())}
    assert len(seen) == 2 * 4 and not drawn & {digest(picture) for pictures in seen for picture in pictures}


def digest(picture: torch.Tensor) -> str:
    return blake3(picture.detach().numpy().tobytes()).hexdigest()


def test_one_epoch_reads_every_stored_score_once(home, finished):
    shards = ShardSet.open(home / "shards")
    address, _ = reward_column(shards, "pick")
    scores = read_scores(shards, address, [row.key for row in shards.index(shards.snapshot())])
    first_epoch = rows(finished)[:2]  # 2 batches of 4 are the 8 samples, each once
    mean = sum(float(row["reward_teacher"]) for row in first_epoch) / 2
    assert mean == pytest.approx(sum(scores.values()) / 8, rel=1e-5)


def test_the_constant_control_takes_the_mean_of_the_run_it_names(home, finished, monkeypatch, tmp_path):
    monkeypatch.chdir(home)
    train_stage(params_of(home), "constant", home / "shards", tmp_path / "constant")
    record = json.loads((tmp_path / "constant" / "run.json").read_text())
    assert record["gate_value"] == json.loads((finished / "run.json").read_text())["gate_mean"]
    assert record["gate_mean"] == pytest.approx(record["gate_value"], rel=1e-6)


def test_the_constant_control_without_that_run_says_what_to_do(home, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="train that run first"):
        train_stage(params_of(home), "constant", home / "shards", tmp_path / "constant")


def test_a_run_that_goes_on_equals_an_undisturbed_one_to_the_last_bit(home, finished, tmp_path):
    train_stage(params_of(home, steps=2), "rats", home / "shards", tmp_path)
    (tmp_path / "metrics.csv").unlink()  # as `dvc repro` does before it runs the stage again
    train_stage(params_of(home), "rats", home / "shards", tmp_path, resume="latest")
    weights = "student/diffusion_pytorch_model.safetensors"
    assert (tmp_path / weights).read_bytes() == (finished / weights).read_bytes()
    assert rows(tmp_path) == rows(finished)


def test_a_finished_run_that_is_resumed_trains_no_step_and_leaves_the_same_student(home, finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    report = train_stage(params_of(home), "rats", home / "shards", tmp_path / "run", resume="latest")
    weights = "student/diffusion_pytorch_model.safetensors"
    assert report.steps == 4 and (tmp_path / "run" / weights).read_bytes() == (finished / weights).read_bytes()


def test_a_checkpoint_that_is_not_there_is_refused(home, tmp_path):
    with pytest.raises(ConfigError, match="use --resume latest"):
        train_stage(params_of(home), "rats", home / "shards", tmp_path, resume="000077")


def refused(params: Params, home: Path, out: Path) -> str:
    with pytest.raises(DataError) as error:
        train_stage(params, "rats", home / "shards", out)
    assert not (out / "metrics.csv").exists() and "\n" not in str(error.value) and error.value.exit_code == 65
    return str(error.value)


def copy_of(home: Path, tmp_path: Path) -> Path:
    for name in ("flux", "pick", "shards"):
        shutil.copytree(home / name, tmp_path / name)
    return tmp_path


def test_other_student_weights_are_refused_with_both_hashes(home, tmp_path):
    copy = copy_of(home, tmp_path)
    tiny.write_flux(copy / "flux", seed=5)
    message = refused(params_of(copy), copy, tmp_path / "run")
    assert "made with another transformer" in message and "--shards" in message
    assert ShardSet.open(copy / "shards").recipe.weights["transformer"][:12] in message


def test_another_vae_is_refused_with_both_hashes(home, tmp_path):
    copy = copy_of(home, tmp_path)
    tiny.vae(seed=9).save_pretrained(copy / "flux" / "vae")
    assert "scored with another vae" in refused(params_of(copy), copy, tmp_path / "run")


def test_another_reward_is_refused_with_both_hashes(home, tmp_path):
    copy = copy_of(home, tmp_path)
    tiny.write_pickscore(copy / "pick", seed=5)
    assert "scored with another reward" in refused(params_of(copy), copy, tmp_path / "run")


@pytest.mark.parametrize("teacher", [{"seed": 1}, {"true_cfg_scale": 3.0}, {"steps": 7}])
def test_shards_of_another_recipe_are_refused_by_the_field_that_differs(home, tmp_path, teacher):
    message = refused(params_of(home, teacher=teacher), home, tmp_path / "run")
    assert ("sigmas" if "steps" in teacher else next(iter(teacher))) in message


def test_a_truncated_shard_stops_the_run_before_a_step(home, tmp_path):
    copy = copy_of(home, tmp_path)
    shard = copy / "shards" / "shards" / "rollout-000000.tar"
    data = shard.read_bytes()
    shard.unlink()
    shard.write_bytes(data[: len(data) // 2])
    with pytest.raises(DataError, match="damaged"):
        train_stage(params_of(copy), "rats", copy / "shards", tmp_path / "run")


def test_sigterm_saves_the_step_and_exits_143(home, tmp_path):
    script = (
        "import sys\nfrom pathlib import Path\nfrom rats.stages.train.train import train_stage\n"
        "from tests.stages.train.test_train import params_of\nhome, out = map(Path, sys.argv[1:])\n"
        "train_stage(params_of(home), 'long', home / 'shards', out)\n"
    )
    command = [sys.executable, "-c", script, str(home), str(tmp_path)]
    root = str(Path(__file__).parents[3])
    paths = os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])
    child = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": paths}, stderr=subprocess.DEVNULL, cwd=root)
    metrics, end = tmp_path / "metrics.csv", time.monotonic() + 120
    while not (metrics.exists() and metrics.read_text().count("\n") > 2) and time.monotonic() < end:
        assert child.poll() is None
        time.sleep(0.02)
    asked = len(rows(tmp_path))
    child.send_signal(signal.SIGTERM)
    assert child.wait(timeout=60) == 143
    saved = sorted((tmp_path / "checkpoints").iterdir())
    assert len(saved) == 1 and int(saved[0].name) == len(rows(tmp_path)) <= asked + 2, (
        "a step that was under way, and one that began meanwhile"
    )


def test_a_student_is_trained_with_compute_threads_whatever_this_process_had(home: Path, tmp_path: Path) -> None:
    with tiny.threads_seen(given=5) as seen:
        train_stage(params_of(home, steps=2, checkpoint_every=2), "rats", home / "shards", tmp_path / "run")
    assert seen == {1}
    assert json.loads((tmp_path / "run" / "run.json").read_text())["threads"] == 1
