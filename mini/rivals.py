"""Losers that are drawn: by a small generator of its own, by the autoencoder from noisy latents, and by blending.

The small generator learned the training concepts and the further things, on other variants, and is none of the
teacher's checkpoints. No validation or test concept is among what is drawn here.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor

from mini import flow, teacher, vae
from mini.budget import Budget
from mini.concepts import CONCEPTS, STYLES
from mini.pipelines import open_pipeline, sample
from mini.prompts import named, plain_captions
from mini.tokenizers import clip_tokenizer, t5_tokenizer
from mini.workplace import FURTHER_VARIANTS, Workplace, pack, tokenize

SAMPLED_AT = ((4, 1.0), (6, 3.0), (10, 1.0), (10, 3.0), (20, 3.0))
"""(Steps, guidance scale) of the small generator's samples."""

NOISES, BLENDS = (0.25, 0.5, 0.8), (0.3, 0.5)
"""Deviation of the noise on latents, of which 1 is the latents' own; shares of another drawing's latent."""


def things(place: Workplace) -> list[str]:
    """What rivals draw, as a prompt names it: the training concepts, then the further things."""
    ours = [named(c) for c in CONCEPTS if c.split == "train"]
    return ours + [plain_captions(name)[0] for name in place.further_names]


def drawings(place: Workplace) -> np.ndarray:
    """Their drawings, (things, styles, variants, 64, 64, 3)."""
    train = [i for i, concept in enumerate(CONCEPTS) if concept.split == "train"]
    return np.concatenate([place.pictures[train][:, :, -FURTHER_VARIANTS:], place.further])


def normalised(place: Workplace, model: AutoencoderKL, pictures_N: np.ndarray) -> Tensor:
    """Latents (N, 32, 8, 8) of mean 0 and deviation 1."""
    return (vae.encode(model, pictures_N).float() - model.config.shift_factor) * model.config.scaling_factor


def train(place: Workplace, budget: Budget, how: flow.Settings) -> Path:
    """Trains the small generator and writes it as a pipeline folder, which is returned."""
    folder = place.work / "rival"
    if folder.exists():
        return folder
    model_vae, pictures = place.load_vae(), drawings(place)
    latents = torch.stack([pack(normalised(place, model_vae, p)) for p in pictures.reshape(-1, *pictures.shape[2:])])
    captions = [caption for name in things(place) for caption in rival_captions(name)]
    texts = {text for texts in captions for text in texts}
    tokenizers = clip_tokenizer(texts, teacher.MAX_LENGTH), t5_tokenizer(texts)
    torch.manual_seed(31)
    table, latents = tokenize(captions, *tokenizers), latents.half().to(place.device)

    def fit(path: Path, steps: int) -> teacher.Miniature:
        network, schedule = teacher.Miniature(*tokenizers, teacher.RIVAL), flow.Schedule(steps * 4 // 5, 0, steps // 5)
        return flow.Training(network, latents, table, path, schedule, how).run()

    model = fit(place.work / "rival.pt", budget.steps("rival", fit))
    teacher.save_pipeline(folder, model.cpu(), model_vae.cpu(), *tokenizers)
    return folder


def rival_captions(name: str) -> list[list[str]]:
    """Ten captions for each style of a thing: its name, its name and style, nothing."""
    return [[name] * 5 + [f"{name}, {style} style"] * 4 + [""] for style in STYLES]


@torch.no_grad()
def decoded(model: AutoencoderKL, z: Tensor) -> np.ndarray:
    """Pictures of normalised latents, uint8 (N, 64, 64, 3)."""
    z = z / model.config.scaling_factor + model.config.shift_factor
    parts = [vae.to_pictures(model.decode(part.to(model.device)).sample) for part in z.split(64)]
    return np.concatenate(parts)


def spoiled(place: Workplace, model: AutoencoderKL, pictures_N: np.ndarray) -> list[np.ndarray]:
    """Round trips through noisy latents, and blends with another thing's latents."""
    z, generator = normalised(place, model, pictures_N), torch.Generator().manual_seed(32)
    noisy = [decoded(model, z + noise * torch.randn(z.shape, generator=generator)) for noise in NOISES]
    other = z[torch.randperm(len(z), generator=generator)]
    return noisy + [decoded(model, torch.lerp(z, other, share)) for share in BLENDS]


def losers(place: Workplace, folder: Path) -> np.ndarray:
    """All of them, (things, kinds, 64, 64, 3)."""
    pipe, names = open_pipeline(folder, place.device), things(place)
    drawn = [sample(pipe, names, steps, seed=33 + i, negative=scale) for i, (steps, scale) in enumerate(SAMPLED_AT)]
    return np.stack(drawn + spoiled(place, place.load_vae(), drawings(place)[:, 0, 0]), 1)
