"""A tiny random FLUX.2 [klein] pipeline in the real format, written in seconds."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import (
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
)
from transformers import Qwen3Config, Qwen3ForCausalLM

from tests.support.tiny_qwen import tokenizer_of

CHAT = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
"""What Qwen3's own template makes of one turn."""
LENGTH = 20
"""More than any prompt of `tiny.PROMPTS` in that template, so that all are padded."""
LAYERS = 27
"""The pipeline takes hidden states 9, 18 and 27."""


def write_flux2(folder: Path, seed: int = 0, guidance_embeds: bool = False, is_distilled: bool = False) -> Path:
    """A FLUX.2 [klein] folder (16 px pictures, latents 4 x 16) that `Flux2KleinPipeline.from_pretrained` loads."""
    tokenizer = tokenizer_of("<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n")
    tokenizer.chat_template = CHAT
    pipeline = Flux2KleinPipeline(
        transformer=transformer(seed, guidance_embeds),
        vae=vae(seed),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        text_encoder=text_encoder(len(tokenizer), seed),
        tokenizer=tokenizer,
        is_distilled=is_distilled,
    )
    pipeline.save_pretrained(folder)
    return Path(folder)


def transformer(seed: int, guidance_embeds: bool) -> Flux2Transformer2DModel:
    """One block of each kind."""
    torch.manual_seed(seed)
    network = Flux2Transformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        timestep_guidance_channels=32,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=guidance_embeds,
    )
    return network.eval()


def vae(seed: int) -> AutoencoderKLFlux2:
    """Factor 4 and 4 latent channels; statistics as after training, each channel of a patch with its own."""
    torch.manual_seed(seed + 1)
    network = AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=4,
        sample_size=16,
        batch_norm_eps=0.1,  # the published 1e-4 is too small to be missed
    )
    network.bn.running_mean.normal_()
    network.bn.running_var.uniform_(0.3, 3.0)
    return network.eval()


def text_encoder(vocab: int, seed: int) -> Qwen3ForCausalLM:
    """As many layers as the pipeline counts on, of width 8."""
    torch.manual_seed(seed + 2)
    heads = {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 8}
    shape = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": LAYERS, "vocab_size": vocab}
    return Qwen3ForCausalLM(Qwen3Config(**shape, **heads, initializer_range=0.2)).eval()
