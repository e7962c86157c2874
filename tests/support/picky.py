"""A real reward that refuses some prompts, as a user's own may: by an exception, and only while a file says so."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from rats.pipeline.rewards.clip import PickScore

REFUSAL = "no word for it:\nwhale"


class Picky(PickScore):
    """PickScore that raises on a batch with a whale in it, as long as `path/broken` is there."""

    def __init__(self, path: Path, name: str = "picky", device: str = "cpu") -> None:
        super().__init__(path, name, device)
        self.path = path

    def score(self, images_B3HW: Tensor, prompts: list[str]) -> Tensor:
        if (self.path / "broken").exists() and any("whale" in prompt for prompt in prompts):
            raise RuntimeError(REFUSAL)
        return super().score(images_B3HW, prompts)
