"""PickScore, CLIP score and the aesthetic predictor against the code that their authors show; small random networks."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
from official import PROMPTS, write_clip_vocabulary
from torch import Tensor
from transformers import AutoModel, CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

from rats.pipeline.rewards.hpsv2 import clip_config, convert
from rats.pipeline.rewards.open import open_reward
from rats.schemas.params import RewardParams
from tests.support.drawn import as_tensor, photograph

PICTURES = [photograph(224, 224, seed) for seed in (0, 1)]
ARCHITECTURE = {
    "embed_dim": 768,  # what the aesthetic predictor's head takes
    "quick_gelu": True,
    "vision_cfg": {"image_size": 224, "layers": 2, "width": 128, "patch_size": 32},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 2},
}


def ours(adapter: str, folder: Path) -> Tensor:
    reward = open_reward(RewardParams(name="it", adapter=adapter, path=str(folder)))
    with torch.no_grad():
        return torch.cat([reward.score(as_tensor(p), [text]) for p, text in zip(PICTURES, PROMPTS, strict=True)])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIPModel folder with CLIP's own vocabulary, its checkpoint an older pytorch_model.bin."""
    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(1)
    model = CLIPModel(CLIPConfig.from_dict(clip_config(ARCHITECTURE)))
    model.save_pretrained(folder, safe_serialization=False)
    write_clip_vocabulary(folder)
    CLIPImageProcessor().save_pretrained(folder)
    return folder


def test_pickscore_and_clip_are_what_pickscore_s_model_card_computes(folder: Path) -> None:
    processor = CLIPProcessor(CLIPImageProcessor(), CLIPTokenizer.from_pretrained(folder))
    model = AutoModel.from_pretrained(folder).eval()
    settings = {"padding": True, "truncation": True, "max_length": 77, "return_tensors": "pt"}
    scores = []
    with torch.no_grad():
        for picture, prompt in zip(PICTURES, PROMPTS, strict=True):
            image = model.get_image_features(**processor(images=picture, **settings))
            text = model.get_text_features(**processor(text=prompt, **settings))
            image, text = image / image.norm(dim=-1, keepdim=True), text / text.norm(dim=-1, keepdim=True)
            scores.append((text @ image.T)[0])
        cosines, scale = torch.cat(scores), model.logit_scale.exp()
    torch.testing.assert_close(ours("pickscore", folder), scale * cosines, atol=1e-5, rtol=0)
    torch.testing.assert_close(ours("clip", folder), 100 * cosines, atol=1e-4, rtol=0)


def test_the_aesthetic_score_is_what_image_reward_s_and_openai_s_classes_compute(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from clip.clip import _transform
        from clip.model import CLIP
        from ImageReward.models.AestheticScore import MLP
    torch.manual_seed(2)
    # embedding, then picture size, layers, width and patch; then text length, vocabulary, width, heads and layers
    model = CLIP(768, 224, 2, 128, 32, 77, 49408, 64, 1, 2).eval()
    head = MLP(768).eval()
    preprocess = _transform(224)
    with torch.no_grad():
        features = model.encode_image(torch.stack([preprocess(picture) for picture in PICTURES]))
        expected = head(torch.nn.functional.normalize(features))[:, 0]
    torch.save(head.state_dict(), tmp_path / "sac+logos+ava1-l14-linearMSE.pth")
    torch.save(convert(model.state_dict()), tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text(json.dumps(clip_config(ARCHITECTURE)))
    assert float(expected.std()) > 0
    torch.testing.assert_close(ours("aesthetic", tmp_path), expected, atol=1e-5, rtol=0)
