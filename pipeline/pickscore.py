"""PickScore (Kirstain et al. 2023) from a CLIPModel folder: `yuvalkirstain/PickScore_v1` or a small one."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from rats.pipeline.clip_score import cosine, import_clip, open_tokenizer
from rats.pipeline.loading import load_state, read_state, torch_device
from rats.pipeline.pixels import CLIP_MEAN, CLIP_STD, resize_normalise
from rats.pipeline.weights import adapter_fingerprint, read_json
from rats.schemas.errors import ConfigError

VERSION = 1
PATTERNS = ("*.json", "*.txt", "model.safetensors")
TOKENIZER = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
"""The hub's tokenizer of the published PickScore, for folders without one."""


def identify(path: Path) -> str:
    """The reward's fingerprint, without loading it."""
    return adapter_fingerprint("pickscore", VERSION, [_weights(path)], path)


def _weights(path: Path) -> Path:
    weights = path / "model.safetensors"
    if not weights.is_file():
        raise ConfigError(f"no {weights}: the reward's path must be a CLIPModel folder saved as safetensors")
    return weights


class PickScore:
    """exp(logit_scale) cos(image, text), PickScore's own formula and scale (about 20)."""

    def __init__(self, path: Path, name: str = "pickscore", device: str = "cpu") -> None:
        """Loads `path`; a preprocessor_config.json there sets mean, std and size, else CLIP's and the model's."""
        model_class, config_class, tokenizer_class = import_clip()
        self.name, self.fingerprint = name, identify(path)
        state = read_state(_weights(path))
        self.model = model_class(config_class.from_dict(read_json(path / "config.json")))
        load_state(self.model, state, path)
        self.model.requires_grad_(False).eval().to(torch_device(device))
        self.tokenizer = open_tokenizer(tokenizer_class, path, TOKENIZER)
        settings = path / "preprocessor_config.json"
        self._settings = read_json(settings) if settings.is_file() else {}

    def score(self, images_B3HW: Tensor, prompts: list[str]) -> Tensor:
        """Scores (B,), float32, of images in [0, 1]; differentiable."""
        size = self.model.config.vision_config.image_size
        mean, std = self._settings.get("image_mean", CLIP_MEAN), self._settings.get("image_std", CLIP_STD)
        pixels = resize_normalise(images_B3HW.to(self.model.device), size, mean, std)
        return self.model.logit_scale.exp() * cosine(self.model, self.tokenizer, pixels, prompts)
