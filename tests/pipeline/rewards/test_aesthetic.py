"""LAION's aesthetic predictor: its formula, and what its identity covers."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import CLIPModel

from rats.pipeline.rewards.aesthetic import Aesthetic
from rats.pipeline.rewards.clip import CLIP_L_14
from rats.pipeline.rewards.open import open_reward, reward_fingerprint
from rats.pipeline.rewards.preprocess import CLIP_MEAN, CLIP_STD
from rats.schemas.errors import DataError
from rats.schemas.params import RewardParams
from tests.pipeline.rewards.test_open import publish
from tests.pipeline.rewards.test_rewards import PROMPTS, pictures

HEAD = Aesthetic.checkpoints[0]


def write_head(file: Path, width: int) -> nn.Sequential:
    """The published file's layout with narrower layers: a Sequential with dropouts, under `layers`."""
    torch.manual_seed(9)
    widths = (width, 12, 10, 8, 6, 1)
    first, second, third, fourth, last = (nn.Linear(a, b) for a, b in zip(widths[:-1], widths[1:], strict=True))
    drops = [nn.Dropout(0.2), nn.Dropout(0.2), nn.Dropout(0.1)]
    layers = nn.Sequential(first, drops[0], second, drops[1], third, drops[2], fourth, last)
    torch.save({f"layers.{key}": value for key, value in layers.state_dict().items()}, file)
    return layers.eval()


@pytest.fixture
def folder(models: Path, tmp_path: Path) -> Path:
    copy = shutil.copytree(models / "pickscore", tmp_path / "aesthetic")
    write_head(copy / HEAD, 16)
    return copy


def test_the_score_is_the_linear_layers_of_the_normalised_picture_embedding(folder: Path) -> None:
    layers, images = write_head(folder / HEAD, 16), pictures(3, 32, 32).requires_grad_()
    reward = open_reward(RewardParams(name="nice", adapter="aesthetic", path=str(folder)))
    scores = reward.score(images, PROMPTS[:3])
    mean, std = (Tensor(values).view(3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
    pixels = (images - mean) / std
    clip = CLIPModel.from_pretrained(folder)
    embedding = clip.visual_projection(clip.vision_model(pixels).pooler_output)
    expected = layers(embedding / embedding.norm(dim=-1, keepdim=True))[:, 0]
    torch.testing.assert_close(scores, expected, atol=1e-6, rtol=1e-5)
    (gradient,) = torch.autograd.grad(scores.sum(), images)
    (wanted,) = torch.autograd.grad(expected.sum(), images)
    torch.testing.assert_close(gradient, wanted, atol=1e-7, rtol=1e-4)
    assert torch.equal(reward.score(images, PROMPTS[3:]), scores)
    assert len(set(scores.tolist())) == 3
    wide = pictures(3, 32, 35)
    assert torch.equal(reward.score(wide, PROMPTS[:3]), reward.score(wide[..., 2:34], PROMPTS[:3]))


def test_its_identity_covers_head_and_clip_wherever_that_comes_from(
    folder: Path, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = RewardParams(name="nice", adapter="aesthetic", path=str(tmp_path / HEAD))
    beside = RewardParams(name="nice", adapter="aesthetic", path=str(folder))
    shutil.copy(folder / HEAD, tmp_path / HEAD)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    publish(tmp_path / "hub", CLIP_L_14.repository, CLIP_L_14.commit, models / "pickscore")
    both = reward_fingerprint(beside)
    assert open_reward(alone).fingerprint == reward_fingerprint(alone) == both
    write_head(folder / HEAD, 16)[0].bias.data.zero_()
    (folder / "config.json").write_text((folder / "config.json").read_text() + " ")
    assert reward_fingerprint(beside) != both == reward_fingerprint(alone)
    (tmp_path / HEAD).write_bytes((models / "pickscore" / "model.safetensors").read_bytes())
    assert reward_fingerprint(alone) != both


def test_another_file_is_no_head(folder: Path) -> None:
    torch.save({"layers.0.weight": torch.zeros(3, 3)}, folder / HEAD)
    with pytest.raises(DataError, match="no aesthetic predictor's head"):
        Aesthetic(folder)
    write_head(folder / HEAD, 16)
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(DataError, match="lacks .* weights"):
        Aesthetic(folder)
