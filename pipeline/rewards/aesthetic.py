"""LAION's aesthetic predictor v2: five linear layers on CLIP ViT-L/14's embedding of the picture.

The head is `sac+logos+ava1-l14-linearMSE.pth` (hub: `camenduru/improved-aesthetic-predictor`). A CLIPModel's files may
lie beside it; otherwise it is the hub's `openai/clip-vit-large-patch14` at a fixed commit.
"""

from __future__ import annotations

from pathlib import Path

from torch import Tensor
from torch.nn.functional import normalize

from rats.pipeline.rewards.base import LinearHead, head_widths
from rats.pipeline.rewards.clip import CLIP_L_14, ClipFolder
from rats.pipeline.rewards.preprocess import CLIP_MEAN, CLIP_STD, as_pil, resize_normalise
from rats.pipeline.weights.hashes import adapter_fingerprint, hash_path, read_json
from rats.pipeline.weights.hub import find_checkpoint, resolve_checkpoint
from rats.pipeline.weights.loading import load_state, quiet_loading, read_state, torch_device
from rats.schemas.errors import DataError

VERSION = 1
PREFIX = "layers."


class Aesthetic:
    """How well people liked such pictures, 1 to 10 (most lie between 4 and 7); the prompt plays no part."""

    checkpoints = ("sac+logos+ava1-l14-linearMSE.pth",)

    @classmethod
    def files(cls, path: Path) -> list[Path]:
        """The files of head and CLIPModel."""
        head = find_checkpoint(path, cls.checkpoints)
        return [head, _clip(head.parent)]

    @classmethod
    def identify(cls, path: Path) -> str:
        """The fingerprint of head and CLIPModel, without loading them."""
        head, clip = cls.files(path)
        return adapter_fingerprint(f"aesthetic-{hash_path(head)}", VERSION, [clip], clip.parent)

    def __init__(self, path: Path, name: str = "aesthetic", device: str = "cpu") -> None:
        """Loads `path`: the head's file, or a folder that holds it."""
        with quiet_loading():
            from transformers import CLIPConfig, CLIPVisionModelWithProjection
        file, clip = self.files(path)
        self.name, self.fingerprint = name, self.identify(path)
        config = CLIPConfig.from_dict(read_json(clip.parent / "config.json"))
        config.vision_config.projection_dim = config.projection_dim
        self.clip = CLIPVisionModelWithProjection(config.vision_config)
        load_state(self.clip, read_state(clip), clip)
        self.head = _read_head(file)
        for part in (self.clip, self.head):
            part.requires_grad_(False).eval().to(torch_device(device))

    def score(self, images_B3HW: Tensor, prompts: list[str]) -> Tensor:
        """Scores (B,), float32, of images in [0, 1]; differentiable."""
        images, size = images_B3HW.to(self.clip.device), self.clip.config.image_size
        pixels = resize_normalise(images, size, CLIP_MEAN, CLIP_STD, fit="crop-rounded", overshoot=as_pil(size))
        embedding_BD = self.clip(pixel_values=pixels).image_embeds
        scores_B: Tensor = self.head(normalize(embedding_BD, dim=-1))
        return scores_B.float()


def _clip(folder: Path) -> Path:
    """The CLIPModel's weights."""
    names = ClipFolder.checkpoints
    if any((folder / name).is_file() for name in names):
        return find_checkpoint(folder, names)
    return resolve_checkpoint(CLIP_L_14.repository, CLIP_L_14.commit, names)[0]


def _read_head(file: Path) -> LinearHead:
    state = read_state(file)
    try:
        head = LinearHead(head_widths(state, PREFIX))
    except KeyError as error:
        raise DataError(f"{file} is no aesthetic predictor's head (no {error}): fetch it again") from None
    load_state(head, {key.removeprefix(PREFIX): value for key, value in state.items()}, file)
    return head
