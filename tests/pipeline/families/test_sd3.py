"""The SD3 adapter against diffusers' own StableDiffusion3Pipeline, on tiny random models in the real format."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3Pipeline

from rats.pipeline.families.models import FamilyTeacher
from rats.pipeline.families.open import Model
from rats.pipeline.families.sd3 import CLIP_TOKENS
from rats.pipeline.solver import euler
from rats.schemas.errors import ConfigError
from rats.schemas.params import ComputeParams, ModelParams, TeacherParams
from rats.stages.plan.flops import conditioning_shapes
from tests.support import tiny
from tests.support.tiny_sd3 import write_sd3

PROMPTS = ["a red fox", "a blue whale"]
NEGATIVE = "a house"
CPU = ComputeParams()
KINDS: dict[str, tuple[dict[str, Any], float]] = {
    "static shift, guided": ({}, 4.5),
    "dynamic shift, guided": ({"dynamic": True}, 2.0),
    "a second attention, as in SD3.5-medium, unguided": ({"dual": (0,)}, 1.0),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sd3(tmp_path_factory.mktemp("sd3"))


def open_(folder: Path, true_cfg_scale: float = 4.5, **changes: Any) -> FamilyTeacher:
    sizes = {"height": tiny.SIZE, "width": tiny.SIZE, "max_sequence_length": tiny.LENGTH} | changes
    settings = TeacherParams(true_cfg_scale=true_cfg_scale, negative_prompt=NEGATIVE, **sizes)
    return Model(ModelParams(path=str(folder), family="sd3"), settings, CPU).open_teacher()


def noise(teacher: FamilyTeacher) -> torch.Tensor:
    return torch.randn(len(PROMPTS), *teacher.latent_shape(), generator=torch.Generator().manual_seed(1))


def ours(teacher: FamilyTeacher, steps: int) -> torch.Tensor:
    """The final latents (B, T, C)."""
    conditioning = teacher.encode(PROMPTS)
    states, _ = euler(
        lambda x, s: teacher.guided_velocity(x, s, conditioning), noise(teacher), teacher.stock_sigmas(steps)
    )
    return states[-1]


def theirs(pipeline: StableDiffusion3Pipeline, teacher: FamilyTeacher, steps: int, output: str, **changes: Any) -> Any:
    """What the pipeline's own call gives from the same noise."""
    settings = teacher.settings
    latents = as_map(noise(teacher), settings)
    call = {
        "prompt": PROMPTS,
        "negative_prompt": [NEGATIVE] * len(PROMPTS),
        "guidance_scale": settings.true_cfg_scale,
        "num_inference_steps": steps,
        "height": settings.height,
        "width": settings.width,
        "max_sequence_length": settings.max_sequence_length,
    }
    return pipeline(**call | changes, latents=latents, output_type=output).images


