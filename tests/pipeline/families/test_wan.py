"""The Wan adapter against diffusers' own WanPipeline, on a tiny random model in the real format."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline

from rats.pipeline.families.models import FamilyStudent, FamilyTeacher
from rats.pipeline.families.open import Model
from rats.pipeline.families.wan import Wan
from rats.schemas.errors import ConfigError
from rats.schemas.horizons import evenly
from rats.schemas.params import ModelParams, TeacherParams
from rats.schemas.plugins import FAMILIES, load_plugin
from tests.support import tiny_wan
from tests.support.agreement import CPU, NEGATIVE, PROMPTS, assert_latents, noise, ours, plain, teacher_of
from tests.support.tiny import LENGTH

SIZES = {"height": 16, "width": 32}
"""Not square, so that no axis can be taken for another."""


def teacher(folder: Path, **changes: Any) -> FamilyTeacher:
    return teacher_of(
        "wan", folder, LENGTH, **{"negative_prompt": NEGATIVE, "frames": tiny_wan.FRAMES, **SIZES} | changes
    )


def student(folder: Path, **changes: Any) -> FamilyStudent:
    values = {"max_sequence_length": LENGTH, "frames": tiny_wan.FRAMES, **SIZES}
    return Model(ModelParams(path=str(folder), family="wan"), TeacherParams(**values | changes), CPU).open_student()


def as_video(x_BTC: torch.Tensor) -> torch.Tensor:
    """(B, 16, 2, 2, 4), written down independently of the adapter."""
    return x_BTC.mT.reshape(len(x_BTC), 16, 2, 2, 4)


def own_call(pipeline: WanPipeline, teacher: FamilyTeacher, steps: int, output: str = "latent") -> Any:
    """What WanPipeline itself gives for the same noise: called as a student's is, guided where the teacher is."""
    call: dict[str, Any] = {**Wan.call(teacher.settings), "negative_prompt": [NEGATIVE] * len(PROMPTS)}
    if teacher.is_guided:
        call["guidance_scale"] = teacher.settings.true_cfg_scale
    start = as_video(noise(teacher)).clone()
    return pipeline(PROMPTS, num_inference_steps=steps, latents=start, output_type=output, **call).frames


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_wan.write_wan(tmp_path_factory.mktemp("wan"))


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_our_solver_gives_the_latents_and_frames_of_wanpipeline(folder: Path, scale: float) -> None:
    guided = teacher(folder, true_cfg_scale=scale, scored_frames=9)
    pipeline = plain(WanPipeline, folder)
    assert Wan.call(guided.settings) == {
        **SIZES, "num_frames": 5, "max_sequence_length": LENGTH, "guidance_scale": 1.0
    }  # fmt: skip
    for steps in (3, 8, 50):
        final = ours(guided, steps)
        assert_latents(as_video(final), own_call(pipeline, guided, steps))
        if steps == 3:  # the decoder doesn't know how many steps there were
            frames = own_call(pipeline, guided, steps, "pt")
            assert frames.shape == (2, tiny_wan.FRAMES, 3, 16, 32) and float(frames.std()) > 0.05
            assert_latents(guided.decode(final), frames)


@pytest.mark.parametrize(("scale", "expected"), [(1.0, 1), (4.0, 2)])
def test_guidance_costs_as_many_network_evaluations_as_it_says(folder: Path, scale: float, expected: int) -> None:
    guided, calls = teacher(folder, true_cfg_scale=scale), []
    guided.network.register_forward_hook(lambda *_: calls.append(1))
    guided.guided_velocity(noise(guided), 0.5, guided.encode(PROMPTS))
    assert len(calls) == expected == guided.evaluations_per_step and guided.is_guided == (expected == 2)


def test_the_embedding_is_cleaned_padded_with_zeros_and_the_same_in_any_company(folder: Path) -> None:
    encode = teacher(folder).encode
    alone, dirty, together = (encode(p)["prompt_embeds"] for p in (PROMPTS[:1], ["a  red &amp;#32;fox "], PROMPTS))
    assert torch.equal(alone[0], dirty[0]) and torch.equal(alone[0], together[0])
    assert alone.shape == (1, LENGTH, tiny_wan.WIDTH)
    words = 4  # with the end token
    assert bool(alone[0, :words].any(-1).all()) and not bool(alone[0, words:].any())


def test_the_published_scheduler_becomes_euler_at_its_shift_and_this_is_how_far_that_is(tmp_path: Path) -> None:
    folder = tiny_wan.write_wan(tmp_path, scheduler="unipc")
    euler = teacher(folder)
    assert isinstance(euler.scheduler, FlowMatchEulerDiscreteScheduler) and euler.scheduler.config.shift == 3.0
    assert euler.stock_sigmas(50)[:2] == pytest.approx([1.0, 0.9931], abs=1e-4)
    theirs = own_call(plain(WanPipeline, folder), euler, 50)
    apart = float((as_video(ours(euler, 50)) - theirs).square().mean().sqrt() / theirs.std())
    assert 0.005 < apart < 0.02, apart  # 0.013; of UniPC's own 400 steps ours are 0.009 away, its 50 are 0.010


