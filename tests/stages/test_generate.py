"""`rats generate` of many pictures: in batches, with the noise of one call, and never more than there is room for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from rats.schemas.errors import ConfigError
from rats.schemas.params import Params, TeacherParams
from rats.stages.generate import enlargement, generate
from tests.support import tiny
from tests.support.project import settings


def params(models: Path, folder: Path, **changes: Any) -> Params:
    return Params.model_validate(settings(models, folder, **changes))


def test_batches_are_drawn_from_the_noise_of_one_call(models: Path, tmp_path: Path) -> None:
    drawn = {}
    for size in (2, 7):
        chosen = params(models, tmp_path, compute={"micro_batch": size})
        pictures = generate(chosen, "a red fox", 2, None, seed=5, out=tmp_path / "a.png", count=5).pictures
        drawn[size] = np.stack([np.asarray(picture, np.int16) for picture in pictures])
    # a batch's size moves last bits of what a network computes, never its noise
    assert np.abs(drawn[2] - drawn[7]).max() <= 1
    assert len({picture.tobytes() for picture in drawn[2]}) == 5


def test_pictures_are_drawn_with_compute_threads_whatever_this_process_had(models: Path, tmp_path: Path) -> None:
    with tiny.threads_seen(given=5) as seen:
        generate(params(models, tmp_path), "a red fox", 2, None, seed=5, out=tmp_path / "a.png")
    assert seen == {1}


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


def test_a_small_picture_is_written_a_whole_number_of_times_as_large(models: Path, tmp_path: Path) -> None:
    chosen = params(models, tmp_path, teacher={"width": 16, "height": 24})
    drawn = generate(chosen, "a red fox", 2, None, seed=5, out=tmp_path / "a.png", count=2)
    plain = generate(chosen, "a red fox", 2, None, seed=5, out=tmp_path / "b.png", count=2, enlarge=False)
    large, small = (np.asarray(Image.open(tmp_path / name)) for name in ("a.png", "b.png"))
    assert large.shape == (264, 2 * 176, 3) and small.shape == (24, 2 * 16, 3)
    assert (large == small.repeat(11, 0).repeat(11, 1)).all()
    assert (drawn.factor, plain.factor) == (11, 1) and drawn.seconds > 0
    assert (drawn.pixels, plain.pixels) == ("16 x 24, written 11 times as large (nearest)", "16 x 24")


@pytest.mark.parametrize(("width", "height", "factor"), [(32, 32, 8), (64, 48, 4), (300, 200, 1), (255, 8, 2)])
def test_the_longer_side_of_a_written_picture_has_256_pixels_or_more(width: int, height: int, factor: int) -> None:
    assert enlargement(TeacherParams(width=width, height=height)) == factor
