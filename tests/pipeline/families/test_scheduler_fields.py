"""A scheduler states what its grid depends on, and is not asked for what the grid passes over."""

from __future__ import annotations

from typing import Any

import pytest

from rats.pipeline.families.base import DYNAMIC_SHIFT, PatchFamily
from rats.pipeline.families.flux import Flux
from rats.pipeline.families.flux2 import Flux2Klein
from rats.pipeline.families.qwen_image import QwenImage
from rats.pipeline.families.sd3 import StableDiffusion3
from rats.schemas.errors import DataError
from rats.schemas.params import TeacherParams
from tests.support import tiny, tiny_flux2, tiny_qwen

VAES = {Flux: tiny.vae, StableDiffusion3: tiny.vae, QwenImage: tiny_qwen.vae, Flux2Klein: tiny_flux2.vae}
DYNAMIC = {"base_image_seq_len": 3, "max_image_seq_len": 9, "base_shift": 0.4, "max_shift": 1.3}
STATED = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 2.5, "shift_terminal": 0.02, **DYNAMIC}


def sigmas(family: type[PatchFamily], **config: Any) -> list[float]:
    """Three steps by the scheduler of this configuration; a value of None is not stated."""
    scheduler = family.scheduler({name: value for name, value in (STATED | config).items() if value is not None})
    settings = TeacherParams(height=tiny.SIZE, width=tiny.SIZE)
    scheduler.set_timesteps(**family(settings, VAES[family](0)).schedule(scheduler.config, 3))
    return scheduler.sigmas.tolist()


@pytest.mark.parametrize("family", VAES)
def test_what_the_grid_passes_over_is_not_asked_for(family: type[PatchFamily]):
    dynamic, static = sigmas(family, use_dynamic_shifting=True), sigmas(family, use_dynamic_shifting=False)
    assert dynamic != static
    assert sigmas(family, use_dynamic_shifting=True, shift=None) == dynamic
    assert sigmas(family, use_dynamic_shifting=False, **dict.fromkeys(DYNAMIC)) == static


@pytest.mark.parametrize("family", VAES)
@pytest.mark.parametrize("field", ["shift", *DYNAMIC_SHIFT])
def test_what_moves_the_grid_must_be_stated(family: type[PatchFamily], field: str):
    is_dynamic = field != "shift"
    moved = {field: STATED[field] + 1}
    moves = sigmas(family, use_dynamic_shifting=is_dynamic, **moved) != sigmas(family, use_dynamic_shifting=is_dynamic)
    assert moves == (field == "shift" or family is not Flux2Klein)
    if not moves:
        sigmas(family, use_dynamic_shifting=is_dynamic, **{field: None})
        return
    with pytest.raises(DataError, match=f"lacks {field}, whose default"):
        sigmas(family, use_dynamic_shifting=is_dynamic, **{field: None})


@pytest.mark.parametrize("family", [Flux, StableDiffusion3, QwenImage])
def test_a_shift_that_cannot_grow_is_a_sentence(family: type[PatchFamily]):
    with pytest.raises(DataError, match="base_image_seq_len and max_image_seq_len are both 9, between which no shift"):
        sigmas(family, use_dynamic_shifting=True, base_image_seq_len=9)
