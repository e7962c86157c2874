"""The reward adapters against independent forward passes, and the pixel work around them."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from rats.pipeline.protocols import Reward
from rats.pipeline.rewards.clip import Clip, PickScore
from rats.pipeline.rewards.hpsv2 import VIT_H_14, HPSv2, clip_config
from rats.pipeline.rewards.image_reward import MEAN, STD, ImageReward
from rats.pipeline.rewards.open import open_reward, reward_fingerprint
from rats.pipeline.rewards.preprocess import CLIP_MEAN, CLIP_STD, resize_normalise
from rats.schemas.errors import ConfigError, DataError
from rats.schemas.params import RewardParams
from rats.trainer.augment import RandomDraws, augment
from tests.support import tiny

WRITERS = {
    "clip": tiny.write_pickscore,
    "pickscore": tiny.write_pickscore,
    "hpsv2": tiny.write_hpsv2,
    "image-reward": tiny.write_image_reward,
}
PROMPTS = list(tiny.PROMPTS)


def params(adapter: str, folder: Path) -> RewardParams:
    return RewardParams(name=f"my-{adapter}", adapter=adapter, path=str(folder))


def pictures(count: int, height: int = 32, width: int = 32) -> Tensor:
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(3))


@pytest.fixture
def folders(models: Path) -> dict[str, Path]:
    return {adapter: models / adapter.replace("clip", "pickscore") for adapter in WRITERS}


@pytest.mark.parametrize("adapter", WRITERS)
def test_a_score_follows_picture_and_prompt_and_nothing_else(adapter: str, folders: dict[str, Path]) -> None:
    reward = open_reward(params(adapter, folders[adapter]))
    images = pictures(3)
    scores = reward.score(images, PROMPTS[:3])
    assert isinstance(reward, Reward) and reward.name == f"my-{adapter}"
    assert scores.shape == (3,) and scores.dtype == torch.float32 and len(set(scores.tolist())) == 3
    torch.testing.assert_close(reward.score(images[2:], PROMPTS[2:3]), scores[2:], atol=1e-5, rtol=1e-5)
    assert not torch.equal(reward.score(images, PROMPTS[3:]), scores)


@pytest.mark.parametrize("adapter", WRITERS)
def test_the_gradient_at_the_pixels_is_the_slope_of_the_score(adapter: str, folders: dict[str, Path]) -> None:
    reward = open_reward(params(adapter, folders[adapter]))
    # Smooth pictures: bicubic resizing keeps them away from the clamp's edges.
    images = (0.3 + 0.4 * F.interpolate(pictures(2, 4, 4), (24, 36), mode="bilinear")).requires_grad_()
    (gradient,) = torch.autograd.grad(reward.score(images, PROMPTS[:2]).sum(), images)
    direction = gradient / gradient.norm()
    with torch.no_grad():
        ahead = reward.score(images + 0.02 * direction, PROMPTS[:2]).sum()
        behind = reward.score(images - 0.02 * direction, PROMPTS[:2]).sum()
    assert float((ahead - behind) / 0.04) == pytest.approx(float(gradient.norm()), rel=0.05)


@pytest.mark.parametrize(("adapter", "left"), [("clip", 1), ("pickscore", 1), ("image-reward", 2)])
def test_the_centre_is_cut_where_the_package_cuts_it(adapter: str, left: int, folders: dict[str, Path]) -> None:
    reward, images = open_reward(params(adapter, folders[adapter])), pictures(2, 32, 35)
    cut = images[..., left : left + 32]
    torch.testing.assert_close(reward.score(images, PROMPTS[:2]), reward.score(cut, PROMPTS[:2]), atol=0, rtol=0)


def test_pickscore_is_transformers_own_logit_of_a_picture_resized_by_pil(folders: dict[str, Path]) -> None:
    levels = np.random.default_rng(0).integers(0, 256, (48, 48, 3), dtype=np.uint8)
    resized = np.asarray(Image.fromarray(levels).resize((32, 32), Image.Resampling.BICUBIC), np.float32) / 255
    pixels = ((resized - np.array(CLIP_MEAN)) / np.array(CLIP_STD)).transpose(2, 0, 1)[None]
    model = CLIPModel.from_pretrained(folders["pickscore"]).eval()
    tokens = CLIPTokenizer.from_pretrained(folders["pickscore"])(["a red fox"], padding=True, return_tensors="pt")
    with torch.no_grad():
        logit = model(**tokens, pixel_values=torch.tensor(pixels, dtype=torch.float32)).logits_per_image[0, 0]
    image = torch.from_numpy(levels).permute(2, 0, 1)[None] / 255
    assert float(PickScore(folders["pickscore"]).score(image, ["a red fox"])) == pytest.approx(float(logit), abs=0.02)


def test_clip_score_is_a_hundred_cosines_and_never_cut(folders: dict[str, Path]) -> None:
    clip, pick, images = Clip(folders["clip"]), PickScore(folders["pickscore"]), pictures(6)
    scores = clip.score(images, PROMPTS[:6])
    torch.testing.assert_close(scores, 100 * pick.score(images, PROMPTS[:6]) / pick.model.logit_scale.exp())
    assert float(scores.min()) < 0 and clip.fingerprint != pick.fingerprint


def open_clip_tower(state: dict[str, Tensor], prefix: str, x: Tensor, mask: Tensor | None) -> Tensor:
    """open_clip's residual blocks in plain torch, QuickGELU, 2 heads."""
    for layer in range(2):
        w = {k: state[f"{prefix}transformer.resblocks.{layer}.{k}"] for k in BLOCK_KEYS}
        h = F.layer_norm(x, (32,), w["ln_1.weight"], w["ln_1.bias"])
        attention = F.multi_head_attention_forward(
            *(h.transpose(0, 1),) * 3, 32, 2, w["attn.in_proj_weight"], w["attn.in_proj_bias"], None, None, False, 0.0,
            w["attn.out_proj.weight"], w["attn.out_proj.bias"], need_weights=False, attn_mask=mask,
        )[0]  # fmt: skip
        x = x + attention.transpose(0, 1)
        h = F.layer_norm(x, (32,), w["ln_2.weight"], w["ln_2.bias"])
        h = F.linear(h, w["mlp.c_fc.weight"], w["mlp.c_fc.bias"])
        x = x + F.linear(h * torch.sigmoid(1.702 * h), w["mlp.c_proj.weight"], w["mlp.c_proj.bias"])
    return x


