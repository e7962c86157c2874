"""A tiny random Wan2.1 pipeline in the real format, written in seconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from transformers import UMT5Config, UMT5EncoderModel

from mini.tokenizers import t5_tokenizer
from tests.support.tiny import LENGTH, PROMPTS

FRAMES = 5
"""Of the tests' videos, 16 x 16 px: latents of 2 frames of 2 x 2 positions."""
WIDTH = 16

SCHEDULERS: dict[str, Any] = {
    "euler": FlowMatchEulerDiscreteScheduler(shift=3.0),
    # what Wan2.1-T2V-1.3B is published with, for 480p
    "unipc": UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
}


def write_wan(folder: Path, seed: int = 0, scheduler: str = "euler") -> Path:
    """A pipeline folder that `WanPipeline.from_pretrained` loads; `scheduler` names one of `SCHEDULERS`."""
    torch.manual_seed(seed + 2)
    words = t5_tokenizer(PROMPTS, LENGTH)
    shape = {"d_model": WIDTH, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2, "decoder_start_token_id": 0}
    encoder = UMT5EncoderModel(UMT5Config(vocab_size=len(words), feed_forward_proj="gated-gelu", **shape)).eval()
    pipeline = WanPipeline(
        tokenizer=words,
        text_encoder=encoder,
        vae=vae(seed),
        scheduler=SCHEDULERS[scheduler],
        transformer=transformer(seed),
    )
    pipeline.save_pretrained(folder)
    return Path(folder)


def transformer(seed: int) -> WanTransformer3DModel:
    """Two blocks of two heads."""
    torch.manual_seed(seed)
    network = WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        text_dim=WIDTH,
        freq_dim=32,
        ffn_dim=32,
        num_layers=2,
        rope_max_seq_len=32,
    )
    return network.eval()


def vae(seed: int) -> AutoencoderKLWan:
    """Factors 8 and 4, 16 latent channels with the published means and deviations; pixels that are not all grey."""
    torch.manual_seed(seed + 1)
    network = AutoencoderKLWan(base_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1)
    with torch.no_grad():
        network.decoder.conv_out.weight *= 2
    return network.eval()
