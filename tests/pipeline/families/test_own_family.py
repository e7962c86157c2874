"""The family in docs/families.md, installed from a package of its own, is its pipeline's sampler."""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AuraFlowPipeline, AuraFlowTransformer2DModel, FlowMatchEulerDiscreteScheduler
from transformers import UMT5Config, UMT5EncoderModel

from mini.tokenizers import t5_tokenizer
from rats.schemas.plugins import FAMILIES, plugins_in
from tests.support.agreement import NEGATIVE, PROMPTS, assert_latents, assert_pictures, noise, ours, plain, teacher_of
from tests.support.project import ROOT
from tests.support.tiny import LENGTH, vae


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What `pip install` leaves of a package of one file and one line."""
    text = (ROOT / "docs" / "families.md").read_text(encoding="utf-8")
    (code,), (lines,) = (re.findall(rf"```{kind}\n(.*?)```", text, re.S) for kind in ("python", "toml"))
    about = tmp_path / "site" / "rats_auraflow-0.1.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: rats-auraflow\nVersion: 0.1\n")
    group, point = re.fullmatch(r'\[project\.entry-points\."(.*)"\]\n(.*)\n', lines).groups()  # type: ignore[union-attr]
    (about / "entry_points.txt").write_text(f"[{group}]\n{point.replace(chr(34), '')}\n")
    (tmp_path / "site" / "rats_auraflow.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path / "site")
    plugins_in.cache_clear()
    assert importlib.metadata.version("rats-auraflow") == "0.1" and "auraflow" in plugins_in(FAMILIES)
    yield
    plugins_in.cache_clear()


def write_auraflow(folder: Path) -> Path:
    """Two blocks, a tiny KL VAE of factor 4 and a UMT5 of width 16."""
    torch.manual_seed(0)
    network = AuraFlowTransformer2DModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        caption_projection_dim=32,
        pos_embed_max_size=64,
    )
    words = t5_tokenizer(PROMPTS, LENGTH)
    shape = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2, "decoder_start_token_id": 0}
    encoder = UMT5EncoderModel(UMT5Config(vocab_size=len(words), **shape))
    parts: dict[str, Any] = {"transformer": network, "text_encoder": encoder, "tokenizer": words, "vae": vae()}
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.73)
    AuraFlowPipeline(scheduler=scheduler, **parts).save_pretrained(folder)
    return folder


@pytest.mark.usefixtures("installed")
def test_a_family_from_a_package_of_one_file_and_one_line_is_its_pipeline_s_sampler(tmp_path: Path) -> None:
    folder = write_auraflow(tmp_path / "auraflow")
    teacher = teacher_of("auraflow", folder, LENGTH, true_cfg_scale=3.5, negative_prompt=NEGATIVE)
    pipeline, latents = plain(AuraFlowPipeline, folder), ours(teacher, 8)
    call = teacher.family.call(teacher.settings) | {"guidance_scale": 3.5, "negative_prompt": [NEGATIVE] * 2}
    call |= {"num_inference_steps": 8, "latents": noise(teacher).transpose(1, 2).unflatten(2, (4, 4))}
    expected = pipeline(PROMPTS, output_type="latent", **call).images
    assert_latents(latents.transpose(1, 2).unflatten(2, (4, 4)), expected)
    assert_pictures(teacher.decode(latents), pipeline(PROMPTS, output_type="np", **call).images)