BLOCK_KEYS = [f"{name}.{kind}" for name in ("ln_1", "ln_2", "attn.out_proj", "mlp.c_fc", "mlp.c_proj")
              for kind in ("weight", "bias")] + ["attn.in_proj_weight", "attn.in_proj_bias"]  # fmt: skip


def open_clip_cosine(state: dict[str, Tensor], pixels: Tensor, ids: Tensor) -> Tensor:
    """The score as open_clip's own formulas give it: class token, text pooled at the largest id."""
    x = F.conv2d(pixels, state["visual.conv1.weight"], stride=8).flatten(2).transpose(1, 2)
    x = torch.cat((state["visual.class_embedding"].expand(len(x), 1, -1), x), 1) + state["visual.positional_embedding"]
    x = F.layer_norm(x, (32,), state["visual.ln_pre.weight"], state["visual.ln_pre.bias"])
    x = open_clip_tower(state, "visual.", x, None)[:, 0]
    image = F.layer_norm(x, (32,), state["visual.ln_post.weight"], state["visual.ln_post.bias"]) @ state["visual.proj"]
    t = state["token_embedding.weight"][ids] + state["positional_embedding"]
    mask = torch.full((tiny.LENGTH, tiny.LENGTH), float("-inf")).triu(1)
    t = F.layer_norm(open_clip_tower(state, "", t, mask), (32,), state["ln_final.weight"], state["ln_final.bias"])
    text = t[torch.arange(len(t)), ids.argmax(-1)] @ state["text_projection"]
    return F.cosine_similarity(image, text)


