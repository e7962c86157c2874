"""Differentiable pixel work between a decoder and a reward: resizing, normalising, augmenting."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch.nn.functional as F
from torch import Tensor

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


Fit = Literal["crop", "crop-rounded", "pad"]
"""How a picture becomes square. "crop" cuts out the centre as transformers does. "crop-rounded" does so as torchvision,
which rounds half a pixel to even and not down. "pad" scales the longest edge to the size and fills up with black."""


Overshoot = Literal["kept", "cut", "rounded"]
"""What follows the resizing of each direction: nothing, clamping to [0, 1], or PIL's rounding to 8 bits too."""

PUBLISHED = 224
"""Side of the published checkpoints' pictures in pixels. From this size on, the packages resize by PIL."""


def as_pil(size: int) -> Overshoot:
    """PIL's rounding for checkpoints of the published size. Smaller ones are trained and scored without it."""
    return "rounded" if size >= PUBLISHED else "cut"


def resize_normalise(
    images_B3HW: Tensor,
    size: int,
    mean: Sequence[float],
    std: Sequence[float],
    fit: Fit = "crop",
    overshoot: Overshoot = "cut",
) -> Tensor:
    """(B, 3, size, size), float32, differentiable: bicubic with antialiasing, made square, normalised.

    Rounding passes the gradient on unchanged.
    """
    images = images_B3HW.float()
    height, width = images.shape[-2:]
    if fit == "pad":
        scale = size / max(height, width)
        pixels = _pad(_resize(images, round(height * scale), round(width * scale), overshoot), size)
    else:
        shortest = min(height, width)
        resized = _resize(images, int(size * height / shortest), int(size * width / shortest), overshoot)
        pixels = _centre_crop(resized, size, round if fit == "crop-rounded" else math.floor)
    shape = (1, 3, 1, 1)
    return (pixels - pixels.new_tensor(mean).view(shape)) / pixels.new_tensor(std).view(shape)


def _resize(images: Tensor, rows: int, columns: int, overshoot: Overshoot) -> Tensor:
    """Resizes the width, then the height: PIL's order, which matters if values are clamped in between."""
    height, width = images.shape[-2:]
    if (height, width) == (rows, columns):
        return images
    for target in ((height, columns), (rows, columns)):
        images = F.interpolate(images, target, mode="bicubic", antialias=True, align_corners=False)
        images = images if overshoot == "kept" else images.clamp(0, 1)
        images = _to_8_bits(images) if overshoot == "rounded" else images
    return images


def _to_8_bits(images: Tensor) -> Tensor:
    """The images rounded to 8 bits, with the gradient of the unrounded ones."""
    return images + ((images * 255).round() / 255 - images).detach()


def _centre_crop(images: Tensor, size: int, to_integer: Callable[[float], int]) -> Tensor:
    top, left = (to_integer((length - size) / 2) for length in images.shape[-2:])
    return images[..., top : top + size, left : left + size]


def _pad(images: Tensor, size: int) -> Tensor:
    top, left = ((size - length) // 2 for length in images.shape[-2:])
    rows, columns = images.shape[-2:]
    return F.pad(images, (left, size - columns - left, top, size - rows - top))