def as_map(x_BTC: torch.Tensor, settings: TeacherParams) -> torch.Tensor:
    """(B, C, h, w) of a VAE of factor 4."""
    return x_BTC.permute(0, 2, 1).reshape(len(x_BTC), -1, settings.height // 4, settings.width // 4)


def plain(folder: Path) -> StableDiffusion3Pipeline:
    pipeline = StableDiffusion3Pipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def assert_pictures(decoded: torch.Tensor, expected: np.ndarray) -> None:
    torch.testing.assert_close(decoded.permute(0, 2, 3, 1), torch.from_numpy(expected), atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_our_solver_gives_the_latents_and_pictures_of_the_sd3_pipeline(kind: str, tmp_path: Path) -> None:
    options, scale = KINDS[kind]
    teacher = open_(write_sd3(tmp_path, **options), scale)
    pipeline = plain(tmp_path)
    for steps in (3, 8, 50):
        latents, expected = ours(teacher, steps), theirs(pipeline, teacher, steps, "latent")
        torch.testing.assert_close(as_map(latents, teacher.settings), expected, atol=1e-4, rtol=0)
        sigmas = teacher.stock_sigmas(steps)
        assert sigmas == pipeline.scheduler.sigmas.tolist() and len(sigmas) == steps + 1
        if steps == 3:  # the decoder doesn't know how many steps there were
            assert_pictures(teacher.decode(latents), theirs(pipeline, teacher, steps, "np"))


def test_velocities_are_the_network_s_in_the_pipeline_guided_in_one_batch_or_in_two(folder: Path) -> None:
    teacher, pipeline, seen = open_(folder), plain(folder), []
    pipeline.transformer.register_forward_hook(
        lambda _, args, kwargs, out: seen.append((kwargs, out[0])), with_kwargs=True
    )
    theirs(pipeline, teacher, 3, "latent")
    conditioning, sigmas = teacher.encode(PROMPTS), teacher.stock_sigmas(3)
    for (given, out), sigma in zip(seen, sigmas[:-1], strict=True):
        x_BTC = given["hidden_states"][:2].flatten(2).transpose(1, 2)
        uncond, cond = out.chunk(2)
        own = teacher.velocity(x_BTC, sigma, conditioning)
        torch.testing.assert_close(as_map(own, teacher.settings), cond, atol=1e-5, rtol=0)
        guided = teacher.guided_velocity(x_BTC, sigma, conditioning)
        torch.testing.assert_close(as_map(guided, teacher.settings), uncond + 4.5 * (cond - uncond), atol=1e-4, rtol=0)


def test_pictures_that_are_not_square_are_the_pipeline_s_and_move_by_resolution(tmp_path: Path) -> None:
    folder = write_sd3(tmp_path, dynamic=True)
    teacher, pipeline = open_(folder, 1.0, width=32), plain(folder)
    assert teacher.latent_shape() == (4 * 8, 16)
    assert_pictures(teacher.decode(ours(teacher, 3)), theirs(pipeline, teacher, 3, "np"))
    assert teacher.stock_sigmas(3) == pipeline.scheduler.sigmas.tolist() != open_(folder, 1.0).stock_sigmas(3)


@pytest.mark.parametrize(("scale", "expected"), [(1.0, 1), (4.5, 2)])
def test_guidance_costs_as_many_network_evaluations_as_it_says(folder: Path, scale: float, expected: int) -> None:
    teacher, calls = open_(folder, scale), []
    teacher.network.register_forward_hook(lambda *_: calls.append(1))
    teacher.guided_velocity(noise(teacher), 0.5, teacher.encode(PROMPTS))
    assert len(calls) == expected == teacher.evaluations_per_step and teacher.is_guided == (expected == 2)


def test_a_student_draws_as_the_plain_pipeline_called_with_call_json_and_few_steps(folder: Path) -> None:
    teacher, pipeline = open_(folder, 1.0), plain(folder)
    call = teacher.family.call(teacher.settings)
    assert call == {"height": 16, "width": 16, "max_sequence_length": 8, "guidance_scale": 1.0}
    latents = pipeline(
        PROMPTS, num_inference_steps=3, latents=as_map(noise(teacher), teacher.settings), output_type="latent", **call
    ).images
    torch.testing.assert_close(as_map(ours(teacher, 3), teacher.settings), latents, atol=1e-4, rtol=0)


def test_the_scheduler_s_own_grid_ends_in_its_smallest_sigma_at_any_number_of_steps(folder: Path) -> None:
    teacher = open_(folder)
    assert teacher.stock_sigmas(3) == pytest.approx([1.0, 0.7511, 0.0089, 0.0], abs=1e-4)
    assert len({teacher.stock_sigmas(steps)[-2] for steps in (3, 5, 8, 50)}) == 1


def test_a_prompt_s_embedding_has_the_shapes_that_the_plan_counts_with(folder: Path) -> None:
    teacher = open_(folder)
    alone, together = teacher.encode(PROMPTS[1:]), teacher.encode(PROMPTS)
    assert {name: tuple(value.shape[1:]) for name, value in alone.items()} == conditioning_shapes(teacher)
    assert alone["prompt_embeds"].shape[1] == CLIP_TOKENS + tiny.LENGTH
    assert all(torch.equal(alone[name][0], together[name][1]) for name in alone)


def test_a_student_takes_gradients_through_the_decoder_and_half_precision_keeps_full_states(folder: Path) -> None:
    teacher = open_(folder, 1.0)
    student = Model(ModelParams(path=str(folder), family="sd3", dtype="bfloat16"), teacher.settings, CPU).open_student()
    conditioning = teacher.encode(PROMPTS[:1])
    start = noise(teacher)[:1]
    velocity = student.velocity(start, 0.5, conditioning)
    picture = student.decode(start - velocity)
    assert velocity.dtype == picture.dtype == torch.float32 and picture.shape == (1, 3, 16, 16)
    picture.mean().backward()
    assert sum(float(p.grad.abs().sum()) for p in student.network.parameters() if p.grad is not None) > 0


def test_a_resolution_or_an_embedded_guidance_that_it_cannot_have_is_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match="teacher.width is 20, no multiple of 8"):
        open_(folder, width=20)
    with pytest.raises(ConfigError, match="guidance_scale is guidance as a network's input, which StableDiffusion3"):
        open_(folder, guidance_scale=3.5)
    with pytest.raises(ConfigError, match="teacher.frames is 5"):
        open_(folder, frames=5)
    with pytest.raises(ConfigError, match="max_sequence_length is 600, StableDiffusion3 takes at most 512"):
        open_(folder, max_sequence_length=600)


def test_a_scheduler_that_is_another_sampler_is_refused(tmp_path: Path) -> None:
    folder = write_sd3(tmp_path)
    file = folder / "scheduler/scheduler_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"_class_name": "DDIMScheduler"}))
    with pytest.raises(ConfigError, match="the pipeline's scheduler is DDIMScheduler: rats samples by FlowMatchEuler"):
        open_(folder)
    file.write_text(json.dumps(config | {"stochastic_sampling": True}))
    with pytest.raises(ConfigError, match="FlowMatchEulerDiscreteScheduler has stochastic_sampling, which adds noise"):
        open_(folder)
