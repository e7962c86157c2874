"""The fields of `params.evaluate`."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import field_validator, model_validator

from rats.schemas.blocks import Block, PathText, Positive, Seed

JudgeName = Literal["efficientnet-lite0", "open-nsfw"]


class JudgeParams(Block):
    """A network that trains nothing here and sees all pictures: diversity, and KID and recognition beside real ones."""

    name: JudgeName
    real_features: PathText | None = None
    """What it sees in real pictures of the prompts' concepts; null: diversity alone."""


class EvaluateParams(Block):
    """Which runs are compared, with how many pictures, and by which judges."""

    variants: tuple[str, ...] = ("rats",)
    judges: tuple[JudgeParams, ...] = (JudgeParams(name="efficientnet-lite0"),)
    """The first is also the guard's. Metrics of the others carry their name: `kid open-nsfw`."""
    pictures: Positive = 8
    seed: Seed = 0

    @model_validator(mode="before")
    @classmethod
    def _has_judges(cls, values: Any) -> Any:
        """One judge and its file were two fields."""
        if isinstance(values, dict) and {"judge", "real_features"} & set(values):
            raise ValueError(
                "evaluate.judge and real_features are a list now: judges: [{name: ..., real_features: ...}]"
            )
        return values

    @field_validator("judges")
    @classmethod
    def _are_different(cls, judges: tuple[JudgeParams, ...]) -> tuple[JudgeParams, ...]:
        names = [judge.name for judge in judges]
        if len(set(names)) < len(names):
            raise ValueError(f"evaluate.judges names a judge twice: {', '.join(names)}")
        return judges
