"""HPS v2 and v2.1 (Wu et al. 2023): an open_clip checkpoint, run by transformers' CLIPModel.

Two layouts are read. One is a single file of ViT-H-14, `HPS_v2.1_compressed.pt` or `HPS_v2_compressed.pt`; of a folder
or hub repository, v2.1 is taken unless the path names the file. The other is open_clip's folder, of any size
(`open_clip_config.json` and `open_clip_model.safetensors`).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from torch import Tensor

from rats.pipeline.rewards.base import CheckpointReward
from rats.pipeline.rewards.clip import CLIP_L_14, cosine, import_clip, open_tokenizer
from rats.pipeline.rewards.preprocess import CLIP_MEAN, CLIP_STD, resize_normalise
from rats.pipeline.weights.hashes import read_json
from rats.pipeline.weights.loading import load_state, read_state, torch_device

VIT_H_14: dict[str, Any] = {
    "embed_dim": 1024,
    "vision_cfg": {"image_size": 224, "layers": 32, "width": 1280, "head_width": 80, "patch_size": 14},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 1024, "heads": 16, "layers": 24},
}
TOWERS = {"visual.": "vision_model.", "": "text_model."}
BLOCK_NAMES = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
OUTER_NAMES = {
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "logit_scale": "logit_scale",
}
TRANSPOSED = {"visual.proj": "visual_projection.weight", "text_projection": "text_projection.weight"}
BLOCK = re.compile(r"(visual\.|)transformer\.resblocks\.(\d+)\.(.+)\.?_?(weight|bias)$")


def convert(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """open_clip's tensors under CLIPModel's names: qkv split in three, projections transposed; others dropped."""
    converted: dict[str, Tensor] = {}
    for key, value in state.items():
        if key in OUTER_NAMES:
            converted[OUTER_NAMES[key]] = value
        elif key in TRANSPOSED:
            converted[TRANSPOSED[key]] = value.T.contiguous()
        elif match := BLOCK.match(key):
            tower, layer, name, kind = match.groups()
            converted |= _convert_block(tower, layer, name, kind, value)
    return converted


def _convert_block(tower: str, layer: str, name: str, kind: str, value: Tensor) -> dict[str, Tensor]:
    """One tensor of one residual block; `name` ends in '.' or, for the fused qkv, in '_'."""
    prefix, name = f"{TOWERS[tower]}encoder.layers.{layer}.", name.rstrip("._")
    if name == "attn.in_proj":
        parts = zip("qkv", value.chunk(3), strict=True)
        return {f"{prefix}self_attn.{part}_proj.{kind}": tensor.contiguous() for part, tensor in parts}
    return {f"{prefix}{BLOCK_NAMES[name]}.{kind}": value} if name in BLOCK_NAMES else {}


def clip_config(architecture: dict[str, Any]) -> dict[str, Any]:
    """CLIPConfig's fields from open_clip's `model_cfg`."""
    vision, text = architecture["vision_cfg"], architecture["text_cfg"]
    activation = "quick_gelu" if architecture.get("quick_gelu") else "gelu"
    shared = {"projection_dim": architecture["embed_dim"], "hidden_act": activation}
    return {
        "projection_dim": architecture["embed_dim"],
        "vision_config": {
            **_tower(vision, vision["width"] // vision.get("head_width", 64)),
            **shared,
            "image_size": vision["image_size"],
            "patch_size": vision["patch_size"],
        },
        "text_config": {
            **_tower(text, text["heads"]),
            **shared,
            "vocab_size": text["vocab_size"],
            "max_position_embeddings": text["context_length"],
            # 2 is transformers' sign for "pool at the largest id", which is what open_clip does.
            "eos_token_id": 2,
            "bos_token_id": 0,
            "pad_token_id": 1,
        },
    }


def _tower(settings: dict[str, Any], heads: int) -> dict[str, int]:
    width = settings["width"]
    intermediate = int(width * settings.get("mlp_ratio", 4))
    layers = settings["layers"]
    return {
        "hidden_size": width,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
    }


def open_clip_config(folder: Path) -> dict[str, Any]:
    """The content of open_clip_config.json; without one, ViT-H-14's architecture."""
    settings = folder / "open_clip_config.json"
    return read_json(settings) if settings.is_file() else {"model_cfg": VIT_H_14}


class HPSv2(CheckpointReward):
    """Cosine of image and text, the number that `hpsv2.score` returns (without the logit scale)."""

    adapter, version = "hpsv2", 1
    checkpoints = ("open_clip_model.safetensors", "HPS_v2.1_compressed.pt", "HPS_v2_compressed.pt")
    tokenizer_source = CLIP_L_14

    def __init__(self, path: Path, name: str = "hpsv2", device: str = "cpu") -> None:
        """Loads `path`: a checkpoint file, or a folder that holds one."""
        model_class, config_class, tokenizer_class = import_clip()
        weights = self.weights(path)
        config = open_clip_config(weights.parent)
        self.name, self.fingerprint = name, self.identify(path)
        state = convert(read_state(weights))
        self.model = model_class(config_class.from_dict(clip_config(config["model_cfg"])))
        load_state(self.model, state, weights)
        self.model.requires_grad_(False).eval().to(torch_device(device))
        self.tokenizer = open_tokenizer(tokenizer_class, weights.parent, self.tokenizer_source)
        self._preprocess = config.get("preprocess_cfg", {})

    def score(self, images_B3HW: Tensor, prompts: list[str]) -> Tensor:
        """Scores (B,), float32, of images in [0, 1]; differentiable."""
        size = self.model.config.vision_config.image_size
        mean, std = self._preprocess.get("mean", CLIP_MEAN), self._preprocess.get("std", CLIP_STD)
        # HPS v2 resizes after ToTensor, without PIL's rounding and clamp, and pads where others crop.
        pixels = resize_normalise(images_B3HW.to(self.model.device), size, mean, std, fit="pad", overshoot="kept")
        return cosine(self.model, self.tokenizer, pixels, prompts)
