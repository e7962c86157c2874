"""The Qwen-Image adapter against diffusers' own QwenImagePipeline, on tiny random models in the real format."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import QwenImagePipeline

from rats.pipeline.families.models import FamilyTeacher
from rats.pipeline.families.open import Model
from rats.pipeline.weights.lora import add_lora
from rats.schemas.errors import ConfigError
from rats.schemas.horizons import aligned
from rats.schemas.params import ModelParams
from rats.schemas.train_params import LoraParams
from rats.stages.plan.flops import conditioning_shapes, evaluation_flops, measured_rate
from tests.support.agreement import (
    CPU,
    NEGATIVE,
    PROMPTS,
    assert_latents,
    assert_pictures,
    evaluations,
    noise,
    ours,
    plain,
    teacher_of,
)
from tests.support.tiny_qwen import LENGTH, write_qwen_image

KINDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "the published shift, guided": ({}, {"true_cfg_scale": 4.0}),
    "the published shift, unguided": ({}, {"true_cfg_scale": 1.0}),
    "a static shift, guided, prompts cut": ({"shift": 3.0}, {"true_cfg_scale": 2.5, "max_sequence_length": 4}),
    "a wide picture": ({}, {"width": 32}),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_qwen_image(tmp_path_factory.mktemp("qwen"))


def open_(folder: Path, true_cfg_scale: float = 4.0, **settings: Any) -> FamilyTeacher:
    settings = {"true_cfg_scale": true_cfg_scale, "negative_prompt": NEGATIVE} | settings
    return teacher_of("qwen-image", folder, LENGTH, **settings)


def theirs(pipeline: Any, teacher: FamilyTeacher, steps: int, output: str) -> Any:
    """What the pipeline's own call gives from the same noise."""
    settings, call = teacher.settings, teacher.family.call(teacher.settings)
    if (scale := settings.true_cfg_scale) > 1:
        call |= {"true_cfg_scale": scale, "negative_prompt": [NEGATIVE] * len(PROMPTS)}
    return pipeline(PROMPTS, num_inference_steps=steps, latents=noise(teacher), output_type=output, **call).images


QUICK = next(iter(KINDS))
CASES = [(QUICK, (3, 8)), *(pytest.param(kind, (3, 8, 50), marks=pytest.mark.slow) for kind in KINDS)]


@pytest.mark.parametrize(("kind", "counts"), CASES)
def test_our_solver_gives_the_latents_and_pictures_of_the_qwen_image_pipeline(
    kind: str, counts: tuple[int, ...], tmp_path: Path
) -> None:
    shift, settings = KINDS[kind]
    teacher = open_(write_qwen_image(tmp_path, **shift), **settings)
    pipeline = plain(QwenImagePipeline, tmp_path)
    for steps in counts:
        latents = ours(teacher, steps)
        assert_latents(latents, theirs(pipeline, teacher, steps, "latent"))
        assert teacher.stock_sigmas(steps) == pipeline.scheduler.sigmas.tolist()
        if steps == 3:  # the decoder doesn't know how many steps there were
            assert_pictures(teacher.decode(latents), theirs(pipeline, teacher, steps, "np"))


def test_velocities_are_the_pipeline_s_for_prompts_of_any_length_alone_or_together(folder: Path) -> None:
    teacher, pipeline, seen = open_(folder), plain(QwenImagePipeline, folder), []
    pipeline.transformer.register_forward_hook(
        lambda _, args, kwargs, out: seen.append((kwargs, out[0])), with_kwargs=True
    )
    theirs(pipeline, teacher, 3, "latent")
    assert [given["encoder_hidden_states_mask"] is None for given, _ in seen] == [False, True] * 3
    conditioning, sigmas = teacher.encode(PROMPTS), teacher.stock_sigmas(3)
    for (given, cond), (_, uncond), sigma in zip(seen[::2], seen[1::2], sigmas[:-1], strict=True):
        x_BTC = given["hidden_states"]
        torch.testing.assert_close(teacher.velocity(x_BTC, sigma, conditioning), cond, atol=1e-5, rtol=0)
        guided = teacher.guided_velocity(x_BTC, sigma, conditioning)
        torch.testing.assert_close(guided.norm(dim=-1), cond.norm(dim=-1), atol=1e-5, rtol=1e-5)
        towards = torch.nn.functional.cosine_similarity(guided, uncond + 4.0 * (cond - uncond), dim=-1)
        torch.testing.assert_close(towards, torch.ones_like(towards), atol=1e-5, rtol=0)


