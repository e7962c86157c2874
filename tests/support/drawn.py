"""Pictures of real sizes, drawn by formula: for what must hold of photographs and not of white noise alone."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor


def photograph(height: int, width: int, seed: int = 0) -> Image.Image:
    """Clouds of all sizes (1 / f), a bright shape with hard edges, and fine black lines: 8-bit levels."""
    random = np.random.default_rng(seed)
    picture = np.zeros((height, width, 3), np.float32)
    for size in (2, 4, 8, 16, 32, 64, 128, 256):
        octave = random.integers(0, 256, (size, size, 3), dtype=np.uint8)
        resized = Image.fromarray(octave).resize((width, height), Image.Resampling.BICUBIC)
        picture += (np.asarray(resized, np.float32) - 127.5) / size**0.5
    picture = 127.5 + 40 * picture / picture.std()
    picture[height // 4 : height // 2, width // 3 : width // 2] = random.integers(0, 256, 3)
    picture[height // 2 :: 9, : width // 3] = 0
    return Image.fromarray(picture.clip(0, 255).astype(np.uint8))


def as_tensor(picture: Image.Image) -> Tensor:
    """(1, 3, H, W), float32 in [0, 1]."""
    return torch.from_numpy(np.array(picture, dtype=np.float32)).permute(2, 0, 1)[None] / 255
