"""The FLUX adapter against diffusers' own FluxPipeline, on tiny random models in the real format."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline

from rats.pipeline.families.models import FamilyTeacher
from rats.pipeline.families.open import Model
from rats.pipeline.solver import euler
from rats.pipeline.weights.folder import ModelFolder
from rats.pipeline.weights.hashes import hash_path
from rats.pipeline.weights.hub import resolve
from rats.schemas.errors import ConfigError, DataError
from rats.schemas.params import ComputeParams, ModelParams, TeacherParams
from tests.support import tiny

PROMPTS = ["a red fox", "a blue whale"]
NEGATIVE = "a house"
CPU = ComputeParams()
KINDS: dict[str, tuple[dict[str, Any], float]] = {
    "static shift": ({}, 1.0),
    "dynamic shift, true CFG": ({"dynamic": True}, 3.0),
    "embedded guidance, true CFG": ({"guidance_embeds": True}, 2.5),
}


def settings(true_cfg_scale: float = 3.0, size: int = tiny.SIZE) -> TeacherParams:
    return TeacherParams(
        guidance_scale=2.0,
        true_cfg_scale=true_cfg_scale,
        negative_prompt=NEGATIVE,
        max_sequence_length=tiny.LENGTH,
        height=size,
        width=size,
    )


def teacher_of(folder: Path, true_cfg_scale: float = 3.0) -> FamilyTeacher:
    return Model(ModelParams(path=str(folder)), settings(true_cfg_scale), CPU).open_teacher()


def noise(teacher: FamilyTeacher) -> torch.Tensor:
    return torch.randn(len(PROMPTS), *teacher.latent_shape(), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def folder(models: Path) -> Path:
    return models / "flux"


@pytest.mark.parametrize("kind", KINDS)
def test_our_solver_gives_the_latents_and_pictures_of_fluxpipeline(kind: str, tmp_path: Path) -> None:
    options, scale = KINDS[kind]
    teacher = teacher_of(tiny.write_flux(tmp_path, **options), scale)
    pipeline = FluxPipeline.from_pretrained(tmp_path)
    pipeline.set_progress_bar_config(disable=True)
    conditioning, start = teacher.encode(PROMPTS), noise(teacher)
    for steps in (3, 8, 50):
        call = dict(
            prompt=PROMPTS,
            negative_prompt=[NEGATIVE] * len(PROMPTS),
            true_cfg_scale=scale,
            guidance_scale=2.0,
            num_inference_steps=steps,
            height=tiny.SIZE,
            width=tiny.SIZE,
            max_sequence_length=tiny.LENGTH,
        )
        sigmas = teacher.stock_sigmas(steps)
        states, _ = euler(lambda x, sigma: teacher.guided_velocity(x, sigma, conditioning), start, sigmas)
        latents = pipeline(**call, latents=start.clone(), output_type="latent").images
        torch.testing.assert_close(states[-1], latents, atol=1e-4, rtol=0)
        if steps > 3:
            continue  # the decoder doesn't know how many steps there were
        pictures = torch.from_numpy(pipeline(**call, latents=start.clone(), output_type="np").images)
        torch.testing.assert_close(teacher.decode(states[-1]).permute(0, 2, 3, 1), pictures, atol=1e-4, rtol=0)


def test_pictures_that_are_not_square_unpack_as_the_pipeline_unpacks_them(folder: Path) -> None:
    wide = settings(1.0).model_copy(update={"width": 32})
    teacher = Model(ModelParams(path=str(folder)), wide, CPU).open_teacher()
    pipeline = FluxPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    start = noise(teacher)
    conditioning = teacher.encode(PROMPTS)
    states, _ = euler(lambda x, s: teacher.guided_velocity(x, s, conditioning), start, teacher.stock_sigmas(3))
    call = dict(height=16, width=32, num_inference_steps=3, max_sequence_length=tiny.LENGTH, output_type="np")
    pictures = torch.from_numpy(pipeline(PROMPTS, latents=start.clone(), **call).images)
    assert teacher.latent_shape() == (8, 16)
    torch.testing.assert_close(teacher.decode(states[-1]).permute(0, 2, 3, 1), pictures, atol=1e-4, rtol=0)


@pytest.mark.parametrize(("scale", "expected"), [(1.0, 1), (3.0, 2)])
def test_guidance_costs_as_many_network_evaluations_as_it_says(folder: Path, scale: float, expected: int) -> None:
    teacher = teacher_of(folder, scale)
    calls: list[int] = []
    teacher.network.register_forward_hook(lambda *_: calls.append(1))
    teacher.guided_velocity(noise(teacher), 0.5, teacher.encode(PROMPTS))
    assert len(calls) == expected == teacher.evaluations_per_step


def test_the_unguided_base_of_a_guidance_distilled_network_is_the_pipeline_at_scale_one(tmp_path: Path) -> None:
    teacher = teacher_of(tiny.write_flux(tmp_path, guidance_embeds=True), 1.0)
    pipeline = FluxPipeline.from_pretrained(tmp_path)
    pipeline.set_progress_bar_config(disable=True)
    conditioning, start, sigmas = teacher.encode(PROMPTS), noise(teacher), teacher.stock_sigmas(3)
    states, _ = euler(lambda x, sigma: teacher.unguided_velocity(x, sigma, conditioning), start, sigmas)
    call = dict(height=tiny.SIZE, width=tiny.SIZE, num_inference_steps=3, max_sequence_length=tiny.LENGTH)
    plain = pipeline(PROMPTS, latents=start.clone(), guidance_scale=1.0, output_type="latent", **call).images
    torch.testing.assert_close(states[-1], plain, atol=1e-4, rtol=0)
    guided = teacher.guided_velocity(start, 0.5, conditioning)
    assert teacher.is_guided and not torch.equal(guided, teacher.unguided_velocity(start, 0.5, conditioning))


def test_without_true_or_embedded_guidance_there_is_nothing_to_leave_out(folder: Path) -> None:
    assert teacher_of(folder, 3.0).is_guided and not teacher_of(folder, 1.0).is_guided


def test_a_prompt_has_the_same_embedding_in_any_company(folder: Path) -> None:
    teacher = teacher_of(folder)
    alone, together = teacher.encode(PROMPTS[1:]), teacher.encode(PROMPTS)
    for name in alone:
        assert torch.equal(alone[name][0], together[name][1])
    assert alone["prompt_embeds"].shape == (1, tiny.LENGTH, 16) and alone["pooled_prompt_embeds"].shape == (1, 16)


def test_the_student_starts_as_the_teacher_and_takes_gradients_through_the_decoder(folder: Path) -> None:
    teacher = teacher_of(folder)
    student = Model(ModelParams(path=str(folder)), settings(), CPU).open_student()
    conditioning, start = teacher.encode(PROMPTS), noise(teacher)
    velocity = student.velocity(start, 0.5, conditioning)
    assert torch.equal(velocity, teacher.velocity(start, 0.5, conditioning)) and not hasattr(student, "encode")
    student.decode(start - velocity).mean().backward()
    gradients = [p.grad for p in student.network.parameters() if p.grad is not None]
    assert sum(float(g.abs().sum()) for g in gradients) > 0
    assert not any(p.requires_grad for p in (*teacher.network.parameters(), *student.vae.parameters()))


def test_a_saved_student_opens_in_the_place_of_the_base_and_in_a_plain_pipeline(folder: Path, tmp_path: Path) -> None:
    model = ModelParams(path=str(folder))
    student = Model(model, settings(), CPU).open_student()
    with torch.no_grad():
        next(student.network.parameters()).add_(0.1)
    student.network.save_pretrained(tmp_path)
    again = Model(model, settings(), CPU).open_student(transformer=tmp_path)
    conditioning = teacher_of(folder).encode(PROMPTS)
    start = torch.randn(2, *again.latent_shape())
    states, _ = euler(lambda x, sigma: again.velocity(x, sigma, conditioning), start, again.stock_sigmas(3))
    pipeline = FluxPipeline.from_pretrained(folder, transformer=again.network)
    pipeline.set_progress_bar_config(disable=True)
    call = dict(height=tiny.SIZE, width=tiny.SIZE, num_inference_steps=3, max_sequence_length=tiny.LENGTH)
    latents = pipeline(PROMPTS, latents=start, output_type="latent", **call).images
    torch.testing.assert_close(states[-1], latents, atol=1e-4, rtol=0)
    assert hash_path(tmp_path) != hashes(folder)["transformer"]


def test_a_half_precision_network_keeps_full_precision_states(folder: Path) -> None:
    student = Model(ModelParams(path=str(folder), dtype="bfloat16"), settings(), CPU).open_student()
    conditioning = {"prompt_embeds": torch.randn(1, 8, 16), "pooled_prompt_embeds": torch.randn(1, 16)}
    with torch.no_grad():
        velocity = student.velocity(torch.randn(1, 4, 16), 0.7, conditioning)
        picture = student.decode(velocity)
    assert velocity.dtype == picture.dtype == torch.float32 and picture.shape == (1, 3, 16, 16)


def in_folder(folder: Path) -> ModelFolder:
    return ModelFolder(ModelParams(path=str(folder)))


def hashes(folder: Path) -> dict[str, str]:
    return Model(ModelParams(path=str(folder)), settings(), CPU).hashes()


def test_every_byte_of_weights_vocabulary_and_scheduler_is_in_a_hash(folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    before = hashes(folder)
    assert hashes(copy) == before and set(before) == {
        "transformer", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"
    }  # fmt: skip
    for name in before:
        changed = max((copy / name).iterdir(), key=lambda path: path.stat().st_size)
        changed.write_bytes(changed.read_bytes()[:-1] + b"~")
        assert {key for key, value in hashes(copy).items() if value != before[key]} >= {name}
    path = copy / "scheduler" / "scheduler_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "_diffusers_version": "9"}))
    assert in_folder(copy).scheduler_hash() == in_folder(folder).scheduler_hash()
    path.write_text(json.dumps({**config, "shift": 1.0}))
    assert in_folder(copy).scheduler_hash() != in_folder(folder).scheduler_hash()


def test_a_missing_model_a_missing_part_and_a_damaged_part_are_refused_in_one_line(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match="no model at './nowhere'"):
        resolve("./nowhere")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match="no such hub repository at revision abc"):
        resolve("nobody/nothing", "abc")
    copy = shutil.copytree(folder, tmp_path / "copy")
    weights = copy / "vae" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(DataError, match="does not load as AutoencoderKL") as refusal:
        Model(ModelParams(path=str(copy)), settings(), CPU).open_student()
    assert "\n" not in str(refusal.value)
    shutil.rmtree(copy / "vae")
    with pytest.raises(ConfigError, match="vae"):
        Model(ModelParams(path=str(copy)), settings(), CPU).open_student()
    with pytest.raises(ConfigError, match=r"no folder .*vae"):
        hashes(copy)


def test_a_resolution_that_does_not_fit_and_a_grid_that_is_no_flow_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="teacher.height is 20, no multiple of 8"):
        Model(ModelParams(path=str(folder)), settings(size=20), CPU).open_student()
    copy = shutil.copytree(folder, tmp_path / "copy")
    path = copy / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"invert_sigmas": True}))
    with pytest.raises(ConfigError, match="does not fall from 1.0 to 0.0"):
        Model(ModelParams(path=str(copy)), settings(), CPU).open_student().stock_sigmas(3)
