"""Random weights, written by the official classes themselves, and what both of us make of a picture."""

from __future__ import annotations

import json
from contextlib import chdir
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rats.pipeline.rewards.official import _import_hpsv2, _importing
from rats.pipeline.rewards.open import open_reward
from rats.schemas.params import RewardParams
from tests.support.drawn import as_tensor, photograph

PROMPTS = ["a red fox, 4k, highly detailed", "An astronaut's horse & 2 moons in the style of Caf\u00e9 M\u00fcller"]

TINY_CLIP = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 64, "layers": 2, "width": 64, "head_width": 32, "patch_size": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2},
}
MED_CONFIG = {  # ImageReward's, BERT base that looks at pictures; `vocab_size` has its two added tokens
    "architectures": ["BertModel"],
    "attention_probs_dropout_prob": 0.1,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "hidden_size": 768,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "layer_norm_eps": 1e-12,
    "max_position_embeddings": 512,
    "model_type": "bert",
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "pad_token_id": 0,
    "type_vocab_size": 2,
    "vocab_size": 30524,
    "encoder_width": 768,
    "add_cross_attention": True,
}


def write_hpsv2(folder: Path, architecture: dict[str, Any] | None) -> Path:
    """A checkpoint in the published layout, in half precision; ViT-H-14 where no architecture is given."""
    with _importing("hpsv2"):
        package = _import_hpsv2()
    torch.manual_seed(0)
    if architecture:
        (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": architecture}))
    model = package.CLIP(**(architecture or package.get_model_config("ViT-H-14")))
    torch.save({"state_dict": model.half().state_dict(), "epoch": 1}, folder / "HPS_v2.1_compressed.pt")
    write_clip_vocabulary(folder)
    return folder


def write_clip_vocabulary(folder: Path) -> None:
    """CLIP's vocabulary in transformers' layout, from open_clip's, which is the official one."""
    from open_clip.tokenizer import SimpleTokenizer

    ours = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    official = SimpleTokenizer()
    vocabulary = {ours.get(token, token): number for token, number in official.encoder.items()}
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    merges = ["#version: 0.2", *(" ".join(pair) for pair in official.bpe_ranks)]
    (folder / "merges.txt").write_text("\n".join(merges) + "\n", encoding="utf-8")


def write_image_reward(folder: Path, layers: int) -> Path:
    """A checkpoint in the published layout with so many text layers; the class fixes the other sizes."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz0123456789&,'-"]
    words += [f"##{letter}" for letter in words[5:]]
    words += ["red", "fox", "highly", "detailed", "style", "moons", "in", "the", "of"]
    words += [f"[unused{number}]" for number in range(30522 - len(words))]
    (folder / "med_config.json").write_text(json.dumps(MED_CONFIG | {"num_hidden_layers": layers}))
    for place in (folder, folder / "bert-base-uncased"):
        place.mkdir(exist_ok=True)
        (place / "vocab.txt").write_text("\n".join(words) + "\n")
    with _importing("image-reward"):
        from ImageReward.ImageReward import ImageReward
    torch.manual_seed(0)
    with chdir(folder):
        model = ImageReward("med_config.json")
    for part in (part for part in model.mlp.modules() if isinstance(part, nn.Linear)):
        nn.init.normal_(part.weight, std=part.in_features**-0.5)  # as initialised upstream gradients are 1e-14
    torch.save(model.state_dict(), folder / "ImageReward.pt")
    return folder


class Answer(NamedTuple):
    """What a backend makes of two pictures at its own size, and of two real-sized ones."""

    scores: Tensor
    gradient: Tensor
    resized: Tensor


def compared(adapter: str, folder: Path, size: int) -> tuple[Answer, Answer]:
    """The official answer and ours; one network is in memory at a time."""
    official, ours = (answer(adapter, folder, backend, size) for backend in ("official", "transformers"))
    return official, ours


def answer(adapter: str, folder: Path, backend: str, size: int) -> Answer:
    """Scores and gradients at the pixels. A folder named bert-base-uncased in `folder` stands for the hub's."""
    with chdir(folder):
        reward = open_reward(RewardParams(name="it", adapter=adapter, path=str(folder), backend=backend))
    pixels = levels(2, size, size).requires_grad_()
    scores = reward.score(pixels, PROMPTS)
    (gradient,) = torch.autograd.grad(scores.sum(), pixels)
    with torch.no_grad():
        resized = reward.score(torch.cat([as_tensor(photograph(512, 775, seed)) for seed in (0, 1)]), PROMPTS)
    return Answer(scores.detach(), gradient, resized)


def levels(count: int, height: int, width: int) -> Tensor:
    """Pictures of 8-bit levels, as a file would hold them, white noise: the hardest for any resizing."""
    return torch.randint(256, (count, 3, height, width), generator=torch.Generator().manual_seed(1)) / 255