def test_hpsv2_is_the_cosine_that_open_clip_s_formulas_give(folders: dict[str, Path]) -> None:
    reward, images = HPSv2(folders["hpsv2"]), pictures(3, 40, 56)
    state = load_file(folders["hpsv2"] / "open_clip_model.safetensors")
    ids = reward.tokenizer(PROMPTS[:3], padding="max_length", max_length=tiny.LENGTH, return_tensors="pt").input_ids
    ids = torch.where(ids.eq(ids.max()).cumsum(-1) > 1, 0, ids)  # open_clip pads with 0, we with the end token
    pixels = resize_normalise(images, 32, CLIP_MEAN, CLIP_STD, fit="pad", overshoot="kept")
    expected = open_clip_cosine(state, pixels, ids)
    torch.testing.assert_close(reward.score(images, PROMPTS[:3]), expected, atol=1e-6, rtol=1e-5)


def test_hpsv2_s_published_layout_loads_without_unpickling_code(folders: dict[str, Path], tmp_path: Path) -> None:
    copy = shutil.copytree(folders["hpsv2"], tmp_path / "copy")
    state = load_file(copy / "open_clip_model.safetensors")
    (copy / "open_clip_model.safetensors").unlink()
    torch.save({"state_dict": state, "epoch": 3}, copy / "HPS_v2.1_compressed.pt")
    expected = HPSv2(folders["hpsv2"]).score(pictures(2), PROMPTS[:2])
    for path in (copy, copy / "HPS_v2.1_compressed.pt"):
        assert torch.equal(HPSv2(path).score(pictures(2), PROMPTS[:2]), expected)


def test_the_full_size_hpsv2_is_vit_h_14() -> None:
    with torch.device("meta"):
        model = CLIPModel(CLIPConfig.from_dict(clip_config(VIT_H_14)))
    assert sum(parameter.numel() for parameter in model.parameters()) == 986_109_441  # open_clip's own count


def test_image_reward_s_vision_tower_and_scale_are_upstream_s(folders: dict[str, Path]) -> None:
    reward, images = ImageReward(folders["image-reward"]), pictures(2)
    state = load_file(folders["image-reward"] / "ImageReward.safetensors")
    w = {k.removeprefix("blip.visual_encoder."): v for k, v in state.items() if k.startswith("blip.visual_encoder.")}
    x = F.conv2d(images, w["patch_embed.proj.weight"], w["patch_embed.proj.bias"], stride=8).flatten(2).transpose(1, 2)
    x = torch.cat((w["cls_token"].expand(len(x), -1, -1), x), 1) + w["pos_embed"]
    for i in range(2):
        h = F.layer_norm(x, (32,), w[f"blocks.{i}.norm1.weight"], w[f"blocks.{i}.norm1.bias"], 1e-6)
        qkv = F.linear(h, w[f"blocks.{i}.attn.qkv.weight"], w[f"blocks.{i}.attn.qkv.bias"])
        q, k, v = qkv.view(2, -1, 3, 2, 16).permute(2, 0, 3, 1, 4)  # timm's order: q, k, v, then heads
        a = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + F.linear(a, w[f"blocks.{i}.attn.proj.weight"], w[f"blocks.{i}.attn.proj.bias"])
        h = F.layer_norm(x, (32,), w[f"blocks.{i}.norm2.weight"], w[f"blocks.{i}.norm2.bias"], 1e-6)
        h = F.gelu(F.linear(h, w[f"blocks.{i}.mlp.fc1.weight"], w[f"blocks.{i}.mlp.fc1.bias"]))
        x = x + F.linear(h, w[f"blocks.{i}.mlp.fc2.weight"], w[f"blocks.{i}.mlp.fc2.bias"])
    x = F.layer_norm(x, (32,), w["norm.weight"], w["norm.bias"], 1e-6)
    torch.testing.assert_close(reward.model.vision(images).last_hidden_state, x, atol=1e-5, rtol=1e-5)
    raw: list[Tensor] = []
    reward.model.register_forward_hook(lambda module, inputs, output: raw.append(output))
    scores = reward.score(images, PROMPTS[:2])
    torch.testing.assert_close(scores, (raw[0] - MEAN) / STD)


