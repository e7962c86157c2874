"""Every setting of the teacher at every kind of guidance: it moves the address exactly when it moves a stored byte."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch

from rats.pipeline.families.flux import Flux
from rats.pipeline.families.models import FamilyTeacher, FamilyText
from rats.pipeline.families.open import Model
from rats.pipeline.noise import noise
from rats.pipeline.solver import euler
from rats.pipeline.store.shard_set import ShardSet
from rats.schemas.errors import DataError
from rats.schemas.horizons import rows_of
from rats.schemas.identity import prompt_id
from rats.schemas.params import Params, TeacherParams
from rats.schemas.recipe import Recipe, fingerprint, make_recipe
from rats.stages.plan.plan import plan_rollout
from rats.stages.rollout.columns import check_recipe
from rats.stages.rollout.rollout import read_recipe, rollout_stage
from tests.support import tiny
from tests.support.model_fuzz import PROMPT, WRITERS, opened
from tests.support.project import write_project

LENGTHS = {family: settings.get("max_sequence_length", tiny.LENGTH) for family, (_, settings) in WRITERS.items()}
CHANGES: dict[str, Any] = {
    "steps": 5,
    "nfe": (3,),
    "horizons": "all",
    "guidance_scale": 9.0,
    "true_cfg_scale": 3.25,
    "negative_prompt": "a house at night",
    "height": 32,
    "width": 32,
    "frames": 9,
    "scored_frames": 3,
    "noises_per_prompt": 2,
    "seed": 7,
}
"""By field: another value than `before` gives it. That of `max_sequence_length` is one less."""


def before(family: str, scale: float) -> dict[str, Any]:
    """Settings of the tiny model; `scale` of true CFG."""
    sizes = {"height": 16, "width": 16, "max_sequence_length": LENGTHS[family], "steps": 4, "nfe": (2,)}
    return {**sizes, **WRITERS[family][1], "true_cfg_scale": scale, "negative_prompt": "two red apples"}


@pytest.fixture(scope="module")
def opened_once(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, bool], FamilyTeacher]:
    """Filled by `teacher_of`: every model is opened once."""
    return {}


def teacher_of(family: str, embeds: bool, known: dict[tuple[str, bool], FamilyTeacher], folder: Path) -> FamilyTeacher:
    if (family, embeds) not in known:
        write = WRITERS[family][0]
        model = tiny.write_flux(folder / "model", guidance_embeds=True) if embeds else write(folder / "model")
        known[family, embeds] = opened(family, model).open_teacher()
    return known[family, embeds]


def with_settings(teacher: FamilyTeacher, settings: TeacherParams, cls: Any = None) -> FamilyTeacher:
    """The same parts under other settings."""
    family = (cls or type(teacher.family))(settings, teacher.vae)
    parts = {name: getattr(teacher._text._pipeline, name) for name in (*family.encoders, *family.tokenizers)}  # type: ignore[union-attr]
    return FamilyTeacher(family, teacher.network, teacher.vae, teacher.scheduler, FamilyText(family, parts))


def recipe_of(teacher: FamilyTeacher) -> Recipe:
    values = {"model": {"path": "m"}, "prompts": {"train": "p.txt"}, "train": {"reward": "none"}}
    params = Params.model_validate(values).model_copy(update={"teacher": teacher.settings})
    return make_recipe(params, {}, "", *teacher.grids(), teacher.latent_shape(), teacher.ignored)


def stored(teacher: FamilyTeacher, recipe: Recipe) -> str:
    """Hash of what a rollout stores of one sample: its embeddings, and the kept states in float16."""
    conditioning = teacher.encode([PROMPT])
    start = noise(teacher.settings.seed, prompt_id(PROMPT), 0, teacher.latent_shape())[None]
    states, _ = euler(lambda x, s: teacher.guided_velocity(x, s, conditioning), start, recipe.sigmas)
    kept = [states[row].half() for row in rows_of(recipe.sigmas, recipe.horizons)]
    digest = hashlib.sha256()
    for tensor in (*(conditioning[name] for name in sorted(conditioning)), *kept):
        digest.update(f"{tuple(tensor.shape)}".encode() + tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def refused(teacher: FamilyTeacher, field: str) -> bool:
    """Whether the family has no such setting, and says so."""
    cls = type(teacher.family)
    return (field == "frames" and not cls.is_video) or (field == "guidance_scale" and not cls.embeds_guidance)


FIELDS = sorted({*CHANGES, "max_sequence_length"})
SLOW = [family for family in WRITERS if family != "flux"]
KINDS = [
    *(("flux", embeds, scale) for embeds in (False, True) for scale in (1.0, 2.5)),
    *(pytest.param(family, False, scale, marks=pytest.mark.slow) for family in SLOW for scale in (1.0, 2.5)),
]


def test_every_setting_of_the_teacher_is_walked() -> None:
    assert set(FIELDS) == set(TeacherParams.model_fields)


@pytest.mark.parametrize(("family", "embeds", "scale"), KINDS)
def test_the_address_moves_exactly_when_the_bytes_do(
    family: str, embeds: bool, scale: float, opened_once: dict[tuple[str, bool], FamilyTeacher], tmp_path: Path
) -> None:
    parts, values = teacher_of(family, embeds, opened_once, tmp_path), before(family, scale)
    moved: dict[str, tuple[bool, bool]] = {}
    teacher = with_settings(parts, TeacherParams(**values))
    here, bytes_here = recipe_of(teacher), stored(teacher, recipe_of(teacher))
    for field in (field for field in FIELDS if not refused(teacher, field)):
        value = CHANGES.get(field, LENGTHS[family] - 1)
        other = with_settings(parts, TeacherParams(**{**values, field: value}))
        there = recipe_of(other)
        moved[field] = fingerprint(there) != fingerprint(here), stored(other, there) != bytes_here
    assert {field: (address, data) for field, (address, data) in moved.items() if address != data} == {}
    assert moved.get("guidance_scale", (embeds,) * 2)[0] == embeds
    assert moved["negative_prompt"][0] == (scale > 1)


class PooledFlux(Flux):
    """A family that cuts all prompts to one length, whatever the settings say."""

    ignored = ("max_sequence_length",)

    def encode(self, pipeline: Any, prompt: str) -> Any:
        sequence, pooled, _ = pipeline.encode_prompt(prompt, max_sequence_length=5, device="cpu")
        return {"prompt_embeds": sequence, "pooled_prompt_embeds": pooled}


def test_a_family_says_which_settings_it_does_not_read(
    opened_once: dict[tuple[str, bool], FamilyTeacher], tmp_path: Path
) -> None:
    parts, values = teacher_of("flux", True, opened_once, tmp_path), before("flux", 2.5)
    found = []
    for length in (6, 7):
        settings = TeacherParams(**{**values, "max_sequence_length": length})
        teacher = with_settings(parts, settings, PooledFlux)
        found.append((fingerprint(recipe_of(teacher)), stored(teacher, recipe_of(teacher))))
    assert found[0] == found[1]


def test_a_rollout_with_another_setting_of_no_effect_finds_the_set(models: Path, tmp_path: Path) -> None:
    plain = {"true_cfg_scale": 1.0, "negative_prompt": "two red apples"}

    def params(**teacher: Any) -> Params:
        return Params.model_validate(write_project(models, tmp_path, rewards=[], teacher=plain | teacher))

    made = rollout_stage(params(), "train")
    for change in ({"negative_prompt": "a yellow star"}, {"guidance_scale": 7.5}):
        planned = plan_rollout(params(**change), "train")
        assert (planned["fingerprint"], planned["samples_missing"]) == (made.fingerprint, 0)
    assert plan_rollout(params(true_cfg_scale=2.5), "train")["samples_missing"] == made.samples


def test_an_older_set_that_names_a_setting_without_effect_is_of_these_parameters(models: Path, tmp_path: Path) -> None:
    params = Params.model_validate(write_project(models, tmp_path, teacher={"true_cfg_scale": 1.0}))
    model = Model.of(params)
    named = {"negative_prompt": "two red apples", "guidance_scale": 7.5}
    older = ShardSet.open_or_create(tmp_path / "store", read_recipe(params, model).model_copy(update=named))
    check_recipe(params, model, older)
    other = older.recipe.model_copy(update={"seed": 5})
    with pytest.raises(DataError, match="another seed"):
        check_recipe(params, model, ShardSet.open_or_create(tmp_path / "store", other))
