"""Tiny random models in the real formats, written in seconds: the tests' stand-ins for FLUX and the rewards."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from safetensors.torch import save_file
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook
from transformers import (
    BlipTextConfig,
    BlipTextModel,
    BlipVisionConfig,
    BlipVisionModel,
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    T5Config,
    T5EncoderModel,
)

from mini.formats import image_reward_state, open_clip_state
from mini.tokenizers import bert_tokenizer, clip_tokenizer, t5_tokenizer


@contextmanager
def threads_seen(given: int) -> Iterator[set[int]]:
    """Numbers of torch's threads at all evaluations of a FLUX, in a process that has `given` ones before and after."""
    seen, before = set(), torch.get_num_threads()

    def look(module: nn.Module, args: object) -> None:
        if isinstance(module, FluxTransformer2DModel) and not module.proj_out.weight.is_meta:
            seen.add(torch.get_num_threads())

    hook = register_module_forward_pre_hook(look)
    torch.set_num_threads(given)
    try:
        yield seen
        assert torch.get_num_threads() == given
    finally:
        torch.set_num_threads(before)
        hook.remove()


PROMPTS = ("a red fox", "a green frog", "a blue whale", "two red apples", "a house at night", "a yellow star")
SIZE = 16
"""Height and width of `write_flux`'s pictures: 4 latent tokens."""
LENGTH = 8
"""Text tokens of all encoders."""


def transformer(seed: int = 0, guidance_embeds: bool = False, pooled: int = 16, joint: int = 16) -> nn.Module:
    """A FluxTransformer2DModel of 1 + 1 blocks; its last layer is not tiny, so that velocities differ by prompt."""
    torch.manual_seed(seed)
    network = FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=joint,
        pooled_projection_dim=pooled,
        guidance_embeds=guidance_embeds,
        axes_dims_rope=(4, 6, 6),
    )
    return network.eval()


def vae(seed: int = 0) -> AutoencoderKL:
    """An AutoencoderKL of factor 4 with 4 latent channels."""
    torch.manual_seed(seed + 1)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=4,
        sample_size=SIZE,
        scaling_factor=0.8,
        shift_factor=0.1,
        use_quant_conv=False,
        use_post_quant_conv=False,
    ).eval()


def text_encoders(seed: int = 0) -> dict[str, object]:
    """CLIP and T5 encoders of width 16 with tokenizers whose words come from `PROMPTS`."""
    torch.manual_seed(seed + 2)
    tokenizer, tokenizer_2 = clip_tokenizer(PROMPTS, LENGTH), t5_tokenizer(PROMPTS, LENGTH)
    clip = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        projection_dim=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    shape = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2, "decoder_start_token_id": 0}
    t5 = T5Config(vocab_size=len(tokenizer_2), feed_forward_proj="gated-gelu", **shape)
    return {
        "text_encoder": CLIPTextModel(clip).eval(),
        "tokenizer": tokenizer,
        "text_encoder_2": T5EncoderModel(t5).eval(),
        "tokenizer_2": tokenizer_2,
    }


def write_flux(
    folder: Path, seed: int = 0, guidance_embeds: bool = False, shift: float = 3.0, dynamic: bool = False
) -> Path:
    """A FLUX pipeline folder (16 px pictures, latents 4 x 16) that `FluxPipeline.from_pretrained` loads."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift, use_dynamic_shifting=dynamic)
    parts = text_encoders(seed)
    pipeline = FluxPipeline(scheduler=scheduler, vae=vae(seed), transformer=transformer(seed, guidance_embeds), **parts)
    pipeline.save_pretrained(folder)
    return Path(folder)


def clip_config(vocab: int, eos: int, size: int = 32) -> CLIPConfig:
    """A CLIPModel of width 32 with two layers a tower, for pictures of `size` px."""
    shared = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {"vocab_size": vocab, "max_position_embeddings": LENGTH, "bos_token_id": vocab - 2, "eos_token_id": eos}
    vision = {"image_size": size, "patch_size": 8}
    return CLIPConfig(text_config=shared | text, vision_config=shared | vision, projection_dim=16)


def write_pickscore(folder: Path, seed: int = 0) -> Path:
    """A random CLIPModel folder with tokenizer and preprocessor, as `yuvalkirstain/PickScore_v1` is laid out."""
    torch.manual_seed(seed + 3)
    tokenizer = clip_tokenizer(PROMPTS, LENGTH)
    CLIPModel(clip_config(len(tokenizer), tokenizer.eos_token_id)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    size = {"height": 32, "width": 32}
    settings = {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 32}, "crop_size": size}
    (Path(folder) / "preprocessor_config.json").write_text(json.dumps(settings))
    return Path(folder)


def write_hpsv2(folder: Path, seed: int = 0) -> Path:
    """A random open_clip folder: open_clip_config.json, open_clip_model.safetensors and a CLIP tokenizer."""
    torch.manual_seed(seed + 4)
    tokenizer = clip_tokenizer(PROMPTS, LENGTH)
    model = CLIPModel(clip_config(len(tokenizer), tokenizer.eos_token_id))
    tokenizer.save_pretrained(folder)
    save_file(open_clip_state(model), Path(folder) / "open_clip_model.safetensors")
    shared = {"layers": 2, "width": 32, "mlp_ratio": 2.0}
    architecture = {
        "embed_dim": 16,
        "quick_gelu": True,
        "vision_cfg": shared | {"image_size": 32, "head_width": 16, "patch_size": 8},
        "text_cfg": shared | {"context_length": LENGTH, "vocab_size": len(tokenizer), "heads": 2},
    }
    (Path(folder) / "open_clip_config.json").write_text(json.dumps({"model_cfg": architecture, "preprocess_cfg": {}}))
    return Path(folder)


def write_image_reward(folder: Path, seed: int = 0) -> Path:
    """A random ImageReward folder of width 32: ImageReward.safetensors, med_config.json and a BERT tokenizer."""
    torch.manual_seed(seed + 5)
    Path(folder).mkdir(parents=True, exist_ok=True)
    tokenizer = bert_tokenizer(PROMPTS, first=("[DEC]", "[ENC]"))
    shared = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    med = shared | {"vocab_size": len(tokenizer), "max_position_embeddings": 16, "layer_norm_eps": 1e-12}
    unused = {"bos_token_id": 0, "eos_token_id": 0, "sep_token_id": 0}
    sizes = {"image_size": 32, "patch_size": 8, "layer_norm_eps": 1e-6, "initializer_range": 0.2}
    vision = BlipVisionModel(BlipVisionConfig(**shared, **sizes))
    settings = {"encoder_hidden_size": 32, "is_decoder": True, "initializer_range": 0.3}
    text = BlipTextModel(BlipTextConfig(**med, **unused, **settings), add_pooling_layer=False)
    widths = (32, 24, 16, 8, 4, 1)
    # torch's own initialisation, not upstream's: that one's gradient at the pixels is 1e-14.
    mlp = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))
    state = {key: value.contiguous() for key, value in image_reward_state(vision, text, mlp).items()}
    save_file(state, Path(folder) / "ImageReward.safetensors")
    tokenizer.save_pretrained(folder)
    (Path(folder) / "med_config.json").write_text(json.dumps({**med, "vision_config": {"num_attention_heads": 2}}))
    return Path(folder)
