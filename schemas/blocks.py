"""What every block of `params.yaml` is made of."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]


class Block(BaseModel):
    """Base of all blocks: immutable, no unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)
