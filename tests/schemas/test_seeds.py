"""One range for all seeds: what torch's and numpy's generators both take, with room for a rank's number."""

from __future__ import annotations

import typing
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import BaseModel, ValidationError

from rats.schemas.identity import LARGEST_SEED
from rats.schemas.params import Params


def seeds(annotation: Any, block: type[BaseModel] | None = None) -> Iterator[tuple[type[BaseModel], str]]:
    """Every field whose name has "seed" in it, and its block, wherever it lies below."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        for name, field in annotation.model_fields.items():
            if "seed" in name:
                yield annotation, name
            yield from seeds(field.annotation)
    for part in typing.get_args(annotation):
        yield from seeds(part)


SEEDS = sorted(set(seeds(Params)), key=lambda found: found[0].__name__)


def test_the_walk_finds_the_seeds_of_every_block():
    assert [block.__name__ for block, _ in SEEDS] == [
        *("EvaluateParams", "PromptSource", "TeacherParams", "TrainParams"),
    ]


@pytest.mark.parametrize(("block", "name"), SEEDS)
def test_every_seed_has_the_one_range(block: type[BaseModel], name: str):
    needed = {"path": "p.csv", "reward": "hps"}
    values = {field: needed[field] for field in block.model_fields if field in needed}
    for seed in (0, 7, LARGEST_SEED):
        assert getattr(block.model_validate({**values, name: seed}), name) == seed
    for seed in (-1, LARGEST_SEED + 1, 2**65):
        with pytest.raises(ValidationError, match="than or equal to"):
            block.model_validate({**values, name: seed})


@pytest.mark.parametrize("seed", [0, LARGEST_SEED])
def test_every_generator_takes_the_whole_range(seed: int):
    assert torch.Generator().manual_seed(seed + 7).initial_seed() == seed + 7  # the rank's number
    assert 0 <= np.random.default_rng(seed).random() < 1
