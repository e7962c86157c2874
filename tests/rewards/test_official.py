"""The official packages and our transformers classes are the same function: the same weights, scores and gradients."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from official import TINY_CLIP, Answer, compared, write_hpsv2, write_image_reward

from rats.pipeline.protocols import Reward
from rats.pipeline.rewards.open import open_reward, reward_fingerprint
from rats.schemas.errors import ConfigError
from rats.schemas.params import RewardParams


def agree(answers: tuple[Answer, Answer]) -> None:
    official, ours = answers
    apart = float((ours.gradient - official.gradient).norm() / official.gradient.norm())
    shift = float((ours.resized - official.resized).abs().max())
    print(f"scores {official.scores.tolist()}, apart {float((ours.scores - official.scores).abs().max()):.1e}")
    print(f"gradients apart {apart:.1e}; 512 x 775: scores {official.resized.tolist()}, apart {shift:.1e}")
    assert float(official.gradient.norm()) > 1e-6 and float(official.scores.std()) > 0
    torch.testing.assert_close(ours.scores, official.scores, atol=1e-5, rtol=0)
    assert apart <= 1e-4 and shift <= 1e-3 * float(official.resized.std())


@pytest.fixture(scope="module")
def hpsv2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_hpsv2(tmp_path_factory.mktemp("hpsv2"), TINY_CLIP)


def test_a_small_hpsv2_is_the_same_function(hpsv2: Path) -> None:
    agree(compared("hpsv2", hpsv2, 64))


def test_vit_h_14_at_full_size_is_the_same_function(tmp_path: Path) -> None:
    folder = write_hpsv2(tmp_path, None)
    try:
        agree(compared("hpsv2", folder, 224))
    finally:
        shutil.rmtree(folder)  # 2 GB


def test_image_reward_at_full_size_is_the_same_function(tmp_path: Path) -> None:
    folder = write_image_reward(tmp_path, 12)
    try:
        agree(compared("image-reward", folder, 224))
    finally:
        shutil.rmtree(folder)  # 2 GB


def test_backends_are_told_apart_in_a_column_s_address(hpsv2: Path) -> None:
    rewards = [
        RewardParams(name="it", adapter="hpsv2", path=str(hpsv2), backend=b) for b in ("official", "transformers")
    ]
    official, ours = (reward_fingerprint(reward) for reward in rewards)
    opened = open_reward(rewards[0])
    assert isinstance(opened, Reward) and opened.fingerprint == official != ours


def test_an_adapter_without_a_package_has_no_official_backend(hpsv2: Path) -> None:
    with pytest.raises(ConfigError, match=r"'clip' has no package of its own.*\(hpsv2, image-reward have\)"):
        open_reward(RewardParams(name="it", adapter="clip", path=str(hpsv2), backend="official"))
