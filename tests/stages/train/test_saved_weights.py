"""What is saved of a bfloat16 model is what was trained, or the share that is left of it is said."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from diffusers.training_utils import cast_training_params
from safetensors.torch import load_file
from torch import Tensor

from rats.pipeline.families.models import FamilyStudent
from rats.pipeline.families.open import Model
from rats.pipeline.weights.lora import merge_lora
from rats.schemas.params import ComputeParams, ModelParams, TeacherParams
from rats.schemas.train_params import LoraParams, TrainParams
from rats.stages.export.export import share_in_pipeline
from rats.stages.train.train import save_student
from rats.trainer.optim import Learner
from tests.support import tiny

STEPS, LR = 10, 1e-6


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder = tiny.write_flux(tmp_path_factory.mktemp("flux"))
    teacher = TeacherParams(height=tiny.SIZE, width=tiny.SIZE, max_sequence_length=tiny.LENGTH)
    return Model(ModelParams(path=str(folder), dtype="bfloat16"), teacher, ComputeParams())


@pytest.fixture(scope="module")
def moved(model: Model) -> Learner:
    """Ten small steps of a whole network, in float32 as `rats stage train` trains it."""
    student = model.open_student()
    cast_training_params(student.network, torch.float32)
    learner = Learner(student.network, settings())
    random = torch.Generator().manual_seed(7)
    for step in range(STEPS):
        for parameter in learner.parameters:
            parameter.grad = torch.randn(parameter.shape, generator=random)
        learner.update(step, False, refuse=ValueError)
        learner.forget()
    return learner


def settings(save_dtype: str = "float32") -> TrainParams:
    return TrainParams.model_validate({"reward": "r", "lr": LR, "warmup": 0, "save_dtype": save_dtype})


def files(folder: Path) -> dict[str, Tensor]:
    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


def share(start: dict[str, Tensor], trained: dict[str, Tensor], saved: dict[str, Tensor]) -> float:
    """|saved - start| / |trained - start| over all weights, each as one long vector."""
    first, second, third = (
        torch.cat([side[name].flatten().double() for name in start]) for side in (start, trained, saved)
    )
    return float((third - first).norm() / (second - first).norm())


def test_a_whole_network_is_saved_as_it_was_trained(model: Model, moved: Learner, tmp_path: Path):
    saved_as = save_student(moved, tmp_path / "student", model, settings())
    saved = files(tmp_path / "student")
    assert all(torch.equal(saved[name], value) for name, value in moved.weights().items())
    assert (saved_as.dtype, saved_as.kept) == ("float32", 1.0)


def test_a_shorter_update_is_saved_as_that_share_of_the_way(model: Model, moved: Learner, tmp_path: Path):
    shorter = settings().model_copy(update={"update_length": 0.25})
    save_student(moved, tmp_path / "student", model, shorter)
    saved, start = files(tmp_path / "student"), model.base_network().state_dict()
    for name, trained in moved.weights().items():
        assert torch.allclose(saved[name], 0.75 * start[name].float() + 0.25 * trained, rtol=0, atol=1e-7)
    assert share(start, moved.weights(), saved) == pytest.approx(0.25, rel=1e-2)


def test_shorter_adapters_are_a_share_of_their_update(model: Model, tmp_path: Path):
    lora = LoraParams(rank=2)
    student = model.open_student(lora=lora)
    learner = Learner(student.network, settings())
    with torch.no_grad():
        for name, parameter in learner.named.items():
            parameter.normal_(std=0.3, generator=torch.Generator().manual_seed(len(name)))
    for length in (1.0, 0.25):
        chosen = settings().model_copy(update={"lora": lora, "update_length": length})
        save_student(learner, tmp_path / str(length), model, chosen)
    whole, quarter = (files(tmp_path / str(length)) for length in (1.0, 0.25))
    modules = {name.split(".lora_")[0] for name in whole}
    assert modules and whole.keys() == quarter.keys()
    for module in modules:
        long, short = (side[f"{module}.lora_B.weight"] @ side[f"{module}.lora_A.weight"] for side in (whole, quarter))
        torch.testing.assert_close(short, 0.25 * long)


def test_the_share_that_the_model_s_dtype_keeps_is_measured_and_below_a_half_it_is_said(
    model: Model, moved: Learner, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    with caplog.at_level(logging.WARNING):
        saved_as = save_student(moved, tmp_path / "student", model, settings("model"))
    saved, start = files(tmp_path / "student"), model.base_network().state_dict()
    assert {value.dtype for value in saved.values()} == {torch.bfloat16} and saved_as.dtype == "bfloat16"
    assert saved_as.kept == pytest.approx(share(start, moved.weights(), saved), rel=1e-9)
    assert saved_as.kept < 0.5 and "set train.save_dtype: float32" in caplog.text


def test_the_pipeline_s_share_is_measured_on_the_saved_student(model: Model, moved: Learner, tmp_path: Path):
    save_student(moved, tmp_path / "student", model, settings())
    start, drawn = model.base_network().state_dict(), model.open_pipeline(tmp_path / "student").transformer.state_dict()
    expected = share(start, files(tmp_path / "student"), drawn)
    assert share_in_pipeline(model, tmp_path / "student") == pytest.approx(expected, rel=1e-9) and expected < 0.5


def test_merged_adapters_say_the_share_that_is_left_of_them(model: Model):
    lora = LoraParams(rank=2)
    student: FamilyStudent = model.open_student(lora=lora)
    small = torch.Generator().manual_seed(9)
    adapters = {name: p for name, p in student.network.named_parameters() if ".lora_B." in name}
    with torch.no_grad():
        for parameter in adapters.values():
            parameter.normal_(std=2e-5, generator=small)
    start = {name: value.clone() for name, value in model.base_network().state_dict().items()}
    state = {name: value.clone() for name, value in student.network.state_dict().items()}
    kept = merge_lora(student.network)
    modules = [name.split(".lora_B.")[0] for name in adapters]
    factors = {m: [state[f"{m}.lora_{side}.default.weight"] for side in "BA"] for m in modules}
    merged = {f"{m}.weight": student.network.state_dict()[f"{m}.weight"] for m in modules}
    trained = {f"{m}.weight": start[f"{m}.weight"].float() + b @ a for m, (b, a) in factors.items()}
    assert kept == pytest.approx(share({name: start[name] for name in merged}, trained, merged), rel=1e-6)
    assert kept < 0.5
