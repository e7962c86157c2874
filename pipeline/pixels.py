"""Differentiable pixel work between a decoder and a reward: resizing, normalising, augmenting."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def resize_normalise(
    images_B3HW: Tensor, size: int, mean: Sequence[float], std: Sequence[float], clamp: bool = True
) -> Tensor:
    """(B, 3, size, size), float32: shortest edge to `size` (bicubic, antialiased), centre crop, normalise.

    `clamp` cuts bicubic overshoot to [0, 1] after each direction, as PIL does; packages that resize after ToTensor
    keep the overshoot.
    """
    pixels = _centre_crop(_resize_shortest(images_B3HW.float(), size, clamp), size)
    shape = (1, 3, 1, 1)
    return (pixels - pixels.new_tensor(mean).view(shape)) / pixels.new_tensor(std).view(shape)


def _resize_shortest(images: Tensor, size: int, clamp: bool) -> Tensor:
    """Both directions one after the other, the width first: PIL's order, which matters where it clamps between."""
    height, width = images.shape[-2:]
    shortest = min(height, width)
    if shortest == size:
        return images
    rows, columns = int(size * height / shortest), int(size * width / shortest)
    for target in ((height, columns), (rows, columns)):
        images = F.interpolate(images, target, mode="bicubic", antialias=True, align_corners=False)
        images = images.clamp(0, 1) if clamp else images
    return images


def _centre_crop(images: Tensor, size: int) -> Tensor:
    top, left = ((length - size) // 2 for length in images.shape[-2:])
    return images[..., top : top + size, left : left + size]


def augment(images_B3HW: Tensor, generator: torch.Generator, strength: float) -> Tensor:
    """Randomly moved, flipped, resampled, recoloured and noised images of the same shape, in [0, 1]; differentiable.

    A reward that is climbed through this is harder to hack by patterns that hold at one position, scale or level.
    `strength` in [0, 1] scales every range; at 0 the images come back as they are. All randomness is `generator`'s.
    """
    if strength == 0:
        return images_B3HW
    moved = _move(images_B3HW, generator, strength)
    resampled = _resample(moved, generator, strength)
    recoloured = _recolour(resampled, generator, strength)
    noise = torch.randn(recoloured.shape, generator=generator, device=generator.device).to(recoloured)
    return (recoloured + 0.03 * strength * noise).clamp(0, 1)


def _uniform(count: int, low: float, high: float, generator: torch.Generator, like: Tensor) -> Tensor:
    """`count` draws, made on the generator's device so that they do not depend on where the images are."""
    return (low + (high - low) * torch.rand(count, generator=generator, device=generator.device)).to(like)


def _move(images: Tensor, generator: torch.Generator, strength: float) -> Tensor:
    """Crop to 80 % or more, shift within 4 % beyond the crop's slack, turn up to 6 degrees, flip half of them."""
    count = len(images)
    scale = _uniform(count, 1 - 0.2 * strength, 1.0, generator, images)
    angle = _uniform(count, -math.radians(6) * strength, math.radians(6) * strength, generator, images)
    flip = 1 - 2 * (_uniform(count, 0, 1, generator, images) < 0.5 * strength).to(images)
    shifts = [_uniform(count, -1, 1, generator, images) * (1 - scale + 0.08 * strength) for _ in range(2)]
    cos, sin = scale * torch.cos(angle), scale * torch.sin(angle)
    rows = [torch.stack((flip * cos, -sin, shifts[0]), -1), torch.stack((flip * sin, cos, shifts[1]), -1)]
    grid = F.affine_grid(torch.stack(rows, 1), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="reflection", align_corners=False)


def _resample(images: Tensor, generator: torch.Generator, strength: float) -> Tensor:
    """Down to 60 % or more and back: one factor for the batch."""
    factor = float(_uniform(1, 1 - 0.4 * strength, 1.0, generator, images))
    height, width = images.shape[-2:]
    small = (max(1, round(height * factor)), max(1, round(width * factor)))
    shrunk = F.interpolate(images, small, mode="bilinear", antialias=True, align_corners=False)
    return F.interpolate(shrunk, (height, width), mode="bilinear", align_corners=False)


def _recolour(images: Tensor, generator: torch.Generator, strength: float) -> Tensor:
    """Brightness and contrast, up to 15 % each."""
    low, high, shape = 1 - 0.15 * strength, 1 + 0.15 * strength, (-1, 1, 1, 1)
    brightness = _uniform(len(images), low, high, generator, images).view(shape)
    contrast = _uniform(len(images), low, high, generator, images).view(shape)
    mean = images.mean((1, 2, 3), keepdim=True)
    return ((images - mean) * contrast + mean) * brightness
