"""A tiny random Qwen-Image pipeline in the real format, written in seconds."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

from mini.tokenizers import qwen2_tokenizer
from tests.support.tiny import PROMPTS

TEMPLATE = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, "
    "spatial relationships of the objects and background:<|im_end|>\n<|im_start|>user\n"
)
"""What the pipeline puts before a prompt, and takes off again as 34 tokens."""
TURNS = ("<|im_start|>", "<|im_end|>")
LENGTH = 12
"""More than any of `PROMPTS` and the five tokens after it, so that all are padded."""
PUBLISHED_SHIFT = {
    "use_dynamic_shifting": True,
    "base_shift": 0.5,
    "max_shift": 0.9,
    "base_image_seq_len": 256,
    "max_image_seq_len": 8192,
    "shift_terminal": 0.02,
}
"""Of Qwen/Qwen-Image's scheduler_config.json."""


def write_qwen_image(folder: Path, seed: int = 0, guidance_embeds: bool = False, **shift: object) -> Path:
    """A Qwen-Image folder (16 px pictures, latents 4 x 16) that `QwenImagePipeline.from_pretrained` loads.

    `shift`: the scheduler's settings, in place of the published ones.
    """
    tokenizer = tokenizer_of(TEMPLATE, "<|im_end|>\n<|im_start|>assistant\n")
    pipeline = QwenImagePipeline(
        transformer=transformer(seed, guidance_embeds),
        vae=vae(seed),
        scheduler=FlowMatchEulerDiscreteScheduler(**(shift or PUBLISHED_SHIFT)),
        text_encoder=text_encoder(len(tokenizer), seed),
        tokenizer=tokenizer,
    )
    pipeline.save_pretrained(folder)
    return Path(folder)


def tokenizer_of(*template: str) -> Qwen2Tokenizer:
    """One token a word of the template and of `PROMPTS`."""
    plain = "\0".join(template)
    for turn in TURNS:
        plain = plain.replace(turn, "\0")
    return qwen2_tokenizer([*plain.split("\0"), *PROMPTS, *(f" {prompt}" for prompt in PROMPTS)], TURNS)


def transformer(seed: int, guidance_embeds: bool = False) -> QwenImageTransformer2DModel:
    """Two blocks: the last one of a network lets the text go."""
    torch.manual_seed(seed)
    network = QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(4, 6, 6),
        guidance_embeds=guidance_embeds,
    )
    return network.eval()


def vae(seed: int) -> AutoencoderKLQwenImage:
    """Factor 4 and 4 latent channels, each with a mean and a deviation of its own."""
    torch.manual_seed(seed + 1)
    return AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True],
        latents_mean=[-0.7, 0.1, 0.9, -0.2],
        latents_std=[2.8, 1.4, 0.6, 1.9],
    ).eval()


def text_encoder(vocab: int, seed: int) -> Qwen2_5_VLForConditionalGeneration:
    """Two layers of width 16, and a vision tower that prompts never reach."""
    torch.manual_seed(seed + 2)
    shared = {"hidden_size": 16, "intermediate_size": 32}
    heads = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    rope = {"rope_type": "default", "type": "default", "mrope_section": [1, 1, 2]}
    ids = {"bos_token_id": None, "eos_token_id": 0, "vocab_size": vocab}
    config = Qwen2_5_VLConfig(
        vision_start_token_id=151652,  # its default in transformers 5; transformers 4 has none
        text_config={**shared, **heads, **ids, "rope_scaling": rope},
        vision_config={**shared, "depth": 1, "num_heads": 2, "out_hidden_size": 16, "fullatt_block_indexes": [0]},
    )
    return Qwen2_5_VLForConditionalGeneration(config).eval()
