"""What may differ when a run goes on: every field of `params.train` is on one list, and flipping it proves it."""

from __future__ import annotations

import csv
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from rats.schemas.train_params import TrainParams
from rats.stages.train.resume import differences
from rats.stages.train.source import NOT_IN_SETTINGS, RESOLVED, ROUNDING, older_hash, settings_values
from rats.trainer.objective import Settings
from tests.support import toy

HASHED: dict[str, Any] = {
    "nfe": (3,),
    "batch": 3,
    "lr": 0.3,
    "warmup": 7,
    "lr_schedule": "cosine",
    "lr_steps": 9,
    "alpha": {"start": 2.0, "end": 0.5, "over": 5},
    "reward": "dark",
    "reward_weight": 0.7,
    "margin": 0.6,
    "last_k": 2,
    "augment": 0.4,
    "clip_norm": 0.3,
    "ema": 0.7,
    "seed": 5,
    "gate.form": "figure",
    "gate.teacher_reward": "prompt",
    "gate.each": True,
    "shape.space": "state",
    "shape.l2": 0.3,
    "shape.cos": 0.6,
    "teacher.mode": "live-ema",
    "teacher.every": 7,
    "teacher.ema": 0.6,
    "lora": {"rank": 2},
    "black_box.pairs": 3,
    "black_box.spread": 0.2,
    "mixed_precision": "bf16",
}
FREE: dict[str, Any] = {
    "steps": 9,
    "checkpoint_every": 3,
    "checkpoints_total_limit": 5,
    "log_gradients_every": 1,
    "max_bad": 0.7,
    "micro_batch": 3,
    "gradient_checkpointing": True,
    "compile": True,
    "fsdp": True,
    "loader_workers": 2,
    "guard.every": 4,
    "guard.prompts": 5,
    "guard.stop": True,
    "guard.patience": 3,
    "guard.keep": "best",
    "samples_every": 3,
    "trackers": ("tensorboard",),
    "save_dtype": "model",
    "update_length": 0.4,
}
FOLLOWED = {"lr_schedule": "train.lr_steps"}
"""Fields that set another one which is not set."""


def leaves(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Dotted names of all fields that are no block."""
    for name, kind in typing.get_type_hints(model).items():
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from leaves(kind, f"{prefix}{name}.")
        elif name in model.model_fields:
            yield prefix + name


def changed(field: str, value: Any, **more: Any) -> Settings:
    block, _, name = field.rpartition(".")
    return toy.settings(**more, **({block: {name: value}} if block else {field: value}))


def differing(one: Settings, other: Settings) -> list[str]:
    return [name for name, _, _ in differences(settings_values(one, {}), settings_values(other, {}))]


def test_every_field_is_on_exactly_one_list():
    resolved = {f"gate.{name}" for name in RESOLVED}
    lists = [set(HASHED), set(FREE), resolved]
    assert set.union(*lists) == set(leaves(TrainParams)) and sum(map(len, lists)) == len(set.union(*lists))
    assert {name.partition(".")[0] for name in FREE} == set(NOT_IN_SETTINGS)


@pytest.mark.parametrize("field", HASHED)
def test_a_field_that_decides_a_step_is_hashed_under_its_name(field):
    found = differing(toy.settings(), changed(field, HASHED[field]))
    own = [name for name in found if name == f"train.{field}" or name.startswith(f"train.{field}.")]
    assert own and set(found) - set(own) <= {FOLLOWED.get(field)}


def test_settings_of_before_a_rate_could_fall_are_those_of_a_rate_that_stays():
    assert "lr_schedule" not in settings_values(toy.settings(), {})["train"]
    assert settings_values(toy.settings(lr_schedule="linear"), {})["train"]["lr_steps"] == 6


def test_the_gate_counts_by_what_it_was_resolved_to():
    plain, train = toy.settings(), toy.settings(gate={"value": 0.3, "value_from": "runs/rats"}).train
    assert differing(plain, Settings(train, plain.horizons, tau=0.05)) == []
    assert differing(plain, Settings(plain.train, plain.horizons, tau=0.7)) == ["train.gate.tau"]
    assert differing(plain, Settings(plain.train, plain.horizons, tau=0.05, gate_value=0.3)) == ["train.gate.value"]
    gap = toy.settings(gate={"tau": "gap"}).train
    assert differing(plain, Settings(gap, plain.horizons, tau=float("nan"))) == ["train.gate.tau"]


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(newline="") as file:
        return [{name: text for name, text in row.items() if name != "seconds"} for row in csv.DictReader(file)]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six steps at once."""
    folder = tmp_path_factory.mktemp("undisturbed")
    toy.train_in(folder, toy.settings(warmup=5, ema=0.9))
    return folder


@pytest.mark.parametrize("field", FREE)
def test_a_field_that_is_not_hashed_changes_no_loss_of_a_run_that_goes_on(tmp_path, undisturbed, field):
    plain, other = {"warmup": 5, "ema": 0.9}, changed(field, FREE[field], warmup=5, ema=0.9)
    assert toy.settings(**plain).train != other.train and differing(toy.settings(**plain), other) == []
    toy.train_in(tmp_path, toy.settings(**plain, steps=2))
    toy.train_in(tmp_path, other, resume=True)
    found, wanted = rows(tmp_path)[:6], rows(undisturbed)
    if field not in ROUNDING:
        assert found == wanted
        return
    for name in ("loss_total", "loss_shape", "reward_student", "gate_mean", "grad_total"):
        values = [[float(row[name]) for row in table] for table in (found, wanted)]
        assert values[0] == pytest.approx(values[1], rel=1e-4, abs=1e-6), name


def test_the_hash_of_the_first_release_is_still_known():
    # made by its own settings_hash, of the same settings
    assert older_hash(toy.settings(), {}) == "c6c55e40beeb7a73acdbd2670126d3228dd8e3986462a49b36d303bc37b879a9"
