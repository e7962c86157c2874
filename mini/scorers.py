"""The three architectures of the miniature rewards, each in the format of its big sister."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BlipTextConfig, BlipVisionConfig, CLIPConfig, CLIPModel
from transformers.models.blip.modeling_blip import BlipVisionModel
from transformers.models.blip.modeling_blip_text import BlipTextModel

MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
TEXT_LENGTH = 12
"""Tokens of the longest caption that a reward learns from."""


def normalise(images_B3HW: Tensor, size: int) -> Tensor:
    """What the adapters do: antialiased bicubic resize, CLIP's mean and deviation."""
    if images_B3HW.shape[-1] != size:
        images_B3HW = F.interpolate(images_B3HW, size=(size, size), mode="bicubic", antialias=True, align_corners=False)
    return (images_B3HW - MEAN.to(images_B3HW)) / STD.to(images_B3HW)


def info_nce(logits_BB: Tensor, same_BB: Tensor) -> Tensor:
    """Symmetric cross entropy of the diagonal (CLIP, arXiv 2103.00020), equals masked."""
    own = torch.eye(len(logits_BB), dtype=torch.bool, device=logits_BB.device)
    logits_BB = logits_BB.masked_fill(same_BB & ~own, -1e4)
    target = torch.arange(len(logits_BB), device=logits_BB.device)
    return (F.cross_entropy(logits_BB, target) + F.cross_entropy(logits_BB.T, target)) / 2


def clip_config(tokenizer, size: int, patch: int, width: int, layers: int, act: str) -> CLIPConfig:
    """A small CLIP: a ViT over `size` pixels and a causal text transformer of two layers."""
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 96,
        "intermediate_size": 384,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "max_position_embeddings": TEXT_LENGTH,
        "hidden_act": act,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "image_size": size,
        "patch_size": patch,
        "hidden_act": act,
    }
    return CLIPConfig(text_config=text, vision_config=vision, projection_dim=96)


class ClipScorer(nn.Module):
    """`pickscore` and `hpsv2`: the cosine of picture and caption times a learned scale."""

    def __init__(self, config: CLIPConfig):
        super().__init__()
        self.clip = CLIPModel(config)
        self.size = config.vision_config.image_size

    def features(self, images_B3HW: Tensor) -> Tensor:
        """Unit picture embeddings (B, D)."""
        output = self.clip.vision_model(pixel_values=normalise(images_B3HW, self.size))
        return F.normalize(self.clip.visual_projection(output.pooler_output), dim=-1)

    def texts(self, captions: Tensor) -> Tensor:
        """Unit caption embeddings (B, D)."""
        output = self.clip.text_model(input_ids=captions)
        return F.normalize(self.clip.text_projection(output.pooler_output), dim=-1)

    def scale(self) -> Tensor:
        """exp(logit_scale), at most 50."""
        return self.clip.logit_scale.exp().clamp(max=50)

    def scores(self, features: Tensor, captions: Tensor) -> Tensor:
        """(B,) scaled cosines."""
        return self.scale() * (features * self.texts(captions)).sum(-1)

    def contrast(self, features: Tensor, captions: Tensor, same_BB: Tensor) -> Tensor:
        """Symmetric InfoNCE (CLIP, arXiv 2103.00020), equals masked."""
        return info_nce(self.scale() * features @ self.texts(captions).T, same_BB)


class BlipScorer(nn.Module):
    """`image-reward`: a caption encoder that looks at the picture, and an MLP on its first token."""

    def __init__(self, tokenizer, size: int, patch: int, width: int, layers: int):
        super().__init__()
        vision = BlipVisionConfig(
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=layers,
            num_attention_heads=4,
            image_size=size,
            patch_size=patch,
            layer_norm_eps=1e-6,
        )
        text = BlipTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=96,
            encoder_hidden_size=width,
            intermediate_size=384,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=64,
            is_decoder=True,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.cls_token_id,
            sep_token_id=tokenizer.sep_token_id,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
        self.vision = BlipVisionModel(vision)
        self.text = BlipTextModel(text, add_pooling_layer=False)
        self.mlp = nn.Sequential(
            nn.Linear(96, 96), nn.Linear(96, 48), nn.Linear(48, 24), nn.Linear(24, 12), nn.Linear(12, 1)
        )
        # Two heads for training alone: BLIP's contrast of both towers, which teaches names far sooner than pairs do.
        self.vision_head, self.text_head = nn.Linear(width, 96), nn.Linear(96, 96)
        self.size, self.pad = size, tokenizer.pad_token_id

    def features(self, images_B3HW: Tensor) -> Tensor:
        """Picture tokens (B, 1 + patches, D)."""
        return self.vision(pixel_values=normalise(images_B3HW, self.size)).last_hidden_state

    def scores(self, features: Tensor, captions: Tensor) -> Tensor:
        """(B,) rewards in logits."""
        hidden = self.text(
            input_ids=captions,
            attention_mask=(captions != self.pad).long(),
            encoder_hidden_states=features,
            encoder_attention_mask=torch.ones(features.shape[:2], dtype=torch.long, device=features.device),
            is_decoder=False,
        ).last_hidden_state
        return self.mlp(hidden[:, 0])[:, 0]

    def contrast(self, features: Tensor, captions: Tensor, same_BB: Tensor) -> Tensor:
        """Own caption over three others of the batch (softmax over four) + both towers' contrast."""
        own, terms = self.scores(features, captions), []
        rows = torch.arange(len(captions), device=captions.device)
        for shift in (1, 2, 3):
            other = self.scores(features, captions.roll(shift, 0))
            terms.append(other.masked_fill(same_BB[rows, rows.roll(shift)], -1e4))
        pairs = F.cross_entropy(torch.stack([own, *terms], 1), torch.zeros_like(rows))
        return pairs + self.towers(features, captions, same_BB)

    def towers(self, features: Tensor, captions: Tensor, same_BB: Tensor) -> Tensor:
        """Symmetric InfoNCE of picture and caption, each alone (image-text contrast, BLIP, arXiv 2201.12086)."""
        hidden = self.text(input_ids=captions, attention_mask=(captions != self.pad).long(), is_decoder=False)
        pictures = F.normalize(self.vision_head(features[:, 0]), dim=-1)
        return info_nce(20 * pictures @ F.normalize(self.text_head(hidden.last_hidden_state[:, 0]), dim=-1).T, same_BB)
