"""Our differentiable preprocessing against each package's own, at the sizes people draw at; `-s` prints docs' table."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from PIL import Image
from torch import Tensor

from rats.pipeline.rewards.official import _import_hpsv2, _importing
from rats.pipeline.rewards.preprocess import CLIP_MEAN, CLIP_STD, Fit, Overshoot, resize_normalise
from tests.support.drawn import as_tensor, photograph

SIZES = [(512, 512), (1024, 1024), (832, 480), (512, 775), (768, 1360), (225, 229), (160, 201), (224, 224)]
LEVEL = 1.0001 / 255


def hpsv2_s_own(size: int) -> Callable[[Image.Image], Tensor]:
    with _importing("hpsv2"):
        own: Callable[[Image.Image], Tensor] = _import_hpsv2().image_transform(size, False, resize_longest_max=True)
    return own


def image_reward_s_own(size: int) -> Callable[[Image.Image], Tensor]:
    with _importing("image-reward"):
        from ImageReward.ImageReward import _transform
    own: Callable[[Image.Image], Tensor] = _transform(size)
    return own


def openai_clip_s_own(size: int) -> Callable[[Image.Image], Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from clip.clip import _transform
    own: Callable[[Image.Image], Tensor] = _transform(size)
    return own


def transformers_own(size: int) -> Callable[[Image.Image], Tensor]:
    from transformers import CLIPImageProcessor

    processor = CLIPImageProcessor(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
    return lambda picture: processor(picture, return_tensors="pt").pixel_values[0]


OWN: dict[str, tuple[Callable[[int], Callable[[Image.Image], Tensor]], Fit, Overshoot]] = {
    "hpsv2": (hpsv2_s_own, "pad", "kept"),
    "image-reward": (image_reward_s_own, "crop-rounded", "rounded"),
    "aesthetic": (openai_clip_s_own, "crop-rounded", "rounded"),
    "pickscore, clip": (transformers_own, "crop", "rounded"),
}


@pytest.mark.parametrize("package", OWN)
def test_pixels_are_the_package_s_own(package: str) -> None:
    make, fit, overshoot = OWN[package]
    own, std = make(224), torch.tensor(CLIP_STD).view(3, 1, 1)
    for height, width in SIZES:
        if package == "hpsv2" and 224 in (height, width):
            continue  # the same picture
        picture = photograph(height, width)
        theirs = own(picture)
        ours = resize_normalise(as_tensor(picture), 224, CLIP_MEAN, CLIP_STD, fit, overshoot)[0]
        difference = (ours - theirs).abs() * std
        mean, largest = float(difference.mean()), 255 * float(difference.max())
        print(f"{package}: {height} x {width}: mean {mean:.1e}, largest {largest:.4f} / 255")
        assert theirs.shape == ours.shape and mean <= 1e-5 and largest <= 255 * LEVEL
