"""Trains and writes the three rewards: which drawings, architecture and losers each has."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mini import formats, prompts, rewards
from mini.budget import Budget
from mini.concepts import CONCEPTS, STYLES
from mini.rewards import Drawing, Lesson
from mini.scorers import TEXT_LENGTH, BlipScorer, ClipScorer, clip_config
from mini.tokenizers import bert_tokenizer, clip_tokenizer
from mini.workplace import Workplace

KINDS = ("corruptions", "rivals", "captions")


@dataclass(frozen=True)
class Plan:
    """What sets one reward apart: architecture, tokenizer, seed, share of the drawings (0, 1 or 2), losers."""

    build: Callable[[Any], nn.Module]
    tokenizer: Callable[[list[str]], Any]
    seed: int
    share: int
    kind: str


def _clip(texts: list[str]) -> Any:
    return clip_tokenizer(texts, TEXT_LENGTH)


def _bert(texts: list[str]) -> Any:
    return bert_tokenizer(texts, 64)


def _small_patches(tokenizer: Any) -> nn.Module:
    return ClipScorer(clip_config(tokenizer, 64, 8, 128, 4, "quick_gelu"))


def _deep(tokenizer: Any) -> nn.Module:
    return ClipScorer(clip_config(tokenizer, 48, 6, 128, 5, "gelu"))


def _crossed(tokenizer: Any) -> nn.Module:
    return BlipScorer(tokenizer, 56, 7, 128, 4)


PLANS = {
    "pickscore": Plan(_small_patches, _clip, 21, 0, "corruptions"),
    "hpsv2": Plan(_deep, _clip, 22, 1, "rivals"),
    "image-reward": Plan(_crossed, _bert, 23, 2, "captions"),
}


def sees(share: int, concept: int, style: int) -> bool:
    """Whether the reward of this share learns from a drawing: each drawing is one reward's, each concept everyone's.

    So a reward knows a concept by one designer's hand and is a judge of the two others' styles.
    """
    return (concept + style) % len(STYLES) == share


@dataclass
class Library:
    """All drawings as `Drawing`s, captions as rows of `texts`."""

    place: Workplace
    losers: np.ndarray
    """(training concepts and further things, kinds, 64, 64, 3)"""

    def __post_init__(self) -> None:
        self.rows: dict[str, int] = {}
        drawn = [i for i, concept in enumerate(CONCEPTS) if concept.split == "train"]
        self.loser_of = {concept: row for row, concept in enumerate(drawn)}
        pairs = [(c, s) for c in range(len(CONCEPTS)) for s in range(len(STYLES))]
        self.ours = {pair: self._ours(*pair) for pair in pairs}
        further = [(i, s) for i in range(len(self.place.further_names)) for s in range(len(STYLES))]
        self.further = {pair: self._further(*pair) for pair in further}

    @property
    def texts(self) -> list[str]:
        """All captions, in the order of their rows."""
        return list(self.rows)

    def _captions(self, texts: list[str]) -> list[int]:
        return [self.rows.setdefault(text, len(self.rows)) for text in texts if text]

    def _ours(self, concept: int, style: int) -> Drawing:
        losers = self.losers[self.loser_of[concept]] if concept in self.loser_of else None
        captions = self._captions(prompts.captions_of(concept, style, self.place.keywords))
        return Drawing(concept, self.place.pictures[concept, style], captions, losers)

    def _further(self, index: int, style: int) -> Drawing:
        name, *styled = prompts.plain_captions(self.place.further_names[index])
        captions = self._captions([name, styled[style]])
        losers = self.losers[len(self.loser_of) + index]
        return Drawing(len(CONCEPTS) + index, self.place.further[index, style], captions, losers)

    def lesson(self, plan: Plan, tokens: Tensor) -> Lesson:
        """What one reward learns from; no two lessons share a drawing."""
        ours = [d for pair, d in self.ours.items() if sees(plan.share, *pair)]
        further = [d for (index, _), d in self.further.items() if index % len(PLANS) == plan.share]
        return Lesson(ours, further, tokens, plan.kind)

    def unseen(self, plan: Plan) -> list[Drawing]:
        """Drawings of our concepts by hands from which the reward doesn't know them."""
        return [d for pair, d in self.ours.items() if not sees(plan.share, *pair)]


def tokens_of(tokenizer: Any, texts: list[str]) -> Tensor:
    """(texts, TEXT_LENGTH) ids."""
    settings = {"padding": "max_length", "max_length": TEXT_LENGTH, "truncation": True, "return_tensors": "pt"}
    return tokenizer(texts, **settings).input_ids


def build(name: str, library: Library, budget: Budget) -> tuple[nn.Module, Any, dict]:
    """Trains one reward; returns it with its tokenizer and its figures on unseen drawings."""
    plan = PLANS[name]
    tokenizer, device = plan.tokenizer(library.texts), library.place.device
    lesson = library.lesson(plan, tokens_of(tokenizer, library.texts))

    def fit(path: Path, steps: int) -> nn.Module:
        torch.manual_seed(plan.seed)
        return rewards.train(plan.build(tokenizer), lesson, path, steps, plan.seed, device)

    net = fit(library.place.work / f"{name}.pt", budget.steps(name, fit))
    return net, tokenizer, figures_of(net, lesson, library.unseen(plan), tokenizer, device)


def figures_of(net: nn.Module, lesson: Lesson, unseen: list[Drawing], tokenizer: Any, device: str) -> dict[str, float]:
    """Pair accuracy by kind of loser and R@1 among all names, on drawings by hands that the reward doesn't know."""
    names = tokens_of(tokenizer, [prompts.named(c) for c in CONCEPTS])
    accuracies = {f"pairs_{kind}": rewards.pair_accuracy(net, lesson, unseen, kind, device) for kind in KINDS}
    parameters = sum(p.numel() for p in net.parameters())
    return {"parameters": parameters, "recall_at_1": rewards.retrieval(net, unseen, names, device), **accuracies}


def write(name: str, net: nn.Module, tokenizer: Any, folder: Path) -> None:
    """The checkpoint in its big sister's format, below `folder`."""
    net.cpu()
    if name == "image-reward":
        formats.write_image_reward(folder / name, net.vision, net.text, list(net.mlp), tokenizer)
        return
    net.clip.logit_scale.data.copy_(net.scale().log())
    writer = {"pickscore": formats.write_pickscore, "hpsv2": formats.write_hpsv2}[name]
    writer(folder / name, net.clip, tokenizer)


def build_all(place: Workplace, losers: np.ndarray, folder: Path, budget: Budget) -> None:
    """All three, and `figures.json` beside them."""
    library, report = Library(place, losers), {}
    for name in PLANS:
        net, tokenizer, report[name] = build(name, library, budget)
        write(name, net, tokenizer, folder)
        print(name, report[name], flush=True)
    (folder / "figures.json").write_text(json.dumps(report, indent=2) + "\n")