def test_more_room_for_the_prompt_changes_no_velocity_and_the_mask_is_what_sees_to_it(folder: Path) -> None:
    short, long = open_(folder), open_(folder, max_sequence_length=40)
    x_BTC, narrow, wide = noise(short), short.encode(PROMPTS), long.encode(PROMPTS)
    expected = short.velocity(x_BTC, 0.5, narrow)
    torch.testing.assert_close(long.velocity(x_BTC, 0.5, wide), expected, atol=1e-5, rtol=0)
    unmasked = wide | {"prompt_embeds_mask": torch.ones_like(wide["prompt_embeds_mask"])}
    assert (long.velocity(x_BTC, 0.5, unmasked) - expected).abs().max() > 1e-3


def test_an_embedding_has_the_plan_s_shapes_and_an_integer_mask_and_knows_no_company(folder: Path) -> None:
    teacher = open_(folder)
    alone, together = teacher.encode(PROMPTS[1:]), teacher.encode(PROMPTS)
    assert {name: tuple(value.shape[1:]) for name, value in alone.items()} == conditioning_shapes(teacher)
    assert all(torch.equal(alone[name][0], together[name][1]) for name in alone)
    assert together["prompt_embeds_mask"].dtype == torch.int64
    assert together["prompt_embeds_mask"].sum(1).tolist() == [8, 9]  # three or four words and the five tokens of a turn


@pytest.mark.parametrize(("scale", "expected"), [(1.0, 1), (4.0, 2)])
def test_guidance_costs_as_many_network_evaluations_as_it_says(folder: Path, scale: float, expected: int) -> None:
    teacher = open_(folder, scale)
    assert evaluations(teacher) == expected == teacher.evaluations_per_step and teacher.is_guided == (expected == 2)


def test_few_steps_of_the_published_grid_end_in_its_terminal_sigma(folder: Path) -> None:
    student = open_(folder)
    assert student.stock_sigmas(3) == pytest.approx([1.0, 0.6, 0.02, 0.0], abs=0.1)
    assert all(student.stock_sigmas(steps)[-2] == pytest.approx(0.02, abs=1e-6) for steps in (3, 5, 8, 50))
    sigmas, kept = aligned(student.stock_sigmas, 50, (3, 5, 8), "nfe")
    assert len(sigmas) == 51 and len(kept) == 1 + (2 + 4 + 7) - 2 + 1  # the terminal sigma of all three is one state


def test_a_student_takes_gradients_through_the_decoder_with_activations_kept_or_recomputed(folder: Path) -> None:
    teacher = open_(folder)
    student = Model(ModelParams(path=str(folder), family="qwen-image"), teacher.settings, CPU).open_student()
    add_lora(student.network, LoraParams(rank=2, alpha=2), student.family.lora_targets, seed=0)
    adapters = [p for p in student.network.parameters() if p.requires_grad]
    conditioning, start = teacher.encode(PROMPTS), noise(teacher)

    def gradients() -> torch.Tensor:
        picture = student.decode(start - student.velocity(start, 0.5, conditioning))
        found = torch.autograd.grad(picture.square().mean(), adapters, allow_unused=True)
        return torch.cat([g.flatten() for g in found if g is not None])

    kept = gradients()
    student.checkpoint_activations()
    torch.testing.assert_close(gradients(), kept, atol=1e-7, rtol=1e-4)
    assert float(kept.abs().sum()) > 0


def test_half_precision_keeps_full_precision_states(folder: Path) -> None:
    teacher = open_(folder)
    model = ModelParams(path=str(folder), family="qwen-image", dtype="bfloat16")
    student = Model(model, teacher.settings, CPU).open_student()
    with torch.no_grad():
        velocity = student.velocity(noise(teacher)[:1], 0.7, teacher.encode(PROMPTS[:1]))
        picture = student.decode(velocity)
    assert velocity.dtype == picture.dtype == torch.float32 and picture.shape == (1, 3, 16, 16)


def test_costs_are_counted_and_timed_without_weights(folder: Path) -> None:
    model, settings = ModelParams(path=str(folder), family="qwen-image"), open_(folder).settings
    assert evaluation_flops(Model(model, settings, CPU).outline) > 0
    assert measured_rate(Model(model, settings, CPU), seconds=0.01) > 0


def test_a_network_that_takes_guidance_as_an_input_is_refused(tmp_path: Path) -> None:
    teacher = open_(write_qwen_image(tmp_path, guidance_embeds=True), 1.0)
    with pytest.raises(ConfigError, match="guidance_embeds is true"):
        teacher.velocity(noise(teacher), 0.5, teacher.encode(PROMPTS))
    with pytest.raises(ConfigError, match="which QwenImage has not"):
        open_(tmp_path, guidance_scale=4.0)
