"""The FLUX.2 adapter against diffusers' own Flux2KleinPipeline, on tiny random models in the real format."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import Flux2KleinPipeline

from rats.pipeline.families.models import FamilyTeacher
from rats.pipeline.families.open import Model
from rats.pipeline.weights.lora import add_lora
from rats.schemas.errors import ConfigError
from rats.schemas.params import ModelParams
from rats.schemas.train_params import LoraParams
from rats.stages.plan.flops import conditioning_shapes, measured_rate
from tests.support.agreement import (
    CPU,
    PROMPTS,
    assert_latents,
    assert_pictures,
    evaluations,
    noise,
    ours,
    plain,
    teacher_of,
)
from tests.support.tiny_flux2 import LENGTH, write_flux2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_flux2(tmp_path_factory.mktemp("flux2"))


def open_(folder: Path, true_cfg_scale: float = 4.0, **settings: Any) -> FamilyTeacher:
    return teacher_of("flux2", folder, LENGTH, true_cfg_scale=true_cfg_scale, **settings)


def theirs(pipeline: Any, teacher: FamilyTeacher, steps: int) -> tuple[list[torch.Tensor], Any]:
    """The packed latents after each step, and the pictures, of the pipeline's own call from the same noise."""
    states: list[torch.Tensor] = []

    def keep(_: Any, __: int, ___: Any, given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        states.append(given["latents"])
        return given

    call = teacher.family.call(teacher.settings) | {"guidance_scale": teacher.settings.true_cfg_scale}
    latents = noise(teacher).transpose(1, 2).unflatten(2, teacher.family.grid)  # this pipeline packs what it is given
    call |= {"num_inference_steps": steps, "latents": latents, "callback_on_step_end": keep}
    return states, pipeline(prompt=PROMPTS, output_type="np", **call).images


KINDS: dict[str, dict[str, Any]] = {
    "guided": {},
    "unguided, a wide picture": {"true_cfg_scale": 1.0, "width": 32},
    "guided, prompts cut": {"max_sequence_length": 6},
}
CASES = [("guided", (3, 8)), *(pytest.param(kind, (3, 8, 50), marks=pytest.mark.slow) for kind in KINDS)]


@pytest.mark.parametrize(("kind", "counts"), CASES)
def test_our_solver_gives_the_latents_and_pictures_of_the_flux2_pipeline(
    folder: Path, kind: str, counts: tuple[int, ...]
) -> None:
    teacher, pipeline = open_(folder, **KINDS[kind]), plain(Flux2KleinPipeline, folder)
    for steps in counts:
        latents, (expected, pictures) = ours(teacher, steps), theirs(pipeline, teacher, steps)
        assert_latents(latents, expected[-1])
        assert_pictures(teacher.decode(latents), pictures)
        assert teacher.stock_sigmas(steps) == pipeline.scheduler.sigmas.tolist()


def test_velocities_are_the_pipeline_s_with_and_without_guidance(folder: Path) -> None:
    teacher, pipeline, seen = open_(folder), plain(Flux2KleinPipeline, folder), []
    pipeline.transformer.register_forward_hook(
        lambda _, args, kwargs, out: seen.append((kwargs, out[0])), with_kwargs=True
    )
    theirs(pipeline, teacher, 3)
    conditioning, sigmas = teacher.encode(PROMPTS), teacher.stock_sigmas(3)
    for (given, cond), (_, uncond), sigma in zip(seen[::2], seen[1::2], sigmas[:-1], strict=True):
        x_BTC = given["hidden_states"]
        torch.testing.assert_close(teacher.velocity(x_BTC, sigma, conditioning), cond, atol=1e-5, rtol=0)
        guided = teacher.guided_velocity(x_BTC, sigma, conditioning)
        torch.testing.assert_close(guided, uncond + 4.0 * (cond - uncond), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("scale", "expected"), [(1.0, 1), (4.0, 2)])
def test_guidance_costs_as_many_network_evaluations_as_it_says(folder: Path, scale: float, expected: int) -> None:
    teacher = open_(folder, scale)
    assert evaluations(teacher) == expected == teacher.evaluations_per_step and teacher.is_guided == (expected == 2)


def test_the_shift_depends_on_the_number_of_steps_too(folder: Path) -> None:
    """The sigma that two thirds of three steps and of six have in common is not the same."""
    teacher = open_(folder)
    assert teacher.stock_sigmas(3)[2] - teacher.stock_sigmas(60)[40] > 0.03


def test_an_embedding_has_the_shapes_that_the_plan_counts_with_and_knows_no_company(folder: Path) -> None:
    teacher = open_(folder)
    alone, together = teacher.encode(PROMPTS[1:]), teacher.encode(PROMPTS)
    assert {name: tuple(value.shape[1:]) for name, value in alone.items()} == conditioning_shapes(teacher)
    assert torch.equal(alone["prompt_embeds"][0], together["prompt_embeds"][1])
    model = Model(ModelParams(path=str(folder), family="flux2"), teacher.settings, CPU)
    assert measured_rate(model, seconds=0.01) > 0


def test_a_student_takes_gradients_through_the_decoder_with_activations_kept_or_recomputed(folder: Path) -> None:
    teacher = open_(folder)
    student = Model(ModelParams(path=str(folder), family="flux2"), teacher.settings, CPU).open_student()
    add_lora(student.network, LoraParams(rank=2, alpha=2), student.family.lora_targets, seed=0)
    adapters = [p for p in student.network.parameters() if p.requires_grad]
    conditioning, start = teacher.encode(PROMPTS), noise(teacher)

    def gradients() -> torch.Tensor:
        picture = student.decode(start - student.velocity(start, 0.5, conditioning))
        return torch.cat([g.flatten() for g in torch.autograd.grad(picture.square().mean(), adapters)])

    kept = gradients()
    student.checkpoint_activations()
    torch.testing.assert_close(gradients(), kept, atol=1e-7, rtol=1e-4)
    assert float(kept.abs().sum()) > 0


def test_a_distilled_pipeline_and_a_network_that_takes_guidance_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is_distilled: it is a few-step student already"):
        open_(write_flux2(tmp_path / "distilled", is_distilled=True))
    teacher = open_(write_flux2(tmp_path / "dev", guidance_embeds=True), 1.0)
    with pytest.raises(ConfigError, match="guidance_embeds is true"):
        teacher.velocity(noise(teacher), 0.5, teacher.encode(PROMPTS))
