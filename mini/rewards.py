"""Training of the three miniature rewards on preference pairs that know nothing of any student.

A winner is a designer's drawing with its caption. Losers are the same drawing spoiled (`corruptions`), a sample
of the half-trained teacher for the same concept (`generated`; many-step over few-step pairs are in none of the
three), and the drawing under another caption. Half of the pairs are made harder by one signed gradient step
against the reward itself (adversarial training, arXiv 1412.6572), which is what keeps its gradient from being
noise. The three differ in architecture, seed, variants and held-out drawings.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mini.concepts import CONCEPTS, STYLES
from mini.corruptions import spoil
from mini.resume import load_state, save_state


class Scorer(Protocol):
    """A reward in training: features of pictures, then scores of (picture, caption) pairs."""

    def features(self, images_B3HW: Tensor) -> Tensor:
        """Whatever of the picture does not depend on the caption."""
        ...

    def scores(self, features: Tensor, captions: Tensor) -> Tensor:
        """(B,) scores in logits."""
        ...

    def contrast(self, features: Tensor, captions: Tensor, same_BB: Tensor) -> Tensor:
        """A loss that tells the own caption from the batch's others; `same_BB` masks equals."""
        ...


@dataclass
class RewardData:
    """Pictures (concepts, styles, variants, 32, 32, 3) uint8, generated ones (concepts, n, ...), captions."""

    pictures: np.ndarray
    generated: np.ndarray
    texts: list[str]
    tokens: Tensor
    captions: dict[tuple[int, int], list[int]]
    held_out: int
    variants: range

    def is_held_out(self, concept: int, style: int) -> bool:
        """A tenth of the drawings, another tenth for each reward."""
        return (concept * 3 + style * 7) % 10 == self.held_out

    def drawings(self, held_out: bool) -> list[tuple[int, int]]:
        """(concept, style) pairs of the training or the held-out part."""
        pairs = [(c, s) for c in range(len(CONCEPTS)) for s in range(len(STYLES))]
        return [pair for pair in pairs if self.is_held_out(*pair) == held_out]


def to_images(pictures: np.ndarray) -> Tensor:
    """uint8 (B, H, W, 3) to (B, 3, H, W) in [0, 1]."""
    return torch.from_numpy(np.moveaxis(pictures, -1, 1).astype(np.float32)) / 255


def jitter(x: Tensor, generator: torch.Generator) -> Tensor:
    """Mild shifts and brightness, so that a score does not hang on a pixel."""
    dy, dx = torch.randint(-2, 3, (2,), generator=generator).tolist()
    x = F.pad(x, (2, 2, 2, 2), "replicate")[..., 2 + dy : 34 + dy, 2 + dx : 34 + dx]
    gain = 1 + 0.1 * torch.randn(len(x), 1, 1, 1, generator=generator)
    return (x * gain + 0.02 * torch.randn(x.shape, generator=generator)).clamp(0, 1)


Batch = tuple[Tensor, Tensor, Tensor, Tensor]
"""Winners, losers (B, 3, 32, 32), caption rows (B,), concepts (B,)."""


def batches(data: RewardData, size: int, generator: torch.Generator, held_out: bool = False) -> Iterator[Batch]:
    """Endless pairs; three tenths of the losers are generated."""
    rng = np.random.default_rng(int(torch.randint(2**31, (1,), generator=generator)))
    pairs = data.drawings(held_out)
    while True:
        picked = [pairs[i] for i in rng.integers(len(pairs), size=size)]
        won = to_images(np.stack([data.pictures[c, s, rng.choice(data.variants)] for c, s in picked]))
        lost = spoil(won, generator)
        k = size * 3 // 10
        samples = [data.generated[c, rng.integers(data.generated.shape[1])] for c, _ in picked[:k]]
        lost[:k] = to_images(np.stack(samples))
        rows = torch.tensor([int(rng.choice(data.captions[pair])) for pair in picked])
        yield jitter(won, generator), jitter(lost, generator), rows, torch.tensor([c for c, _ in picked])


def harden(
    net: Scorer, won: Tensor, lost: Tensor, captions: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """One signed gradient step of up to 8/255 that makes winners look worse and losers better."""
    both = torch.cat([won, lost]).requires_grad_()
    sign = torch.cat([-torch.ones(len(won)), torch.ones(len(lost))])
    total = (net.scores(net.features(both), captions.repeat(2, 1)) * sign).sum()
    direction = torch.autograd.grad(total, both)[0].sign()
    reach = torch.rand(len(both), 1, 1, 1, generator=generator) * 8 / 255
    return (both + reach * direction).detach().clamp(0, 1).chunk(2)


def loss_of(net: Scorer, data: RewardData, batch: Batch, hard: bool, generator: torch.Generator) -> Tensor:
    """Caption contrast on winners + Bradley-Terry on (winner, loser) under one caption."""
    won, lost, rows, concepts = batch
    captions = data.tokens[rows]
    if hard:
        won, lost = harden(net, won, lost, captions, generator)
    features = net.features(torch.cat([won, lost]))
    best = features[: len(won)]
    margin = net.scores(best, captions) - net.scores(features[len(won) :], captions)
    same = (concepts[:, None] == concepts) | (rows[:, None] == rows)
    return F.softplus(-margin).mean() + net.contrast(best, captions, same)


def train(net: nn.Module, data: RewardData, path: Path, steps: int, seed: int, batch: int = 32) -> nn.Module:
    """Trains for `steps` over restarts; after the first fifth every second step is hardened."""
    optimizer = torch.optim.AdamW(net.parameters(), 1e-3, betas=(0.9, 0.98), weight_decay=0.05)
    state = load_state(path, net, optimizer)
    generator = torch.Generator().manual_seed(seed + state["step"])
    stream, running = batches(data, batch, generator), 2.0
    while state["step"] < steps:
        start, fraction = time.time(), state["step"] / steps
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min(1, (state["step"] + 1) / 100) * min(1, max(0.02, 2 * (1 - fraction)))
        hard = fraction > 0.2 and state["step"] % 2 == 0
        loss = loss_of(net, data, next(stream), hard, generator)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        running += 0.02 * (loss.item() - running)
        state["step"] += 1
        state["seconds"] += time.time() - start
        if state["step"] % 100 == 0:
            print(
                f"{path.stem} step {state['step']} loss {running:.3f} of {steps}, {state['seconds']:.0f} s", flush=True
            )
            save_state(path, net, optimizer, state)
    save_state(path, net, optimizer, state)
    return net.eval()


@torch.no_grad()
def pair_accuracy(net: Scorer, data: RewardData, seed: int = 5, count: int = 16) -> float:
    """Share of held-out pairs (unseen drawings) in which the drawing beats the spoiled or generated one."""
    generator = torch.Generator().manual_seed(seed)
    stream, right = batches(data, 64, generator, held_out=True), []
    for _ in range(count):
        won, lost, rows, _ = next(stream)
        captions = data.tokens[rows]
        right.append(net.scores(net.features(won), captions) > net.scores(net.features(lost), captions))
    return float(torch.cat(right).float().mean())


@torch.no_grad()
def retrieval(net: Scorer, data: RewardData, names: Tensor) -> float:
    """R@1 of the right name among all concepts (`names`: their tokens) for unseen drawings, one variant each."""
    hits = []
    for concept, style in data.drawings(held_out=True):
        picture = to_images(data.pictures[concept, style, data.variants[0]][None])
        features = net.features(picture.expand(len(names), -1, -1, -1))
        hits.append(int(net.scores(features, names).argmax()) == concept)
    return float(np.mean(hits))
