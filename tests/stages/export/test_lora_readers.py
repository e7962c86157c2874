"""Exported adapters in loaders that read tensors and no metadata: both files give the right strength and names."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from rats.pipeline.families.open import Model
from rats.pipeline.weights.lora import COMFYUI, WEIGHTS, export_lora, merge_lora, save_lora
from rats.schemas.params import ComputeParams, ModelParams, TeacherParams
from rats.schemas.train_params import LoraParams
from tests.support import tiny, tiny_flux2, tiny_qwen
from tests.support.tiny_sd3 import write_sd3
from tests.support.tiny_wan import FRAMES, write_wan

RANK, ALPHA = 4, 6.0
FAMILIES: dict[str, tuple[Callable[[Path], Path], dict[str, Any]]] = {
    "flux": (tiny.write_flux, {}),
    "sd3": (write_sd3, {}),
    "qwen-image": (tiny_qwen.write_qwen_image, {"max_sequence_length": tiny_qwen.LENGTH}),
    "flux2": (tiny_flux2.write_flux2, {"max_sequence_length": tiny_flux2.LENGTH}),
    "wan": (partial(write_wan, scheduler="unipc"), {"frames": FRAMES}),
}
WAN = {
    **{f"self_attn.{name}": f"attn1.to_{name}" for name in "qkv"},
    **{f"cross_attn.{name}": f"attn2.to_{name}" for name in "qkv"},
    **{"self_attn.o": "attn1.to_out.0", "cross_attn.o": "attn2.to_out.0"},
    **{"ffn.0": "ffn.net.0.proj", "ffn.2": "ffn.net.2"},
}
"""Modules of a block in the published checkpoints of Wan2.1, and in diffusers."""


@pytest.mark.parametrize("name", FAMILIES)
def test_a_reader_of_tensors_alone_rebuilds_the_merged_weights_and_draws_as_rats_does(name: str, tmp_path: Path):
    model = write_student(name, tmp_path)
    adapted, plain = model.open_pipeline(tmp_path / "student"), model.open_pipeline()
    ours, base = draw(adapted, model), draw(plain, model)
    merge_lora(adapted.transformer)
    expected, start = adapted.transformer.state_dict(), plain.transformer.state_dict()
    for file in (WEIGHTS, COMFYUI):
        read = with_adapters(start, load_file(tmp_path / "lora" / file))
        assert read.keys() == expected.keys()
        assert max(float((read[key] - expected[key]).abs().max()) for key in read) <= 1e-6
    plain.transformer.load_state_dict(read)
    assert np.abs(draw(plain, model) - ours).max() <= 1e-5 < 1e-3 < np.abs(base - ours).max()


@pytest.mark.parametrize("name", FAMILIES)
def test_plain_diffusers_loads_its_file_and_draws_the_same(name: str, tmp_path: Path):
    model = write_student(name, tmp_path)
    ours = draw(model.open_pipeline(tmp_path / "student"), model)
    files = [WEIGHTS, COMFYUI] if name in ("flux", "wan") else [WEIGHTS]  # the others' loaders refuse `.alpha`
    for file in files:
        pipeline = model.open_pipeline()
        pipeline.load_lora_weights(tmp_path / "lora", weight_name=file)
        assert np.abs(draw(pipeline, model) - ours).max() <= 1e-5


def write_student(name: str, folder: Path) -> Model:
    """A tiny model, and adapters that change what it draws: `student/` as a run leaves it, `lora/` as exported."""
    write, teacher = FAMILIES[name]
    size = {"height": tiny.SIZE, "width": tiny.SIZE, "max_sequence_length": tiny.LENGTH}
    where = ModelParams(path=str(write(folder / "model")), family=name)
    model = Model(where, TeacherParams(**(size | teacher)), ComputeParams())
    network = model.open_student(lora=LoraParams(rank=RANK, alpha=ALPHA)).network
    random = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for key, value in network.named_parameters():
            if ".lora_B." in key:
                value.normal_(std=0.2, generator=random)
    save_lora(network, folder / "student")
    export_lora(folder / "student", folder / "lora", model.family.comfyui_name)
    return model


def with_adapters(start: dict[str, Tensor], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights with all adapters of a file added in, as a loader that knows nothing else would."""
    weights, unread = {key: value.clone() for key, value in start.items()}, set(tensors)
    for stem in {key.split(".lora_")[0] for key in tensors if ".lora_" in key}:
        down, up = (tensors[f"{stem}.lora_{side}.weight"] for side in "AB")
        strength = float(tensors.get(f"{stem}.alpha", len(down))) / len(down)
        weights[f"{module_of(stem)}.weight"] += strength * (up @ down)
        unread -= {f"{stem}.lora_A.weight", f"{stem}.lora_B.weight", f"{stem}.alpha"}
    assert not unread
    return weights


def module_of(stem: str) -> str:
    component, _, module = stem.partition(".")
    if component == "transformer":
        return module
    blocks, number, rest = module.split(".", 2)
    assert (component, blocks) == ("diffusion_model", "blocks")
    return f"blocks.{number}.{WAN[rest]}"


def draw(pipeline: Any, model: Model) -> np.ndarray:
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.Generator().manual_seed(3)
    drawn = pipeline(prompt=tiny.PROMPTS[0], num_inference_steps=2, generator=noise, output_type="np", **model.call())
    return np.asarray(drawn.frames[0] if "frames" in drawn else drawn.images[0])
