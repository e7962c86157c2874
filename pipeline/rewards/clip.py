"""Rewards from a CLIPModel folder: PickScore (Kirstain et al. 2023) and CLIP score (Hessel et al. 2021).

Both are a cosine of picture and prompt; HPSv2, which is shaped alike, shares the tokens and embeddings.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from torch import Tensor

from rats.pipeline.rewards.base import CheckpointReward
from rats.pipeline.rewards.preprocess import CLIP_MEAN, CLIP_STD, as_pil, resize_normalise
from rats.pipeline.weights.hashes import SMALL_FILES, read_json
from rats.pipeline.weights.hub import resolve
from rats.pipeline.weights.loading import load_state, load_tokenizer, quiet_loading, read_state, torch_device

VOCABULARY_FILES = ("tokenizer.json", "vocab.json", "vocab.txt")


class HubCommit(NamedTuple):
    """A hub repository at one commit."""

    repository: str
    commit: str


CLIP_L_14 = HubCommit("openai/clip-vit-large-patch14", "32bd64288804d66eefd0ccbe215aa642df71cc41")
CLIP_H_14 = HubCommit("laion/CLIP-ViT-H-14-laion2B-s32B-b79K", "1c2b8495b28150b8a4922ee1c8edee224c284c0c")


class ClipFolder(CheckpointReward):
    """A CLIPModel folder: weights, config.json, a tokenizer, and a preprocessor_config.json if mean and std differ."""

    checkpoints: ClassVar[tuple[str, ...]] = ("model.safetensors", "pytorch_model.bin")
    tokenizer_source: ClassVar[HubCommit] = CLIP_L_14
    """Where the tokenizer comes from if the folder has no vocabulary."""

    def __init__(self, path: Path, name: str | None = None, device: str = "cpu") -> None:
        """Loads the folder `path`, or that of the file `path`, in float32; its name is the adapter's if not given."""
        model_class, config_class, tokenizer_class = import_clip()
        self.name, self.fingerprint = name or self.adapter, self.identify(path)
        weights = self.weights(path)
        folder = weights.parent
        self.model = model_class(config_class.from_dict(read_json(folder / "config.json")))
        load_state(self.model, read_state(weights), weights)
        self.model.requires_grad_(False).eval().to(torch_device(device))
        self.tokenizer = open_tokenizer(tokenizer_class, folder, self.tokenizer_source)
        settings = folder / "preprocessor_config.json"
        self._settings = read_json(settings) if settings.is_file() else {}

    def cosine(self, images_B3HW: Tensor, prompts: list[str]) -> Tensor:
        """Cosine (B,), float32, of images in [0, 1] and their prompts; differentiable."""
        size = self.model.config.vision_config.image_size
        mean, std = self._settings.get("image_mean", CLIP_MEAN), self._settings.get("image_std", CLIP_STD)
        pixels = resize_normalise(images_B3HW.to(self.model.device), size, mean, std, overshoot=as_pil(size))
        return cosine(self.model, self.tokenizer, pixels, prompts)


def open_tokenizer(cls: Any, folder: Path, source: HubCommit) -> Any:
    """The tokenizer of `folder`, or the hub's at a fixed commit where the folder has no vocabulary of its own."""
    return load_tokenizer(cls, vocabulary(folder, source))


def vocabulary(folder: Path, source: HubCommit) -> Path:
    """The folder itself if it has a vocabulary, else the hub's. Raises ConfigError if that cannot be fetched."""
    if any((folder / name).is_file() for name in VOCABULARY_FILES):
        return folder
    return resolve(source.repository, source.commit, SMALL_FILES)


def import_clip() -> tuple[Any, Any, Any]:
    """Transformers' CLIPModel, CLIPConfig and CLIPTokenizer."""
    with quiet_loading():
        from transformers import CLIPConfig, CLIPModel, CLIPTokenizer
    return CLIPModel, CLIPConfig, CLIPTokenizer


def token_ids(tokenizer: Any, prompts: list[str], length: int, device: Any) -> Tensor:
    """Token ids (B, length), cut and padded. CLIP's text tower is causal, so it needs no mask."""
    tokens = tokenizer(prompts, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
    return tokens.input_ids.to(device)


def cosine(model: Any, tokenizer: Any, pixels_B3SS: Tensor, prompts: list[str]) -> Tensor:
    """Cosine (B,), float32, of each image's embedding with its own prompt's; differentiable in the pixels."""
    ids = token_ids(tokenizer, prompts, model.config.text_config.max_position_embeddings, pixels_B3SS.device)
    output = model(input_ids=ids, pixel_values=pixels_B3SS)
    return (output.image_embeds * output.text_embeds).sum(-1).float()


class Clip(ClipFolder):
    """100 cos(image, text): the number that tables print, without the floor at 0, where a gradient would end."""

    adapter, version = "clip", 1

    def score(self, images_B3HW: Tensor, prompts: list[str]) -> Tensor:
        """Scores (B,), float32, of images in [0, 1]; differentiable."""
        return 100 * self.cosine(images_B3HW, prompts)


class PickScore(ClipFolder):
    """exp(logit_scale) cos(image, text), PickScore's own formula and scale (about 20)."""

    adapter, version = "pickscore", 1
    tokenizer_source = CLIP_H_14

    def score(self, images_B3HW: Tensor, prompts: list[str]) -> Tensor:
        """Scores (B,), float32, of images in [0, 1]; differentiable."""
        return self.model.logit_scale.exp() * self.cosine(images_B3HW, prompts)