def test_image_reward_reads_the_words_after_the_padding_mask_only(folders: dict[str, Path]) -> None:
    reward = ImageReward(folders["image-reward"])
    word = reward.tokenizer.get_vocab()["fox"]
    ids, mask = torch.tensor([[2, word, 3, 0], [2, word, 3, word]]), torch.tensor([[1, 1, 1, 0]] * 2)
    with torch.no_grad():
        masked = reward.model(pictures(1).expand(2, -1, -1, -1), ids, mask)
    torch.testing.assert_close(masked[0], masked[1])


@pytest.mark.parametrize("adapter", WRITERS)
def test_a_fingerprint_covers_weights_and_vocabulary_and_needs_no_model(
    adapter: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    copy = shutil.copytree(folders[adapter], tmp_path / "copy")
    vocabulary = next(copy / name for name in ("tokenizer.json", "vocab.json") if (copy / name).exists())
    shutil.copy(vocabulary, tmp_path / "kept.json")
    fingerprint = reward_fingerprint(params(adapter, folders[adapter]))
    assert fingerprint == open_reward(params(adapter, copy)).fingerprint
    (copy / "README.md").write_text("not part of the reward")
    assert fingerprint == reward_fingerprint(params(adapter, copy))
    vocabulary.write_text(vocabulary.read_text() + " ")
    assert fingerprint != reward_fingerprint(params(adapter, copy))
    shutil.copy(tmp_path / "kept.json", vocabulary)
    WRITERS[adapter](copy, 1)
    assert fingerprint != reward_fingerprint(params(adapter, copy))


class Trap:
    """Runs code when unpickled."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, ("sprung",)


@pytest.mark.parametrize("adapter", WRITERS)
def test_missing_truncated_and_wrong_checkpoints_are_refused_in_one_line(
    adapter: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=f"reward 'my-{adapter}': no model at"):
        open_reward(params(adapter, tmp_path / "nowhere"))
    with pytest.raises(ConfigError, match="no "):
        open_reward(params(adapter, tmp_path))
    copy = shutil.copytree(folders[adapter], tmp_path / "copy")
    (weights,) = copy.glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:-64])
    with pytest.raises(DataError, match="damaged") as refusal:
        open_reward(params(adapter, copy))
    assert "\n" not in str(refusal.value)
    other = "hpsv2" if adapter != "hpsv2" else "pickscore"
    shutil.copy(next(folders[other].glob("*.safetensors")), weights)
    with pytest.raises(DataError, match="lacks .* weights|is no ImageReward checkpoint"):
        open_reward(params(adapter, copy))


def test_a_checkpoint_that_holds_code_is_refused_and_the_code_never_runs(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": Trap()}, "HPS_v2.1_compressed.pt")
    with pytest.raises(DataError, match="damaged or holds more than tensors"):
        HPSv2(Path("HPS_v2.1_compressed.pt"))
    assert not Path("sprung").exists()


def test_image_reward_s_settings_must_fit_its_tensors(folders: dict[str, Path], tmp_path: Path) -> None:
    copy = shutil.copytree(folders["image-reward"], tmp_path / "copy")
    med = json.loads((copy / "med_config.json").read_text())
    (copy / "med_config.json").write_text(json.dumps(med | {"intermediate_size": 48}))
    with pytest.raises(DataError, match="does not fit its configuration"):
        ImageReward(copy)


def test_augmentation_of_strength_zero_is_the_identity_and_otherwise_follows_its_generator() -> None:
    images = pictures(4, 16, 16)
    assert augment(images, RandomDraws(torch.Generator()), 0.0) is images
    one, again, other = (augment(images, RandomDraws(torch.Generator().manual_seed(s)), 1.0) for s in (1, 1, 2))
    assert torch.equal(one, again) and not torch.equal(one, other)
    assert one.shape == images.shape and float(one.min()) >= 0 and float(one.max()) <= 1
    weak = augment(images, RandomDraws(torch.Generator().manual_seed(1)), 0.01)
    assert float((weak - images).abs().mean()) < 0.1 * float((one - images).abs().mean())


def test_augmentation_passes_gradients_to_the_pixels() -> None:
    images = (0.3 + 0.4 * pictures(2, 16, 16)).requires_grad_()
    augment(images, RandomDraws(torch.Generator().manual_seed(0)), 1.0).sum().backward()
    assert images.grad is not None and float((images.grad.abs() > 0).float().mean()) > 0.5
