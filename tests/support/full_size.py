"""Published pipelines at full size without their weights: folders of configurations, as the hub holds them.

The values are those of the repositories' config.json files; fields that are diffusers' or transformers' defaults are
left out.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

AUTOENCODER_KL = {
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
    "latent_channels": 16,
    "sample_size": 1024,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
CLIP_L = {
    "architectures": ["CLIPTextModel"],
    "model_type": "clip_text_model",
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "projection_dim": 768,
    "max_position_embeddings": 77,
    "vocab_size": 49408,
    "hidden_act": "quick_gelu",
}
CLIP_G = CLIP_L | {
    "architectures": ["CLIPTextModelWithProjection"],
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "projection_dim": 1280,
    "hidden_act": "gelu",
}
T5_XXL = {
    "architectures": ["T5EncoderModel"],
    "model_type": "t5",
    "d_model": 4096,
    "d_ff": 10240,
    "d_kv": 64,
    "num_heads": 64,
    "num_layers": 24,
    "vocab_size": 32128,
    "feed_forward_proj": "gated-gelu",
}
UMT5_XXL = T5_XXL | {"architectures": ["UMT5EncoderModel"], "model_type": "umt5", "vocab_size": 256384}

FLUX_DEV = {
    "num_layers": 19,
    "num_single_layers": 38,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "guidance_embeds": True,
    "in_channels": 64,
}
FLUX_VAE = AUTOENCODER_KL | {"scaling_factor": 0.3611, "shift_factor": 0.1159}
FLUX_TEXT = {"text_encoder": CLIP_L, "text_encoder_2": T5_XXL, "tokenizer": {}, "tokenizer_2": {}}
FLUX_SCHEDULER = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "base_image_seq_len": 256,
    "base_shift": 0.5,
    "max_image_seq_len": 4096,
    "max_shift": 1.15,
    "shift": 3.0,
    "use_dynamic_shifting": True,
}
SD35_MEDIUM = {
    "sample_size": 128,
    "patch_size": 2,
    "in_channels": 16,
    "num_layers": 24,
    "attention_head_dim": 64,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "caption_projection_dim": 1536,
    "pooled_projection_dim": 2048,
    "out_channels": 16,
    "pos_embed_max_size": 384,
    "dual_attention_layers": [*range(13)],
    "qk_norm": "rms_norm",
}
WAN21_1_3B = {
    "patch_size": [1, 2, 2],
    "num_attention_heads": 12,
    "attention_head_dim": 128,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 4096,
    "freq_dim": 256,
    "ffn_dim": 8960,
    "num_layers": 30,
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
    "eps": 1e-6,
    "rope_max_seq_len": 1024,
}
WAN_SCHEDULER = {
    "_class_name": "UniPCMultistepScheduler",
    "flow_shift": 3.0,
    "num_train_timesteps": 1000,
    "prediction_type": "flow_prediction",
    "solver_order": 2,
    "use_flow_sigmas": True,
}

PIPELINES: dict[str, dict[str, Any]] = {
    "flux-dev": {
        "": {"_class_name": "FluxPipeline"},
        "transformer": FLUX_DEV,
        "vae": FLUX_VAE,
        "scheduler": FLUX_SCHEDULER,
        **FLUX_TEXT,
    },
    "flux-schnell": {
        "": {"_class_name": "FluxPipeline"},
        "transformer": FLUX_DEV | {"guidance_embeds": False},
        "vae": FLUX_VAE,
        "scheduler": FLUX_SCHEDULER | {"shift": 1.0, "use_dynamic_shifting": False},
        **FLUX_TEXT,
    },
    "sd35-medium": {
        "": {"_class_name": "StableDiffusion3Pipeline"},
        "transformer": SD35_MEDIUM,
        "vae": AUTOENCODER_KL | {"scaling_factor": 1.5305, "shift_factor": 0.0609},
        "scheduler": {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0},
        "text_encoder": CLIP_L | {"architectures": ["CLIPTextModelWithProjection"]},
        "text_encoder_2": CLIP_G,
        "text_encoder_3": T5_XXL,
        "tokenizer": {},
        "tokenizer_2": {},
        "tokenizer_3": {},
    },
    "wan21-1.3b": {
        "": {"_class_name": "WanPipeline"},
        "transformer": WAN21_1_3B,
        "vae": {},
        "scheduler": WAN_SCHEDULER,
        "text_encoder": UMT5_XXL,
        "tokenizer": {},
    },
}
"""Configuration by component; "" is model_index.json."""

FILES = {"": "model_index.json", "scheduler": "scheduler_config.json"}


def write_pipeline(folder: Path, name: str, **changes: Mapping[str, Any]) -> Path:
    """The folder of one of `PIPELINES`; `changes` are fields by component."""
    for component, config in PIPELINES[name].items():
        kind = "tokenizer_config.json" if component.startswith("tokenizer") else "config.json"
        path = folder / component / FILES.get(component, kind)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({**config, **changes.get(component, {})}, indent=2))
    return folder
