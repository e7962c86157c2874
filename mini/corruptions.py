"""Ways to spoil a drawing: the losers of the miniature rewards' preference pairs.

All take and return (B, 3, 64, 64) in [0, 1], with severities in [0, 1] a sample, (B, 1, 1, 1). They were
written down before any student was trained and none looks at a student.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def blur(x: Tensor, severity: Tensor, generator: torch.Generator) -> Tensor:
    """A mix of the picture and its box blur, 3 to 7 pixels wide."""
    once = _box(x, 3)
    wide = _box(_box(once, 5), 3)
    return torch.lerp(x, torch.lerp(once, wide, severity), (0.5 + severity).clamp(max=1))


def _box(x: Tensor, side: int) -> Tensor:
    return F.avg_pool2d(F.pad(x, (side // 2,) * 4, "replicate"), side, 1)


def coarse(x: Tensor, severity: Tensor, generator: torch.Generator) -> Tensor:
    """A quarter or an eighth of the resolution, blended in."""
    side = 4 * int(torch.randint(1, 3, (1,), generator=generator))
    small = F.interpolate(F.avg_pool2d(x, side), scale_factor=side, mode="bilinear")
    return torch.lerp(x, small, 0.3 + 0.7 * severity)


def noise(x: Tensor, severity: Tensor, generator: torch.Generator) -> Tensor:
    """White noise, deviation up to 0.3."""
    return x + (0.04 + 0.26 * severity) * torch.randn(x.shape, generator=generator)


def coloured_noise(x: Tensor, severity: Tensor, generator: torch.Generator) -> Tensor:
    """Smooth random colours at a scale of 4 to 16 pixels: what hacked generators drift to."""
    cells = int(torch.tensor([4, 8, 16])[torch.randint(3, (1,), generator=generator)])
    field = torch.randn(len(x), 3, cells, cells, generator=generator)
    return x + (0.1 + 0.4 * severity) * F.interpolate(field, size=x.shape[-2:], mode="bicubic")


def mix(x: Tensor, severity: Tensor, generator: torch.Generator) -> Tensor:
    """A ghost of another picture of the batch."""
    return torch.lerp(x, x[torch.randperm(len(x), generator=generator)], 0.2 + 0.4 * severity)


def wash_out(x: Tensor, severity: Tensor, generator: torch.Generator) -> Tensor:
    """Contrast lowered towards the picture's mean."""
    return torch.lerp(x, x.mean((1, 2, 3), keepdim=True), 0.25 + 0.6 * severity)


def overdo(x: Tensor, severity: Tensor, generator: torch.Generator) -> Tensor:
    """Saturation and contrast beyond what a designer draws."""
    grey = x.mean(1, keepdim=True)
    return 0.5 + (grey + (x - grey) * (1.3 + 2 * severity) - 0.5) * (1.1 + severity)


def shuffle(x: Tensor, severity: Tensor, generator: torch.Generator) -> Tensor:
    """16 x 16 tiles in another order."""
    tiles = F.unfold(x, 16, stride=16)
    moved = tiles[..., torch.randperm(tiles.shape[-1], generator=generator)]
    keep = torch.rand(len(x), 1, tiles.shape[-1], generator=generator) > 0.3 + 0.7 * severity[..., 0]
    return F.fold(torch.where(keep, tiles, moved), x.shape[-2:], 16, stride=16)


def wobble(x: Tensor, severity: Tensor, generator: torch.Generator) -> Tensor:
    """A smooth random displacement of up to 10 pixels: melted shapes."""
    field = torch.randn(len(x), 2, 5, 5, generator=generator) * (0.06 + 0.2 * severity)
    offset = F.interpolate(field, size=x.shape[-2:], mode="bicubic").permute(0, 2, 3, 1)
    identity = F.affine_grid(torch.eye(2, 3).expand(len(x), 2, 3), list(x.shape), align_corners=False)
    return F.grid_sample(x, identity + offset, padding_mode="border", align_corners=False)


def recolour(x: Tensor, severity: Tensor, generator: torch.Generator) -> Tensor:
    """Channels swapped: the right shape in a wrong colour."""
    order = [(1, 2, 0), (2, 0, 1), (2, 1, 0)][int(torch.randint(3, (1,), generator=generator))]
    return torch.lerp(x, x[:, list(order)], 0.5 + 0.5 * severity)


ALL = (blur, coarse, noise, coloured_noise, mix, wash_out, overdo, shuffle, wobble, recolour)


def spoil(x: Tensor, generator: torch.Generator) -> Tensor:
    """One or two corruptions, chosen for each quarter of the batch, at random severities."""
    parts = []
    for part in x.chunk(4):
        for choice in torch.randint(
            len(ALL), (1 + int(torch.rand(1, generator=generator) < 0.3),), generator=generator
        ):
            part = ALL[choice](part, torch.rand(len(part), 1, 1, 1, generator=generator), generator).clamp(0, 1)
        parts.append(part)
    return torch.cat(parts)
