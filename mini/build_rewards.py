"""Trains and writes the three rewards, and the judge's features of the real drawings."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from mini import formats, prompts, rewards, samples
from mini.concepts import CONCEPTS, STYLES
from mini.scorers import TEXT_LENGTH, BlipScorer, ClipScorer, clip_config
from mini.tokenizers import bert_tokenizer, clip_tokenizer
from rats.stages.measure.judge import Judge
from rats.stages.measure.kid import write_real


@dataclass(frozen=True)
class Plan:
    """What sets one reward apart: architecture, seed, the tenth of drawings it never sees, its variants."""

    build: Callable[[Any], nn.Module]
    tokenizer: Callable[[list[str]], Any]
    seed: int
    held_out: int
    variants: range
    steps: int


def _clip(texts: list[str]) -> Any:
    return clip_tokenizer(texts, TEXT_LENGTH)


def _bert(texts: list[str]) -> Any:
    return bert_tokenizer(texts, 64)


PLANS = {
    "pickscore": Plan(
        lambda t: ClipScorer(clip_config(t, 32, 4, 96, 4, "quick_gelu")), _clip, 21, 1, range(0, 16), 1600
    ),
    "hpsv2": Plan(lambda t: ClipScorer(clip_config(t, 48, 8, 128, 5, "gelu")), _clip, 22, 5, range(16, 32), 1600),
    "image-reward": Plan(lambda t: BlipScorer(t, 40, 5, 96, 4), _bert, 23, 8, range(32, 48), 4700),
}


def all_captions(keywords: dict[str, list[str]]) -> dict[tuple[int, int], list[str]]:
    """Captions of every drawing, the empty one left out."""
    pairs = [(c, s) for c in range(len(CONCEPTS)) for s in range(len(STYLES))]
    return {pair: [text for text in prompts.captions_of(*pair, keywords) if text] for pair in pairs}


def data_of(
    plan: Plan, pictures: np.ndarray, generated: np.ndarray, keywords: dict[str, list[str]], tokenizer: Any
) -> rewards.RewardData:
    """One reward's pictures and tokenized captions."""
    captions = all_captions(keywords)
    texts = sorted({text for texts in captions.values() for text in texts})
    rows = {text: i for i, text in enumerate(texts)}
    lists = {pair: [rows[text] for text in texts] for pair, texts in captions.items()}
    return rewards.RewardData(
        pictures, generated, texts, _tokens(tokenizer, texts), lists, plan.held_out, plan.variants
    )


def _tokens(tokenizer: Any, texts: list[str]) -> torch.Tensor:
    settings = {"padding": "max_length", "max_length": TEXT_LENGTH, "truncation": True, "return_tensors": "pt"}
    return tokenizer(texts, **settings).input_ids


def build(
    name: str, pictures: np.ndarray, generated: np.ndarray, keywords: dict[str, list[str]], work: Path, scale: float
) -> tuple[nn.Module, Any, dict[str, float]]:
    """Trains one reward; returns it with its tokenizer and its held-out figures."""
    plan = PLANS[name]
    texts = sorted({text for texts in all_captions(keywords).values() for text in texts})
    tokenizer = plan.tokenizer(texts)
    torch.manual_seed(plan.seed)
    net = plan.build(tokenizer)
    data = data_of(plan, pictures, generated, keywords, tokenizer)
    rewards.train(net, data, work / f"{name}.pt", int(plan.steps * scale), plan.seed)
    names = _tokens(tokenizer, [prompts.named(c) for c in CONCEPTS])
    figures = {
        "parameters": sum(p.numel() for p in net.parameters()),
        "held_out_pair_accuracy": rewards.pair_accuracy(net, data),
        "held_out_recall_at_1": rewards.retrieval(net, data, names),
    }
    return net, tokenizer, figures


def write(name: str, net: nn.Module, tokenizer: Any, folder: Path) -> None:
    """The checkpoint in its big sister's format, below `folder`."""
    if name == "image-reward":
        formats.write_image_reward(folder / name, net.vision, net.text, list(net.mlp), tokenizer)
        return
    net.clip.logit_scale.data.copy_(net.scale().log())
    writer = {"pickscore": formats.write_pickscore, "hpsv2": formats.write_hpsv2}[name]
    writer(folder / name, net.clip, tokenizer)


def build_all(
    pictures: np.ndarray, teacher_folder: Path, keywords: dict[str, list[str]], work: Path, assets: Path, scale: float
) -> None:
    """All three, with the losers that the half-trained teacher in `teacher_folder` draws (made once)."""
    path = work / "generated.npy"
    if not path.exists():
        np.save(path, samples.losers(samples.open_miniature(teacher_folder, scale=3.0)))
    report = {}
    for name in PLANS:
        net, tokenizer, report[name] = build(name, pictures, np.load(path), keywords, work, scale)
        write(name, net, tokenizer, assets / "rewards")
    (assets / "rewards" / "figures.json").write_text(json.dumps(report, indent=2) + "\n")


def write_judge(pictures: np.ndarray, path: Path, variants: int = 4) -> None:
    """The judge's features of the real drawings of all validation and test concepts."""
    judge, features, names = Judge(), [], []
    for index, concept in enumerate(CONCEPTS):
        if concept.split != "train":
            real = rewards.to_images(pictures[index, :, :variants].reshape(-1, *pictures.shape[3:]))
            features.append(judge.features(real).numpy())
            names += [concept.name] * len(real)
    write_real(path, np.concatenate(features), names)