def test_gradients_reach_the_latents_through_the_video_vae_as_through_a_plain_call(folder: Path) -> None:
    decoder = teacher(folder, scored_frames=2)
    x_BTC = noise(decoder)[:1].requires_grad_()
    weights = torch.randn(1, 2, 3, 16, 32, generator=torch.Generator().manual_seed(2))
    (found,) = torch.autograd.grad((decoder.decode(x_BTC) * weights).sum(), x_BTC)
    vae = AutoencoderKLWan.from_pretrained(folder / "vae")
    mean, std = (torch.tensor(vae.config[name]).view(1, 16, 1, 1, 1) for name in ("latents_mean", "latents_std"))
    video = vae.decode(as_video(x_BTC) * std + mean).sample[:, :, [0, -1]].transpose(1, 2) / 2 + 0.5
    (expected,) = torch.autograd.grad((video * weights).sum(), x_BTC)
    assert float(expected.abs().max()) > 1e-3
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    assert bool((as_video(found).flatten(2).abs().sum(1) > 0).all())  # the first latent frame moves the last pixels too


def test_recomputed_activations_of_decoder_and_network_change_no_bit_and_are_not_kept(folder: Path) -> None:
    def gradients(recompute: bool) -> tuple[list[torch.Tensor], int]:
        learner = student(folder)
        if recompute:
            learner.checkpoint_activations()
        conditioning = {"prompt_embeds": torch.randn(1, 8, 16, generator=torch.Generator().manual_seed(3))}
        kept: list[int] = []

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            kept.append(tensor.nbytes)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            start = torch.randn(1, 16, 16, generator=torch.Generator().manual_seed(4)).requires_grad_()
            frames = learner.decode(start - learner.velocity(start, 1.0, conditioning))
        frames.square().sum().backward()
        assert start.grad is not None
        return [start.grad, *(p.grad for p in learner.network.parameters() if p.grad is not None)], sum(kept)

    (once, all_kept), (again, few_kept) = gradients(False), gradients(True)
    assert len(once) == len(again) > 20 and few_kept < all_kept / 5
    for one, other in zip(once, again, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("total", "count", "expected"),
    [(81, 4, [0, 27, 53, 80]), (5, 4, [0, 1, 3, 4]), (5, 9, [0, 1, 2, 3, 4]), (5, 2, [0, 4]), (5, 1, [2]), (1, 4, [0])],
)
def test_scored_frames_are_spread_from_the_first_to_the_last(total: int, count: int, expected: list[int]) -> None:
    assert evenly(total, count) == expected


def test_settings_that_the_pipeline_would_round_or_ignore_are_refused(folder: Path) -> None:
    for changes, message in (
        ({"frames": 7}, "teacher.frames is 7, not 4k \\+ 1 as this VAE decodes: use 9"),
        ({"height": 24}, "teacher.height is 24, no multiple of 16"),
        ({"guidance_scale": 5.0}, "set teacher.true_cfg_scale"),
    ):
        with pytest.raises(ConfigError, match=message):
            student(folder, **changes)


def test_wan_2_2_is_refused_and_not_sampled_as_another_model(folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    index = copy / "model_index.json"
    known = json.loads(index.read_text())
    assert known["transformer_2"] == [None, None] and known["boundary_ratio"] is None
    kinds = {"boundary_ratio": 0.875, "expand_timesteps": True, "transformer_2": ["diffusers", "WanTransformer3DModel"]}
    for name, value in kinds.items():
        index.write_text(json.dumps(known | {name: value}))
        with pytest.raises(ConfigError, match="this is a Wan2.2 pipeline"):
            student(copy)
    index.write_text(json.dumps(known))
    vae = copy / "vae" / "config.json"
    vae.write_text(json.dumps(json.loads(vae.read_text()) | {"patch_size": 2}))
    with pytest.raises(ConfigError, match="VAE is that of Wan2.2-TI2V"):
        student(copy)


def test_a_scheduler_that_euler_cannot_follow_is_refused() -> None:
    unipc = dict(tiny_wan.SCHEDULERS["unipc"].config) | {"_class_name": "UniPCMultistepScheduler"}
    for change in ({"use_flow_sigmas": False}, {"prediction_type": "epsilon"}, {"use_karras_sigmas": True}):
        with pytest.raises(ConfigError, match="UniPCMultistepScheduler with"):
            Wan.scheduler(unipc | change)
    with pytest.raises(ConfigError, match="scheduler is DPMSolverMultistepScheduler: rats samples by"):
        Wan.scheduler({"_class_name": "DPMSolverMultistepScheduler"})


def test_without_ftfy_the_family_is_refused_with_the_line_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ftfy", None)
    monkeypatch.delitem(sys.modules, "rats.pipeline.families.wan")
    with pytest.raises(ConfigError, match="pip install 'ftfy>=6.1'"):
        load_plugin(FAMILIES, "wan")
