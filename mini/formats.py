"""Writes trained rewards in the formats of their big sisters: CLIPModel, open_clip and ImageReward checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import BlipTextModel, BlipVisionModel, CLIPModel

from mini.tokenizers import save_clip

BLOCK = (("layer_norm1", "ln_1"), ("layer_norm2", "ln_2"), ("mlp.fc1", "mlp.c_fc"), ("mlp.fc2", "mlp.c_proj"))
BLIP_NAMES = (
    ("embeddings.class_embedding", "cls_token"),
    ("embeddings.position_embedding", "pos_embed"),
    ("embeddings.patch_embedding", "patch_embed.proj"),
    ("encoder.layers", "blocks"),
    ("layer_norm", "norm"),
    ("self_attn.qkv", "attn.qkv"),
    ("self_attn.projection", "attn.proj"),
    ("post_layernorm", "norm"),
)
MLP_POSITIONS = (0, 2, 4, 6, 7)
"""Of the linear layers in ImageReward's MLP, between dropouts."""


def open_clip_state(model: CLIPModel) -> dict[str, Tensor]:
    """The model's tensors under open_clip's names: `rats.pipeline.rewards.hpsv2.convert`, the other way round."""
    state, theirs = model.state_dict(), {}
    depths = {"vision_model": model.config.vision_config, "text_model": model.config.text_config}
    for ours, tower in (("vision_model", "visual."), ("text_model", "")):
        for layer in range(depths[ours].num_hidden_layers):
            theirs |= _open_clip_block(
                state, f"{ours}.encoder.layers.{layer}.", f"{tower}transformer.resblocks.{layer}."
            )
    for kind in ("weight", "bias"):
        theirs[f"visual.ln_pre.{kind}"] = state[f"vision_model.pre_layrnorm.{kind}"]
        theirs[f"visual.ln_post.{kind}"] = state[f"vision_model.post_layernorm.{kind}"]
        theirs[f"ln_final.{kind}"] = state[f"text_model.final_layer_norm.{kind}"]
    theirs["visual.class_embedding"] = state["vision_model.embeddings.class_embedding"]
    theirs["visual.positional_embedding"] = state["vision_model.embeddings.position_embedding.weight"]
    theirs["visual.conv1.weight"] = state["vision_model.embeddings.patch_embedding.weight"]
    theirs["token_embedding.weight"] = state["text_model.embeddings.token_embedding.weight"]
    theirs["positional_embedding"] = state["text_model.embeddings.position_embedding.weight"]
    theirs["visual.proj"] = state["visual_projection.weight"].T.contiguous()
    theirs["text_projection"] = state["text_projection.weight"].T.contiguous()
    theirs["logit_scale"] = state["logit_scale"]
    return theirs


def _open_clip_block(state: dict[str, Tensor], source: str, target: str) -> dict[str, Tensor]:
    """One residual block, its q, k and v fused."""
    theirs = {}
    for kind in ("weight", "bias"):
        qkv = [state[f"{source}self_attn.{part}_proj.{kind}"] for part in "qkv"]
        theirs[f"{target}attn.in_proj_{kind}"] = torch.cat(qkv)
        theirs[f"{target}attn.out_proj.{kind}"] = state[f"{source}self_attn.out_proj.{kind}"]
        theirs |= {f"{target}{b}.{kind}": state[f"{source}{a}.{kind}"] for a, b in BLOCK}
    return theirs


def image_reward_state(vision: BlipVisionModel, text: BlipTextModel, mlp: list[nn.Linear]) -> dict[str, Tensor]:
    """The tensors under ImageReward's names, BLIP's unused heads left out."""
    state = {}
    for key, value in vision.state_dict().items():
        for ours, theirs in BLIP_NAMES:
            key = key.replace(ours, theirs)
        state["blip.visual_encoder." + key] = value
    state |= {"blip.text_encoder." + key: value for key, value in text.state_dict().items()}
    for position, layer in zip(MLP_POSITIONS, mlp, strict=True):
        state |= {f"mlp.layers.{position}.{key}": value for key, value in layer.state_dict().items()}
    return state


def save_half(state: dict[str, Tensor], path: Path) -> None:
    """Floating tensors in fp16, to stay small; integer buffers as they are."""
    half = {k: v.detach().half() if v.is_floating_point() else v for k, v in state.items()}
    save_file({k: v.contiguous() for k, v in half.items()}, path)


def write_pickscore(folder: Path, model: CLIPModel, tokenizer: Any) -> None:
    """A CLIPModel folder with tokenizer and preprocessor, as `yuvalkirstain/PickScore_v1` is laid out."""
    side = model.config.vision_config.image_size
    model.half().save_pretrained(folder)
    save_clip(tokenizer, folder)
    size = {"height": side, "width": side}
    settings = {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": side}, "crop_size": size}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings, indent=2))


def write_hpsv2(folder: Path, model: CLIPModel, tokenizer: Any) -> None:
    """An open_clip folder: open_clip_config.json, open_clip_model.safetensors and a CLIP tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    save_clip(tokenizer, folder)
    save_half(open_clip_state(model), folder / "open_clip_model.safetensors")
    vision, text = model.config.vision_config, model.config.text_config
    architecture = {
        "embed_dim": model.config.projection_dim,
        "quick_gelu": vision.hidden_act == "quick_gelu",
        "vision_cfg": _tower(vision)
        | {
            "image_size": vision.image_size,
            "patch_size": vision.patch_size,
            "head_width": vision.hidden_size // vision.num_attention_heads,
        },
        "text_cfg": _tower(text)
        | {
            "context_length": text.max_position_embeddings,
            "vocab_size": text.vocab_size,
            "heads": text.num_attention_heads,
        },
    }
    settings = {"model_cfg": architecture, "preprocess_cfg": {}}
    (folder / "open_clip_config.json").write_text(json.dumps(settings, indent=2))


def _tower(config: Any) -> dict[str, Any]:
    ratio = config.intermediate_size / config.hidden_size
    return {"layers": config.num_hidden_layers, "width": config.hidden_size, "mlp_ratio": ratio}


def write_image_reward(
    folder: Path, vision: BlipVisionModel, text: BlipTextModel, mlp: list[nn.Linear], tokenizer: Any
) -> None:
    """An ImageReward folder: ImageReward.safetensors, med_config.json and a BERT tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    save_half(image_reward_state(vision, text, mlp), folder / "ImageReward.safetensors")
    tokenizer.save_pretrained(folder)
    fields = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "max_position_embeddings",
        "layer_norm_eps",
        "pad_token_id",
    )
    med = {name: getattr(text.config, name) for name in fields}
    med["vision_config"] = {"num_attention_heads": vision.config.num_attention_heads}
    (folder / "med_config.json").write_text(json.dumps(med, indent=2))
