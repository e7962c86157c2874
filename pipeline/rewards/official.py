"""`backend: official`: rewards in their own packages, by their authors' classes and preprocessing, for comparisons.

They pin older transformers and packages that our tests cannot use: install `rats[rewards]` in an environment of its
own. They preprocess one picture after the other, from 8 bits, on the CPU.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from rats.pipeline.rewards import hpsv2, image_reward
from rats.pipeline.rewards.base import CheckpointReward
from rats.pipeline.rewards.preprocess import CLIP_MEAN, CLIP_STD, resize_normalise
from rats.pipeline.weights.hashes import adapter_fingerprint
from rats.pipeline.weights.loading import load_state, quiet_imports, read_state, torch_device
from rats.schemas.errors import ConfigError, DataError, reason

INSTALL = "pip install 'rats[rewards]', in an environment of its own (docs/rewards.md)"
UNUSED = ("blip.vision_proj.", "blip.text_proj.", "blip.text_encoder.embeddings.position_ids")
"""Prefixes of ImageReward's tensors that its score does not use."""


def official_fingerprint(package: str, weights: Path) -> str:
    """Fingerprint of a reward in its own package: the package's version, torchvision's, and the files."""
    identity = f"{package}-official-{_version(package)}-torchvision-{_version('torchvision')}"
    return adapter_fingerprint(identity, 1, [weights], weights.parent)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        raise ConfigError(f"backend official needs the package {package!r}, which is not here: {INSTALL}") from None


@contextmanager
def _importing(package: str) -> Iterator[None]:
    """Imports a package that turns off warnings for the whole process, and restores them afterwards."""
    _version(package)
    try:
        with warnings.catch_warnings(), quiet_imports():
            warnings.simplefilter("ignore")
            yield
    except (ImportError, OSError, RuntimeError) as error:
        raise ConfigError(f"the package {package!r} cannot be used here ({reason(error)}): {INSTALL}") from error


def own_pixels(images_B3HW: Tensor, preprocess: Callable[[Image.Image], Tensor], ours_B3SS: Tensor) -> Tensor:
    """The package's preprocessing of each picture in 8 bits, with the gradient of our differentiable preprocessing."""
    levels = (images_B3HW.detach().clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    theirs = torch.stack([preprocess(Image.fromarray(picture)) for picture in levels]).to(ours_B3SS)
    return theirs + (ours_B3SS - ours_B3SS.detach())


class OfficialHPSv2(CheckpointReward):
    """The cosine that `hpsv2.score` prints, in float32 and a batch at a time."""

    checkpoints = hpsv2.HPSv2.checkpoints

    @classmethod
    def identify(cls, path: Path) -> str:
        """The reward's fingerprint, without loading it."""
        return official_fingerprint("hpsv2", cls.weights(path))

    def __init__(self, path: Path, name: str = "hpsv2", device: str = "cpu") -> None:
        """Loads `path` as `HPSv2` does."""
        weights = self.weights(path)
        self.name, self.fingerprint = name, self.identify(path)
        with _importing("hpsv2"):
            package = _import_hpsv2()
        config = hpsv2.open_clip_config(weights.parent)
        self.model = package.CLIP(**config["model_cfg"], output_dict=True)
        load_state(self.model, read_state(weights), weights)
        self.model.requires_grad_(False).eval().to(torch_device(device))
        settings = config.get("preprocess_cfg", {})
        self.mean, self.std = settings.get("mean", CLIP_MEAN), settings.get("std", CLIP_STD)
        self.size = config["model_cfg"]["vision_cfg"]["image_size"]
        self.length = config["model_cfg"]["text_cfg"]["context_length"]
        # `resize_longest_max` is what hpsv2.score gets by asking for `light_augmentation`
        self.preprocess = package.image_transform(self.size, False, self.mean, self.std, resize_longest_max=True)
        self.tokenize = package.tokenize

    def score(self, images_B3HW: Tensor, prompts: list[str]) -> Tensor:
        """Scores (B,), float32, of images in [0, 1]; differentiable."""
        images = images_B3HW.to(self.model.logit_scale.device)
        ours = resize_normalise(images, self.size, self.mean, self.std, fit="pad", overshoot="kept")
        ids = self.tokenize(prompts, self.length).to(images.device)
        output = self.model(own_pixels(images, self.preprocess, ours), ids)
        return (output["image_features"] * output["text_features"]).sum(-1).float()


def _import_hpsv2() -> Any:
    """hpsv2's copy of open_clip. Its wheel lacks the vocabulary, which open_clip's own tokenizer, the same, has."""
    folder = Path(str(import_module("hpsv2").__file__)).parent / "src" / "open_clip"
    if not (folder / "bpe_simple_vocab_16e6.txt.gz").is_file():
        sys.modules["hpsv2.src.open_clip.tokenizer"] = import_module("open_clip.tokenizer")
    return import_module("hpsv2.src.open_clip")


class OfficialImageReward(CheckpointReward):
    """`ImageReward.score_gard`. The package takes its tokenizer, bert-base-uncased, from the hub by itself."""

    checkpoints = image_reward.ImageReward.checkpoints

    @classmethod
    def identify(cls, path: Path) -> str:
        """The reward's fingerprint, without loading it."""
        return official_fingerprint("image-reward", cls.weights(path))

    def __init__(self, path: Path, name: str = "image-reward", device: str = "cpu") -> None:
        """Loads `path` as `ImageReward` does; the class fixes all sizes but those of med_config.json."""
        weights = self.weights(path)
        self.name, self.fingerprint = name, self.identify(path)
        self.device = torch_device(device)
        with _importing("image-reward"):
            package = import_module("ImageReward.ImageReward")
            self.model = package.ImageReward(str(weights.parent / "med_config.json"), self.device)
        missing = self.model.load_state_dict(read_state(weights), strict=False).missing_keys
        if missing := [key for key in missing if not key.startswith(UNUSED)]:
            raise DataError(
                f"{weights} lacks {len(missing)} weights, {missing[0]} first: it is no ImageReward checkpoint"
            )
        self.model.requires_grad_(False).eval().to(self.device)

    def score(self, images_B3HW: Tensor, prompts: list[str]) -> Tensor:
        """Scores (B,), float32, of images in [0, 1]; differentiable."""
        images, length = images_B3HW.to(self.device), image_reward.LENGTH
        ours = resize_normalise(images, image_reward.SIZE, CLIP_MEAN, CLIP_STD, fit="crop-rounded", overshoot="rounded")
        pixels = own_pixels(images, self.model.preprocess, ours)
        tokens = self.model.blip.tokenizer(
            prompts, padding="max_length", truncation=True, max_length=length, return_tensors="pt"
        ).to(self.device)
        scores_B1: Tensor = self.model.score_gard(tokens.input_ids, tokens.attention_mask, pixels)
        return scores_B1[:, 0].float()
