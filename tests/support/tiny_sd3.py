"""A tiny random Stable Diffusion 3 pipeline in the real format, written in seconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

from mini.tokenizers import clip_tokenizer, t5_tokenizer
from tests.support.tiny import LENGTH, PROMPTS, vae

CLIP_TOKENS = 77
"""As in every published SD3: the pipeline puts them before T5's `LENGTH`."""
WIDTHS = (16, 24)
"""Of the CLIP encoders, which differ as CLIP-L and CLIP-G do."""


def write_sd3(
    folder: Path, seed: int = 0, shift: float = 3.0, dynamic: bool = False, dual: tuple[int, ...] = ()
) -> Path:
    """An SD3 pipeline folder (16 px pictures, latents 16 x 16) that `StableDiffusion3Pipeline.from_pretrained` loads.

    `dual`: blocks with a second attention over the picture, as SD3.5-medium's first 13 have; with normed queries then.
    """
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift, use_dynamic_shifting=dynamic)
    pipeline = StableDiffusion3Pipeline(
        transformer=transformer(seed, dual), scheduler=scheduler, vae=deep_vae(seed), **text_encoders(seed)
    )
    pipeline.save_pretrained(folder)
    return Path(folder)


def transformer(seed: int, dual: tuple[int, ...] = ()) -> SD3Transformer2DModel:
    """Two blocks: the last one of a network lets the text go."""
    torch.manual_seed(seed)
    network = SD3Transformer2DModel(
        sample_size=8,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=48,
        caption_projection_dim=32,
        pooled_projection_dim=sum(WIDTHS),
        pos_embed_max_size=16,
        dual_attention_layers=dual,
        qk_norm="rms_norm" if dual else None,
    )
    return network.eval()


def deep_vae(seed: int) -> AutoencoderKL:
    """`tiny.vae` with the family's 16 latent channels."""
    torch.manual_seed(seed + 1)
    config = dict(vae(seed).config) | {"latent_channels": 16}
    return AutoencoderKL.from_config(config).eval()


def text_encoders(seed: int) -> dict[str, Any]:
    """Two CLIP encoders and T5, whose words come from `PROMPTS`."""
    torch.manual_seed(seed + 2)
    shape = {"d_model": 48, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2, "decoder_start_token_id": 0}
    words = t5_tokenizer(PROMPTS, LENGTH)
    parts = {"tokenizer_3": words}
    parts["text_encoder_3"] = T5EncoderModel(T5Config(vocab_size=len(words), feed_forward_proj="gated-gelu", **shape))
    for name, width in zip(("", "_2"), WIDTHS, strict=True):
        parts[f"tokenizer{name}"] = clip_tokenizer(PROMPTS, CLIP_TOKENS)
        parts[f"text_encoder{name}"] = clip_encoder(parts[f"tokenizer{name}"], width)
    return parts


def clip_encoder(tokenizer: Any, width: int) -> CLIPTextModelWithProjection:
    """Two layers: the pipeline takes the last but one's states."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=32,
        projection_dim=width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=CLIP_TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModelWithProjection(config).eval()
