"""What all stages of the build share: drawings, pictures, captions and latents, each made once and kept on disk."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, FluxPipeline
from torch import Tensor

from mini import data, prompts, teacher, vae
from mini.concepts import CONCEPTS, STYLES, is_held_out
from mini.flow import Captions
from mini.tokenizers import clip_tokenizer, t5_tokenizer

FURTHER_VARIANTS = 6


def seen_drawings() -> list[tuple[int, int]]:
    """The (concept, style) pairs that the teacher learns from."""
    return [(c, s) for c in range(len(CONCEPTS)) for s in range(len(STYLES)) if not is_held_out(c, s)]


def made_once(path: Path, make: Callable[[], np.ndarray]) -> np.ndarray:
    """An array from its file, read as it is used; made and written first if there is none."""
    if not path.exists():
        part = path.with_suffix(".part.npy")
        np.save(part, make())
        os.replace(part, path)
    return np.load(path, mmap_mode="r")


@dataclass
class Workplace:
    """A build's folders and machine."""

    work: Path
    drawings: Path | None = None
    """The file that `data.pack` wrote; without one the packages are fetched."""
    device: str = "cpu"
    processes: int = 1

    @cached_property
    def folders(self) -> dict[str, Path]:
        """The four packages, unpacked below `work`."""
        cache = self.work / "cache"
        return data.unpack(self.drawings, cache) if self.drawings else data.fetch(cache)

    @cached_property
    def pictures(self) -> np.ndarray:
        """All variants of our concepts, (concepts, styles, variants, 64, 64, 3) uint8."""

        def make() -> np.ndarray:
            drawings = data.load_drawings(self.folders, [c.label for c in CONCEPTS])
            return data.pictures(drawings, 7, data.VARIANTS, self.processes)

        return made_once(self.work / "pictures.npy", make)

    @property
    def flat_pictures(self) -> np.ndarray:
        """The same as one list, (N, 64, 64, 3)."""
        return self.pictures.reshape(-1, *self.pictures.shape[3:])

    @cached_property
    def further_names(self) -> list[str]:
        """Labels of the things that only rewards and the rival generator see."""
        return data.further_labels(self.folders)

    @cached_property
    def further(self) -> np.ndarray:
        """Their variants, as `pictures`."""

        def make() -> np.ndarray:
            drawings = data.load_drawings(self.folders, self.further_names)
            return data.pictures(drawings, 17, FURTHER_VARIANTS, self.processes)

        return made_once(self.work / "further.npy", make)

    @cached_property
    def keywords(self) -> dict[str, list[str]]:
        """Keyword prompts by concept name."""
        return prompts.keyword_prompts({k: e.get("tags", []) for k, e in data.load_labels(self.folders).items()})

    @cached_property
    def captions(self) -> list[list[str]]:
        """The captions of each drawing that the teacher sees."""
        return [prompts.captions_of(c, s, self.keywords) for c, s in seen_drawings()]

    @cached_property
    def tokenizers(self) -> tuple[Any, Any]:
        """The teacher's, CLIP's and T5's kind."""
        texts = {text for texts in self.captions for text in texts}
        return clip_tokenizer(texts, teacher.MAX_LENGTH), t5_tokenizer(texts)

    def load_vae(self, name: str = "vae") -> AutoencoderKL:
        """The trained autoencoder with its shift and scale, by which latents have mean 0 and deviation 1."""
        model = vae.build()
        model.load_state_dict(torch.load(self.work / f"{name}.pt", weights_only=True)["model"])
        saved = self._latents
        model.register_to_config(shift_factor=saved["shift"], scaling_factor=saved["scale"])
        return model.to(self.device).eval()

    @cached_property
    def _latents(self) -> dict[str, Any]:
        return torch.load(self.work / "latents.pt", weights_only=True)

    @property
    def latents(self) -> Tensor:
        """Normalised latents of the drawings that the teacher sees, (drawings, variants, 16, 128) in fp16."""
        return self._latents["latents"]

    def write_latents(self, model: AutoencoderKL) -> None:
        """Encodes and packs all that the teacher sees, unless that was done."""
        path = self.work / "latents.pt"
        if path.exists():
            return
        z = torch.stack([vae.encode(model, self.pictures[c, s]) for c, s in seen_drawings()]).float()
        shift, scale = z.mean().item(), 1 / z.std().item()
        packed = pack((z - shift) * scale).half()
        torch.save({"latents": packed, "shift": shift, "scale": scale}, path.with_suffix(".part"))
        os.replace(path.with_suffix(".part"), path)

    def teacher_captions(self) -> Captions:
        """Every different caption of the teacher once; each drawing's list points into them."""
        return tokenize(self.captions, *self.tokenizers)


def pack(z: Tensor) -> Tensor:
    """(..., 32, 8, 8) latents to FLUX's tokens (..., 16, 128)."""
    flat = z.flatten(0, -4)
    packed = FluxPipeline._pack_latents(flat, len(flat), vae.CHANNELS, vae.SIDE, vae.SIDE)
    return packed.reshape(*z.shape[:-3], *packed.shape[1:])


def tokenize(captions: list[list[str]], clip: Any, t5: Any) -> Captions:
    """Lists of captions, all of one length, as rows of the different ones."""
    texts = sorted({text for texts in captions for text in texts} | {""})
    rows = {text: i for i, text in enumerate(texts)}
    settings = {"padding": "max_length", "max_length": teacher.MAX_LENGTH, "truncation": True, "return_tensors": "pt"}
    choices = torch.tensor([[rows[text] for text in texts] for texts in captions])
    return Captions(clip(texts, **settings).input_ids, t5(texts, **settings).input_ids, choices, rows[""])
