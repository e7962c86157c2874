"""PickScore (Kirstain et al. 2023) from a CLIPModel folder: `yuvalkirstain/PickScore_v1` or a small one."""

from __future__ import annotations

from torch import Tensor

from rats.pipeline.clip_score import CLIP_H_14, ClipFolder


class PickScore(ClipFolder):
    """exp(logit_scale) cos(image, text), PickScore's own formula and scale (about 20)."""

    adapter, version = "pickscore", 1
    tokenizer_source = CLIP_H_14

    def score(self, images_B3HW: Tensor, prompts: list[str]) -> Tensor:
        """Scores (B,), float32, of images in [0, 1]; differentiable."""
        return self.model.logit_scale.exp() * self.cosine(images_B3HW, prompts)
