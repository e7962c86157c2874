"""Differentiable augmentation of pictures before a reward scores them, with random numbers for each sample."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class RandomDraws:
    """Random numbers for `total` samples, of which those from `start` on are used.

    All numbers are drawn even if only some are used, so that micro-batches and ranks do not change those of a sample.
    """

    generator: torch.Generator
    start: int = 0
    total: int | None = None

    def uniform(self, low: float, high: float, like: Tensor) -> Tensor:
        """(B,) for the images `like`. Drawn on the generator's device, so that the images' device does not matter."""
        values = torch.rand(self.total or len(like), generator=self.generator, device=self.generator.device)
        return (low + (high - low) * values[self.start : self.start + len(like)]).to(like)

    def one(self, low: float, high: float) -> float:
        """One number for all samples."""
        return float(low + (high - low) * torch.rand(1, generator=self.generator, device=self.generator.device))

    def normal(self, like: Tensor) -> Tensor:
        """Standard normal noise in the shape of `like`."""
        shape = (self.total or len(like), *like.shape[1:])
        values = torch.randn(shape, generator=self.generator, device=self.generator.device)
        return values[self.start : self.start + len(like)].to(like)


def augment(images_B3HW: Tensor, draws: RandomDraws, strength: float) -> Tensor:
    """Randomly moved, flipped, resampled, recoloured and noised images of the same shape, in [0, 1]; differentiable.

    It makes a reward harder to hack by patterns at one position, scale or brightness.
    `strength` in [0, 1] scales every range; at 0 the images come back as they are. All randomness is in `draws`.
    The frames of a video (B, K, 3, H, W) are moved and recoloured alike.
    """
    if strength == 0:
        return images_B3HW
    if images_B3HW.ndim == 5:
        frames_BK3HW = images_B3HW
        return augment(frames_BK3HW.flatten(1, 2), draws, strength).view_as(frames_BK3HW)
    moved = _move(images_B3HW, draws, strength)
    resampled = _resample(moved, draws, strength)
    recoloured = _recolour(resampled, draws, strength)
    return (recoloured + 0.03 * strength * draws.normal(recoloured)).clamp(0, 1)


def _move(images: Tensor, draws: RandomDraws, strength: float) -> Tensor:
    """Crop to 80 % or more, shift within 4 % beyond the crop's slack, rotate up to 6 degrees, flip half of them."""
    scale = draws.uniform(1 - 0.2 * strength, 1.0, images)
    angle = draws.uniform(-math.radians(6) * strength, math.radians(6) * strength, images)
    flip = 1 - 2 * (draws.uniform(0, 1, images) < 0.5 * strength).to(images)
    shifts = [draws.uniform(-1, 1, images) * (1 - scale + 0.08 * strength) for _ in range(2)]
    cos, sin = scale * torch.cos(angle), scale * torch.sin(angle)
    # the two rows of each sample's affine matrix
    across = torch.stack((flip * cos, -sin, shifts[0]), -1)
    down = torch.stack((flip * sin, cos, shifts[1]), -1)
    grid = F.affine_grid(torch.stack((across, down), 1), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="reflection", align_corners=False)


def _resample(images: Tensor, draws: RandomDraws, strength: float) -> Tensor:
    """Down to 60 % or more and back: one factor for the batch."""
    factor = draws.one(1 - 0.4 * strength, 1.0)
    height, width = images.shape[-2:]
    small = (max(1, round(height * factor)), max(1, round(width * factor)))
    shrunk = F.interpolate(images, small, mode="bilinear", antialias=True, align_corners=False)
    return F.interpolate(shrunk, (height, width), mode="bilinear", align_corners=False)


def _recolour(images: Tensor, draws: RandomDraws, strength: float) -> Tensor:
    """Brightness and contrast, up to 15 % each."""
    low, high = 1 - 0.15 * strength, 1 + 0.15 * strength
    shape = (-1, 1, 1, 1)  # one value a picture
    brightness = draws.uniform(low, high, images).view(shape)
    contrast = draws.uniform(low, high, images).view(shape)
    mean = images.mean((1, 2, 3), keepdim=True)
    return ((images - mean) * contrast + mean) * brightness
