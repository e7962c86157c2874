"""Preprocessing in differentiable torch against PIL's, which the reward packages use, at the sizes people draw at."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from rats.pipeline.rewards.preprocess import Fit, Overshoot, resize_normalise
from tests.support.drawn import as_tensor, photograph

SIZES = [(512, 512), (1024, 1024), (480, 832), (768, 512), (225, 229), (160, 201), (224, 224)]
"""Squares, wide and high ones, odd slacks beside the crop, and one that is enlarged."""


LEVEL = 1.0001 / 255
"""Where a value lies between two levels, float32 and PIL's integers may take different ones."""


def apart(ours: Tensor, theirs: Tensor) -> tuple[float, float]:
    """Mean and largest difference."""
    difference = (ours - theirs).abs()
    return float(difference.mean()), float(difference.max())


def plain(images: Tensor, size: int, fit: Fit, overshoot: Overshoot = "rounded") -> Tensor:
    return resize_normalise(images, size, (0, 0, 0), (1, 1, 1), fit, overshoot)


def resized_by_pil(picture: Image.Image, size: int) -> Image.Image:
    """The shortest edge to `size`, as CLIPImageProcessor and torchvision both have it."""
    scaled = (int(size * length / min(picture.size)) for length in picture.size)
    return picture.resize(tuple(scaled), Image.Resampling.BICUBIC)


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_drawn_pictures_come_out_as_pil_resizes_them(height: int, width: int) -> None:
    picture = photograph(height, width)
    theirs = resized_by_pil(picture, 224)
    left, top = ((length - 224) // 2 for length in theirs.size)
    rounded_left, rounded_top = (round((length - 224) / 2) for length in theirs.size)
    ours = as_tensor(picture)
    pairs: list[tuple[Fit, int, int]] = [("crop", left, top), ("crop-rounded", rounded_left, rounded_top)]
    for fit, x, y in pairs:
        mean, largest = apart(plain(ours, 224, fit), as_tensor(theirs.crop((x, y, x + 224, y + 224))))
        assert mean <= 1e-5 and largest <= LEVEL


def test_the_two_crops_differ_where_half_the_slack_is_odd() -> None:
    picture = as_tensor(photograph(224, 227))
    assert torch.equal(plain(picture, 224, "crop"), picture[..., 1:225])
    assert torch.equal(plain(picture, 224, "crop-rounded"), picture[..., 2:226])


@pytest.mark.parametrize(("height", "width", "inside"), [(480, 832, (47, 0, 129, 224)), (768, 512, (0, 37, 224, 149))])
def test_padding_keeps_the_whole_picture_and_is_black_before_normalising(
    height: int, width: int, inside: tuple[int, int, int, int]
) -> None:
    picture, (top, left, rows, columns) = as_tensor(photograph(height, width)), inside
    squared = plain(picture, 224, "pad", overshoot="kept")
    middle = squared[..., top : top + rows, left : left + columns]
    expected = F.interpolate(picture, (rows, columns), mode="bicubic", antialias=True)
    torch.testing.assert_close(middle, expected, atol=1e-6, rtol=0)
    assert float(middle.max()) > 1  # overshoot is kept
    outside = squared.clone()
    outside[..., top : top + rows, left : left + columns] = 0
    assert not outside.any()
    normalised = resize_normalise(picture, 224, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "pad", overshoot="kept")
    assert float(normalised[0, 0, 0 if top else 100, 0 if left else 100]) == -1


@pytest.mark.parametrize("fit", ["crop", "crop-rounded", "pad"])
def test_every_pixel_that_is_looked_at_has_a_gradient(fit: Fit) -> None:
    picture = (0.3 + 0.4 * as_tensor(photograph(300, 400))).requires_grad_()
    plain(picture, 224, fit).sum().backward()
    assert picture.grad is not None
    assert float((picture.grad != 0).float().mean()) > (0.95 if fit == "pad" else 0.7)


@pytest.mark.parametrize(("height", "width"), [(32, 32), (40, 64), (300, 400)])
def test_white_noise_too_comes_out_as_pil_resizes_it(height: int, width: int) -> None:
    levels = np.random.default_rng(1).integers(0, 256, (height, width, 3), dtype=np.uint8)
    theirs = resized_by_pil(Image.fromarray(levels), 56)
    left = (theirs.width - 56) // 2
    ours = plain(as_tensor(Image.fromarray(levels)), 56, "crop")
    mean, largest = apart(ours, as_tensor(theirs)[..., left : left + 56])
    assert mean <= 1e-4 and largest <= LEVEL
