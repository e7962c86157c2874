"""An entry of `model.loras` in `params.yaml`."""

from __future__ import annotations

from pydantic import field_validator

from rats.schemas.blocks import Block, PathText


class FusedLora(Block):
    """A LoRA that is part of the teacher: a .safetensors file, a folder, or a hub id (`org/name` or `org/name/file`).

    `weight`: its strength, as in diffusers' `fuse_lora(lora_scale=weight)`.
    """

    path: PathText
    weight: float = 1.0
    revision: str | None = None

    @field_validator("weight")
    @classmethod
    def _changes_something(cls, weight: float) -> float:
        if weight == 0:
            raise ValueError("a LoRA of weight 0 changes nothing: leave it out")
        return weight

    def __str__(self) -> str:
        """For tables and cards."""
        return f"{self.path} at {self.weight:g}"
