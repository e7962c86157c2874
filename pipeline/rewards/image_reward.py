"""ImageReward (Xu et al. 2023) without its package: BLIP from transformers and the MLP on top.

A folder with `ImageReward.pt` or `.safetensors`, `med_config.json` and a BERT vocabulary (else the hub's). Sizes are
read from the tensors, so that small models load too; only the vision tower's number of heads cannot be, and
`"vision_config": {"num_attention_heads": n}` in `med_config.json` sets it.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from rats.pipeline.rewards.base import CheckpointReward, LinearHead, head_widths
from rats.pipeline.rewards.clip import HubCommit, open_tokenizer
from rats.pipeline.rewards.preprocess import CLIP_MEAN, CLIP_STD, as_pil, resize_normalise
from rats.pipeline.weights.hashes import read_json
from rats.pipeline.weights.loading import load_state, quiet_loading, read_state, torch_device
from rats.schemas.errors import DataError

TOKENIZER = HubCommit("google-bert/bert-base-uncased", "86b5e0934494bd15c9632b12f734a8a67f723594")
MEAN, STD = 0.16717362830052426, 1.0333394966054072
"""Mean and standard deviation of the raw reward, fixed upstream."""

LENGTH, SIZE = 35, 224
"""Upstream's length of prompts in tokens and side of pictures in pixels."""

VISION_NAMES = (
    (r"^cls_token$", "embeddings.class_embedding"),
    (r"^pos_embed$", "embeddings.position_embedding"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embedding."),
    (r"^blocks\.(\d+)\.norm([12])\.", r"encoder.layers.\1.layer_norm\2."),
    (r"^blocks\.(\d+)\.attn\.qkv\.", r"encoder.layers.\1.self_attn.qkv."),
    (r"^blocks\.(\d+)\.attn\.proj\.", r"encoder.layers.\1.self_attn.projection."),
    (r"^blocks\.(\d+)\.mlp\.", r"encoder.layers.\1.mlp."),
    (r"^norm\.", "post_layernorm."),
)
MED_FIELDS = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "max_position_embeddings",
    "hidden_act",
    "layer_norm_eps",
    "pad_token_id",
)


def convert(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Upstream's tensors under `ImageRewardNetwork`'s names."""
    converted: dict[str, Tensor] = {}
    for key, value in state.items():
        if key.startswith("blip.visual_encoder."):
            converted["vision." + _vision_name(key.removeprefix("blip.visual_encoder."))] = value
        elif key.startswith("blip.text_encoder."):
            converted["text." + key.removeprefix("blip.text_encoder.")] = value
        elif key.startswith("mlp.layers."):
            converted["mlp." + key.removeprefix("mlp.layers.")] = value
    return converted


def _vision_name(name: str) -> str:
    for pattern, replacement in VISION_NAMES:
        name, count = re.subn(pattern, replacement, name)
        if count:
            break
    return name


def vision_config(state: dict[str, Tensor], heads: int | None) -> dict[str, Any]:
    """BlipVisionConfig's fields, read from converted tensors; 64 channels a head unless `heads` says otherwise."""
    _, tokens, width = state["vision.embeddings.position_embedding"].shape
    patch = state["vision.embeddings.patch_embedding.weight"].shape[-1]
    layers = [int(m[1]) for key in state if (m := re.match(r"vision\.encoder\.layers\.(\d+)\.", key))]
    return {
        "hidden_size": width,
        "intermediate_size": state["vision.encoder.layers.0.mlp.fc1.weight"].shape[0],
        "num_hidden_layers": max(layers) + 1,
        "num_attention_heads": heads or width // 64,
        "image_size": patch * round((tokens - 1) ** 0.5),
        "patch_size": patch,
        "layer_norm_eps": 1e-6,  # timm's ViT; transformers' default 1e-5 is another model
    }


class ImageRewardNetwork(nn.Module):
    """Vision tower, text tower that attends to it, and five linear layers."""

    def __init__(self, vision: dict[str, Any], text: dict[str, Any], widths: list[int]) -> None:
        """`widths`: the MLP's layers, its input first and 1 last."""
        super().__init__()
        with quiet_loading():
            from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel
        # is_decoder adds the cross attention; the model is still called as an encoder, whose attention is not causal
        text = {**text, "encoder_hidden_size": vision["hidden_size"], "is_decoder": True}
        # Unused here, but the defaults lie outside of a small vocabulary.
        text |= {"bos_token_id": 0, "eos_token_id": 0, "sep_token_id": 0}
        self.vision = BlipVisionModel(BlipVisionConfig(**vision))
        self.text = BlipTextModel(BlipTextConfig(**text), add_pooling_layer=False)
        self.mlp = LinearHead(widths)

    def forward(self, pixels_B3SS: Tensor, ids_BL: Tensor, mask_BL: Tensor) -> Tensor:
        """Raw rewards (B,)."""
        image = self.vision(pixels_B3SS).last_hidden_state
        attend = torch.ones(image.shape[:2], dtype=torch.long, device=image.device)
        hidden_BLD = self.text(
            ids_BL, attention_mask=mask_BL, encoder_hidden_states=image, encoder_attention_mask=attend
        ).last_hidden_state
        return cast(Tensor, self.mlp(hidden_BLD[:, 0]))


class ImageReward(CheckpointReward):
    """The normalised human-preference score of `ImageReward.score_gard`, about zero mean and unit spread."""

    adapter, version = "image-reward", 1
    checkpoints = ("ImageReward.safetensors", "ImageReward.pt")
    tokenizer_source = TOKENIZER

    def __init__(self, path: Path, name: str = "image-reward", device: str = "cpu") -> None:
        """Loads the folder `path`, or that of the file `path`."""
        from transformers import BertTokenizerFast

        weights = self.weights(path)
        med = read_json(weights.parent / "med_config.json")
        self.name, self.fingerprint = name, self.identify(path)
        state = convert(read_state(weights))
        self.model = _build(state, med, weights)
        load_state(self.model, state, weights)
        self.model.requires_grad_(False).eval().to(torch_device(device))
        self.tokenizer = open_tokenizer(BertTokenizerFast, weights.parent, self.tokenizer_source)

    def score(self, images_B3HW: Tensor, prompts: list[str]) -> Tensor:
        """Scores (B,), float32, of images in [0, 1]; differentiable."""
        length = min(LENGTH, self.model.text.config.max_position_embeddings)
        tokens = self.tokenizer(prompts, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
        images = images_B3HW.to(self.model.text.device)
        size = self.model.vision.config.image_size
        pixels = resize_normalise(images, size, CLIP_MEAN, CLIP_STD, fit="crop-rounded", overshoot=as_pil(size))
        raw = self.model(pixels, tokens.input_ids.to(pixels.device), tokens.attention_mask.to(pixels.device))
        return (raw.float() - MEAN) / STD


def _build(state: dict[str, Tensor], med: dict[str, Any], weights: Path) -> ImageRewardNetwork:
    """The network of the tensors' sizes; DataError when they are not an ImageReward's."""
    try:
        vision = vision_config(state, med.get("vision_config", {}).get("num_attention_heads"))
        text = {key: med[key] for key in MED_FIELDS if key in med}
        return ImageRewardNetwork(vision, text, head_widths(state, "mlp."))
    except (KeyError, ValueError, IndexError) as error:
        raise DataError(f"{weights} is no ImageReward checkpoint ({error!r}): fetch it again") from error
