"""`rats generate` of many pictures: in batches, with the noise of one call, and never more than there is room for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rats.schemas.errors import ConfigError
from rats.schemas.params import Params
from rats.stages.generate import generate
from tests.support.project import settings


def params(models: Path, folder: Path, **changes: Any) -> Params:
    return Params.model_validate(settings(models, folder, **changes))


def test_batches_are_drawn_from_the_noise_of_one_call(models: Path, tmp_path: Path) -> None:
    drawn = {}
    for size in (2, 7):
        chosen = params(models, tmp_path, compute={"micro_batch": size})
        pictures = generate(chosen, "a red fox", 2, None, seed=5, out=tmp_path / "a.png", count=5)
        drawn[size] = np.stack([np.asarray(picture, np.int16) for picture in pictures])
    # a batch's size moves last bits of what a network computes, never its noise
    assert np.abs(drawn[2] - drawn[7]).max() <= 1
    assert len({picture.tobytes() for picture in drawn[2]}) == 5


@pytest.mark.parametrize(
    ("out", "count", "words"),
    [("a.png", 10**11, "GiB of memory"), ("a.webp", 2 * 10**6, "use .png"), ("a.jpg", 3 * 10**7, "use .png")],
)
def test_more_than_a_file_or_the_memory_holds_is_refused_before_the_first(
    models: Path, tmp_path: Path, out: str, count: int, words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        generate(params(models, tmp_path), "a red fox", 2, None, 0, tmp_path / out, count)
    assert not (tmp_path / out).exists()
