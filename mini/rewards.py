"""Training of the three miniature rewards, which share no drawing and no kind of loser.

All learn which caption belongs to a drawing. Besides, `pickscore` learns drawings over the same drawings spoiled
(`corruptions`), `hpsv2` over what other generators draw (`rivals`), and `image-reward` nothing of pictures.
None of them has seen a sample of the teacher or of a student. Half of the steps are made harder by one signed gradient
step against the reward itself (adversarial training, arXiv 1412.6572), which keeps its gradient from being noise.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mini.corruptions import spoil
from mini.resume import Saver, load_state

BATCH, PEAK = 48, 1e-3
REACH = 8 / 255
"""Of the step that makes a pair harder, a pixel."""


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
class Drawing:
    """One designer's drawing of one thing: its variants (V, 64, 64, 3) and the rows of its captions."""

    thing: int
    pictures: np.ndarray
    captions: list[int]
    losers: np.ndarray | None = None
    """Other generators' pictures of the thing, none for a test concept."""


@dataclass
class Lesson:
    """What one reward learns from: drawings of our concepts, of further things, and the kind of its losers."""

    ours: list[Drawing]
    further: list[Drawing]
    tokens: Tensor
    kind: str
    """corruptions | rivals | captions"""

    def pick(self, rng: np.random.Generator, size: int) -> list[Drawing]:
        """Half of our concepts, half of further things."""
        half = [self.ours[i] for i in rng.integers(len(self.ours), size=size // 2)]
        return half + [self.further[i] for i in rng.integers(len(self.further), size=size - len(half))]


@dataclass
class Pairs:
    """Winners and losers (B, 3, 64, 64), caption tokens (B, L), what is the same, and which rows have a loser."""

    won: Tensor
    lost: Tensor
    captions: Tensor
    same: Tensor
    valid: Tensor = field(default_factory=lambda: torch.ones(0))


def to_images(pictures: np.ndarray) -> Tensor:
    """uint8 (B, H, W, 3) to (B, 3, H, W) in [0, 1]."""
    return torch.from_numpy(np.moveaxis(pictures, -1, 1).astype(np.float32)) / 255


def jitter(x: Tensor, generator: torch.Generator) -> Tensor:
    """Mild shifts and brightness, so that a score does not hang on a pixel."""
    dy, dx = torch.randint(0, 9, (2,), generator=generator).tolist()
    x = F.pad(x, (4, 4, 4, 4), "replicate")[..., dy : dy + x.shape[-2], dx : dx + x.shape[-1]]
    gain = 1 + 0.1 * torch.randn(len(x), 1, 1, 1, generator=generator)
    return (x * gain + 0.02 * torch.randn(x.shape, generator=generator)).clamp(0, 1)


def some(pictures: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """One of several pictures."""
    return pictures[rng.integers(len(pictures))]


def losers_of(won: Tensor, drawings: list[Drawing], kind: str, rng: np.random.Generator, generator) -> Tensor:
    """The losing picture of each pair; a winner itself where there is none."""
    if kind == "corruptions":
        return spoil(won, generator)
    rivals = [None if d.losers is None else some(d.losers, rng) for d in drawings]
    return torch.stack([w if r is None else to_images(r[None])[0] for w, r in zip(won, rivals, strict=True)])


def draw(lesson: Lesson, drawings: list[Drawing], kind: str, rng: np.random.Generator, device: str) -> Pairs:
    """A batch of pairs of these drawings; for the kind "captions" no loser counts."""
    generator = torch.Generator().manual_seed(int(rng.integers(2**31)))
    won = to_images(np.stack([some(d.pictures, rng) for d in drawings]))
    lost = won if kind == "captions" else losers_of(won, drawings, kind, rng, generator)
    valid = torch.tensor([kind == "corruptions" or (kind == "rivals" and d.losers is not None) for d in drawings])
    rows = torch.tensor([int(rng.choice(d.captions)) for d in drawings])
    things = torch.tensor([d.thing for d in drawings])
    same = (things[:, None] == things) | (rows[:, None] == rows)
    parts = (jitter(won, generator), jitter(lost, generator), lesson.tokens[rows], same, valid)
    return Pairs(*(part.to(device) for part in parts))


def harden(net: Scorer, pairs: Pairs) -> Pairs:
    """One signed gradient step that makes winners look worse and losers better."""
    both = torch.cat([pairs.won, pairs.lost]).requires_grad_()
    scores = net.scores(net.features(both), pairs.captions.repeat(2, 1))
    won, lost = scores.chunk(2)
    direction = torch.autograd.grad(lost.sum() - won.sum(), both)[0].sign()
    reach = torch.rand(len(both), 1, 1, 1, device=both.device) * REACH
    hard_won, hard_lost = (both + reach * direction).detach().clamp(0, 1).chunk(2)
    return Pairs(hard_won, hard_lost, pairs.captions, pairs.same, pairs.valid)


def loss_of(net: Scorer, pairs: Pairs) -> Tensor:
    """Caption contrast on winners + Bradley-Terry on (winner, loser) under one caption."""
    best = net.features(pairs.won)
    loss = net.contrast(best, pairs.captions, pairs.same)
    if not pairs.valid.any():
        return loss
    margin = net.scores(best, pairs.captions) - net.scores(net.features(pairs.lost), pairs.captions)
    return loss + F.softplus(-margin)[pairs.valid].mean()


def learning_rate(step: int, steps: int) -> float:
    """Warm-up over 100 steps, constant, then linear to 2 % over the second half."""
    return PEAK * min(1, (step + 1) / 100) * min(1, max(0.02, 2 * (1 - step / steps)))


def train(net: nn.Module, lesson: Lesson, path: Path, steps: int, seed: int, device: str = "cpu") -> nn.Module:
    """Trains for `steps` over restarts; after the first fifth every second step is hardened."""
    net.to(device)
    optimizer = torch.optim.AdamW(net.parameters(), PEAK, betas=(0.9, 0.98), weight_decay=0.05)
    state, saver = load_state(path, net, optimizer), Saver(path, every=120)
    rng, start, mean = np.random.default_rng([seed, state["step"]]), time.time(), 0.0
    while state["step"] < steps:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(state["step"], steps)
        pairs = draw(lesson, lesson.pick(rng, BATCH), lesson.kind, rng, device)
        hard = state["step"] > 0.2 * steps and state["step"] % 2 == 0
        loss = loss_of(net, harden(net, pairs) if hard else pairs)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        state["step"] += 1
        if state["step"] % 50 == 0:
            mean += (loss.item() - mean) * (0.2 if mean else 1)
            print(
                f"{path.stem} step {state['step']} of {steps}, loss {mean:.3f}, {time.time() - start:.0f} s", flush=True
            )
        saver.offer(net, optimizer, state)
    saver.save(net, optimizer, state)
    return net.eval()


@torch.no_grad()
def pair_accuracy(
    net: Scorer, lesson: Lesson, unseen: list[Drawing], kind: str, device: str, rounds: int = 12
) -> float:
    """Share of pairs of unseen drawings that the drawing wins: over losers of a kind, or under another's caption."""
    rng, right = np.random.default_rng(5), []
    able = [d for d in unseen if kind != "rivals" or d.losers is not None]
    for _ in range(rounds):
        pairs = draw(lesson, [able[i] for i in rng.integers(len(able), size=64)], kind, rng, device)
        features = net.features(pairs.won)
        won = net.scores(features, pairs.captions)
        if kind == "captions":
            keep = ~pairs.same.diagonal(1).cpu()
            lost = net.scores(features, pairs.captions.roll(-1, 0))
            right.append((won > lost).cpu()[:-1][keep])
        else:
            right.append((won > net.scores(net.features(pairs.lost), pairs.captions)).cpu())
    return float(torch.cat(right).float().mean())


@torch.no_grad()
def retrieval(net: Scorer, unseen: list[Drawing], names: Tensor, device: str) -> float:
    """R@1 of the right name among all concepts (`names`: their tokens) for unseen drawings, one variant each."""
    hits, names = [], names.to(device)
    for drawing in unseen:
        features = net.features(to_images(drawing.pictures[:1]).to(device))
        scores = net.scores(features.expand(len(names), *features.shape[1:]), names)
        hits.append(int(scores.argmax()) == drawing.thing)
    return float(np.mean(hits))
