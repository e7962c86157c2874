"""CLIP score (Hessel et al. 2021) from any CLIPModel folder, such as `openai/clip-vit-large-patch14`."""

from __future__ import annotations

from torch import Tensor

from rats.pipeline.clip_score import ClipFolder


class Clip(ClipFolder):
    """100 cos(image, text): the number that tables print, without the floor at 0, where a gradient would end."""

    adapter, version = "clip", 1

    def score(self, images_B3HW: Tensor, prompts: list[str]) -> Tensor:
        """Scores (B,), float32, of images in [0, 1]; differentiable."""
        return 100 * self.cosine(images_B3HW, prompts)
