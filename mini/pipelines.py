"""Samples of a pipeline folder, through diffusers' own `FluxPipeline`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from diffusers import FluxPipeline

from mini.data import SIZE
from mini.teacher import MAX_LENGTH

CHUNK = 64


def open_pipeline(folder: Path, device: str = "cpu") -> FluxPipeline:
    """The folder in fp32, without a progress bar."""
    pipe = FluxPipeline.from_pretrained(folder, torch_dtype=torch.float32).to(device)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@torch.no_grad()
def sample(
    pipe: FluxPipeline, prompts: list[str], steps: int, seed: int, guidance: float = 1.0, negative: float = 1.0
) -> np.ndarray:
    """uint8 (B, 64, 64, 3), a picture a prompt; `guidance` is the embedded scale, `negative` that of true guidance."""
    parts = []
    for start in range(0, len(prompts), CHUNK):
        part = prompts[start : start + CHUNK]
        generators = [torch.Generator().manual_seed(seed * 100_003 + start + i) for i in range(len(part))]
        pictures = pipe(
            prompt=part,
            negative_prompt=[""] * len(part) if negative > 1 else None,
            true_cfg_scale=negative,
            guidance_scale=guidance,
            num_inference_steps=steps,
            height=SIZE,
            width=SIZE,
            max_sequence_length=MAX_LENGTH,
            generator=generators,
            output_type="np",
        ).images
        parts.append(np.uint8(np.round(255 * pictures)))
    return np.concatenate(parts)
