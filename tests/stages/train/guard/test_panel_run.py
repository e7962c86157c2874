"""The guard in a real training run: tiny FLUX, tiny PickScore that trains, tiny HPSv2 held out."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from rats.pipeline.families.open import Model
from rats.pipeline.protocols import Reward
from rats.pipeline.rewards.open import open_reward
from rats.schemas.errors import ConfigError
from rats.schemas.params import Params
from rats.schemas.train_params import GuardParams
from rats.stages.rollout.rollout import rollout_stage
from rats.stages.train.guard import open as panel_open
from rats.stages.train.guard import validation
from rats.stages.train.guard.look import Validator
from rats.stages.train.train import train_stage
from rats.trainer.sampling import few_steps
from tests.support import tiny

TRAIN: dict[str, Any] = {
    **{"nfe": (2, 3), "steps": 4, "batch": 4, "micro_batch": 4, "lr": 1e-3, "warmup": 0, "reward": "pick"},
    **{"ema": 0.5, "checkpoint_every": 2, "log_gradients_every": 10},
}
GUARD = GuardParams(every=2, prompts=5)
GUARDED: dict[str, Any] = {"guard": {"every": 2, "prompts": 5}, "samples_every": 4, "trackers": ("tensorboard",)}
WEIGHTS = "student/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """Models, prompts and published shards, made once."""
    folder = tmp_path_factory.mktemp("home")
    tiny.write_flux(folder / "flux")
    tiny.write_pickscore(folder / "pick")
    tiny.write_hpsv2(folder / "hps")
    (folder / "prompts.txt").write_text("\n".join(tiny.PROMPTS[:2]) + "\n")
    (folder / "validation.txt").write_text("\n".join(tiny.PROMPTS) + "\n")
    rollout_stage(params_of(folder), "train", folder / "shards")
    return folder


def params_of(home: Path, **changes: Any) -> Params:
    sampling = {"steps": 4, "nfe": (2, 3), "height": tiny.SIZE, "width": tiny.SIZE, "noises_per_prompt": 2}
    rewards = [{"name": "pick", "adapter": "pickscore"}, {"name": "hps", "adapter": "hpsv2"}]
    return Params.model_validate(
        {
            "model": {"path": str(home / "flux")},
            "prompts": {"train": str(home / "prompts.txt"), "validation": str(home / "validation.txt")},
            "teacher": sampling | {"max_sequence_length": tiny.LENGTH},
            "compute": {"micro_batch": 4},
            "store": {"path": str(home / "store"), "shard_samples": 4, "workers": 0},
            "rewards": [reward | {"path": str(home / reward["name"])} for reward in rewards],
            "train": TRAIN | changes,
            "evaluate": {"judges": []},
        }
    )


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return [{name: value for name, value in row.items() if name != "seconds"} for row in csv.DictReader(file)]


@pytest.fixture(scope="module")
def guarded(home) -> Path:
    """An undisturbed run with all that looks on."""
    train_stage(params_of(home, **GUARDED), "rats", home / "shards", home / "guarded")
    return home / "guarded"


def test_looking_changes_no_bit_of_the_training(home, guarded, tmp_path):
    train_stage(params_of(home), "rats", home / "shards", tmp_path)
    assert rows(tmp_path / "metrics.csv") == rows(guarded / "metrics.csv")
    assert (tmp_path / WEIGHTS).read_bytes() == (guarded / WEIGHTS).read_bytes()
    for name in ("optimizer", "rng-00000"):
        ours, theirs = (run / "checkpoints" / "000004" / f"{name}.safetensors" for run in (guarded, tmp_path))
        assert ours.read_bytes() == theirs.read_bytes()


def test_there_is_a_look_at_the_start_every_so_often_and_at_the_end(guarded):
    looks = rows(guarded / "panel.csv")
    assert json.loads((guarded / "run.json").read_text())["teacher_forwards"] == 0
    assert [row["step"] for row in looks] == ["0", "2", "4"] and looks[0]["panel"] == "0.0"
    assert float(looks[2]["pick_delta"]) == pytest.approx(float(looks[2]["pick_mean"]) - float(looks[0]["pick_mean"]))
    values = [row for row in rows(guarded / "panel_samples.csv") if row["step"] == "4"]
    assert len(values) == 2 * 5 and {row["concept"] for row in values} < set(tiny.PROMPTS)
    three = [float(row["hps"]) for row in values if row["nfe"] == "3"]
    assert float(looks[2]["hps_3"]) == pytest.approx(sum(three) / 5)


def test_a_look_sees_what_the_student_that_is_left_draws(home, guarded):
    params = params_of(home)
    student = Model.of(params).open_student(transformer=guarded / "student")
    samples = validation.open_validation_set(params, Model.of(params), GUARD, student.latent_shape(), guarded, True)
    reward = open_reward(params.rewards[1])
    with torch.no_grad():
        batch = next(samples.batches(5, torch.device("cpu")))
        scores = reward.score(student.decode(few_steps(student, 3)(batch)), batch.prompts).tolist()
    seen = [row for row in rows(guarded / "panel_samples.csv") if (row["step"], row["nfe"]) == ("4", "3")]
    assert [row["key"] for row in seen] == batch.keys
    assert [float(row["hps"]) for row in seen] == pytest.approx(scores, rel=1e-5)


@pytest.mark.slow
def test_a_run_that_goes_on_sees_the_same_and_loads_no_text_encoder(home, guarded, tmp_path, monkeypatch):
    train_stage(params_of(home, **GUARDED | {"steps": 2}), "rats", home / "shards", tmp_path)
    (tmp_path / "panel.csv").unlink()
    monkeypatch.setattr(Model, "open_text", None)
    train_stage(params_of(home, **GUARDED), "rats", home / "shards", tmp_path, resume="latest")
    for name in ("panel.csv", "panel_samples.csv"):
        assert (tmp_path / name).read_bytes() == (guarded / name).read_bytes()
    assert (tmp_path / WEIGHTS).read_bytes() == (guarded / WEIGHTS).read_bytes()


def test_the_sheets_have_a_row_for_each_prompt_and_a_column_for_each_number_of_steps(guarded):
    assert [path.name for path in sorted((guarded / "samples").iterdir())] == ["000000.png", "000004.png"]
    with Image.open(guarded / "samples" / "000004.png") as sheet:
        assert sheet.size == (2 * tiny.SIZE, 5 * tiny.SIZE)


def test_a_guard_compares_and_wants_two_prompts_and_a_sheet_is_content_with_one(home, tmp_path):
    (tmp_path / "one.txt").write_text(tiny.PROMPTS[0])
    params = params_of(home)
    params = params.model_copy(
        update={"prompts": params.prompts.model_copy(update={"validation": str(tmp_path / "one.txt")})}
    )
    model = Model.of(params)
    shape = model.outline.latent_shape()
    with pytest.raises(ConfigError, match="has one prompt"):
        validation.open_validation_set(params, model, GUARD, shape, tmp_path, False)
    assert len(validation.open_validation_set(params, model, GuardParams(), shape, tmp_path, False).prompts) == 1


class Opposite:
    """Likes what another reward dislikes: whoever climbs that one hacks this one."""

    def __init__(self, reward: Reward) -> None:
        self.reward, self.name, self.fingerprint = reward, "hps", "0" * 64

    def score(self, images_B3HW: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        return -self.reward.score(images_B3HW, prompts)


@pytest.fixture
def hacked(home, monkeypatch) -> None:
    """The reward that is held out is the opposite of the one that trains."""
    monkeypatch.setattr(
        panel_open, "open_reward", lambda held_out, device: Opposite(open_reward(params_of(home).rewards[0], device))
    )


HACK: dict[str, Any] = {"alpha": 0.0, "augment": 0.0, "lr": 1e-2, "steps": 10, "checkpoints_total_limit": 1, "ema": 0.0}


@pytest.mark.slow
def test_a_hack_is_warned_of_stops_the_run_and_leaves_the_best_student(home, hacked, tmp_path, caplog):
    guard = {"every": 2, "prompts": 6, "stop": True, "patience": 2, "keep": "best"}
    report = train_stage(params_of(home, **HACK, guard=guard), "rats", home / "shards", tmp_path)
    looks = rows(tmp_path / "panel.csv")
    assert [row["alarm"] for row in looks][-2:] == ["1", "1"] and report.steps == int(looks[-1]["step"]) < 10
    assert "alarm 2" in caplog.text and "since step 0" in caplog.text and "lower train.lr" in caplog.text
    assert json.loads((tmp_path / "run.json").read_text())["finished"].startswith("guard: 2 alarms in a row")
    left, best = load_file(tmp_path / WEIGHTS), load_file(tmp_path / "checkpoints" / "000002" / "network.safetensors")
    assert all(torch.equal(left[name], best[name]) for name in best)
    again = train_stage(params_of(home, **HACK, guard=guard), "rats", home / "shards", tmp_path, resume="latest")
    assert again.steps == report.steps and rows(tmp_path / "panel.csv") == looks
    assert all(torch.equal(value, best[name]) for name, value in load_file(tmp_path / WEIGHTS).items())


@pytest.mark.slow
def test_a_look_that_sigterm_cuts_short_is_made_when_the_run_goes_on(home, guarded, tmp_path, monkeypatch):
    seen = []
    values = Validator._values

    def cut(self, learner, steps, stopping):
        seen.append(steps)
        return values(self, learner, steps, stopping if len(seen) != 4 else lambda: True)

    monkeypatch.setattr(Validator, "_values", cut)  # the second number of steps of the look at step 2
    with pytest.raises(SystemExit) as ended:
        train_stage(params_of(home, **GUARDED), "rats", home / "shards", tmp_path)
    assert ended.value.code == 143 and [row["step"] for row in rows(tmp_path / "panel.csv")] == ["0"]
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["000002"]
    monkeypatch.undo()
    train_stage(params_of(home, **GUARDED), "rats", home / "shards", tmp_path, resume="latest")
    assert (tmp_path / "panel.csv").read_bytes() == (guarded / "panel.csv").read_bytes()
    assert rows(tmp_path / "metrics.csv") == rows(guarded / "metrics.csv")


def test_without_validation_prompts_the_guard_says_what_to_set(home, tmp_path):
    params = params_of(home, guard={"every": 2})
    params = params.model_copy(update={"prompts": params.prompts.model_copy(update={"validation": None})})
    with pytest.raises(ConfigError, match="set prompts.validation"):
        train_stage(params, "rats", home / "shards", tmp_path)
