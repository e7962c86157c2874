"""The content address: every field of params.yaml is on one of two lists, and flipping it proves which."""

from __future__ import annotations

import json
import subprocess
import sys
import typing
from collections.abc import Iterator
from typing import Any

import pytest
from pydantic import BaseModel

from rats.schemas.canonical import canonical_json
from rats.schemas.manifest import IndexRow, snapshot_hash
from rats.schemas.params import Params
from rats.schemas.recipe import IN_RECIPE, NEUTRAL, NOT_IN_RECIPE, Recipe, fingerprint
from tests.support.shards import params, recipe_of


def leaves(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Dotted names of all fields that are no block."""
    for name, field in model.model_fields.items():
        annotation: Any = field.annotation
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            yield from leaves(annotation, f"{prefix}{name}.")
        else:
            yield prefix + name


def listed(dotted: str, names: tuple[str, ...]) -> bool:
    return any(dotted == name or dotted.startswith(name + ".") for name in names)


def flipped(block: BaseModel, dotted: str) -> Any:
    """A copy in which the field has another value, of its type where that is possible."""
    name, _, rest = dotted.partition(".")
    value = getattr(block, name)
    return block.model_copy(update={name: flipped(value, rest) if rest else other(value)})


def other(value: Any) -> Any:
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    if isinstance(value, tuple):
        return value[:-1] or ("more",)
    if isinstance(value, dict):
        return {**value, "more": "more"}
    return f"{value}-other"


FIELDS = sorted(leaves(Params))
GUIDED = {"true_cfg_scale": 2.5}
"""With it every setting of the teacher has an effect."""


@pytest.mark.parametrize("field", FIELDS)
def test_every_field_is_on_exactly_one_list(field: str) -> None:
    assert listed(field, IN_RECIPE) + listed(field, NOT_IN_RECIPE) == 1, f"{field}: does it change a sample's bytes?"


@pytest.mark.parametrize("field", FIELDS)
def test_a_flipped_field_moves_the_address_exactly_when_it_is_in_the_recipe(field: str) -> None:
    before, after = params(**GUIDED), flipped(params(**GUIDED), field)
    assert before != after
    assert (fingerprint(recipe_of(before)) != fingerprint(recipe_of(after))) == listed(field, IN_RECIPE)


@pytest.mark.parametrize("field", sorted(NEUTRAL))
def test_a_setting_without_effect_leaves_the_address_where_its_default_puts_it(field: str) -> None:
    before, after = params(**GUIDED), flipped(params(**GUIDED), f"teacher.{field}")
    assert fingerprint(recipe_of(after).effective([field])) == fingerprint(recipe_of(before))


def test_a_negative_prompt_needs_guidance() -> None:
    prompt = {"negative_prompt": "a house at night"}
    assert fingerprint(recipe_of(params(**prompt))) == fingerprint(recipe_of(params()))
    assert recipe_of(params(**prompt, **GUIDED)).negative_prompt == "a house at night"


@pytest.mark.parametrize("name", [*IN_RECIPE, *NOT_IN_RECIPE])
def test_no_list_names_a_field_that_is_gone(name: str) -> None:
    assert any(listed(field, (name,)) for field in FIELDS)


@pytest.mark.parametrize("name", sorted(set(Recipe.model_fields) - {"format_version", "latent_dtype"}))
def test_every_part_of_the_recipe_is_in_the_address(name: str) -> None:
    recipe = recipe_of(params())
    value = getattr(recipe, name)
    changed = recipe.model_copy(update={name: flipped(value, "threads") if name == "compute" else other(value)})
    assert fingerprint(changed) != fingerprint(recipe)


def test_the_decoder_is_not_in_the_address_because_no_trajectory_depends_on_it() -> None:
    assert set(recipe_of(params()).weights) == {"transformer"}


def test_the_address_names_the_kind_of_device_and_not_its_number() -> None:
    def on(device: str) -> str:
        settings = params()
        compute = settings.compute.model_copy(update={"device": device})
        return fingerprint(recipe_of(settings.model_copy(update={"compute": compute})))

    assert on("cuda:0") == on("cuda:1") == on("cuda") != on("cpu")


def test_a_recipe_read_back_has_the_same_address() -> None:
    recipe = recipe_of(params())
    text = canonical_json(recipe.model_dump(mode="json"))
    assert fingerprint(Recipe.model_validate_json(text)) == fingerprint(recipe)
    assert json.loads(text)["sigmas"] == list(recipe.sigmas)


def test_the_address_of_a_fixed_recipe_never_changes() -> None:
    settings = params(nfe=[3], steps=5, seed=7)
    assert fingerprint(recipe_of(settings)) == "7c335febe531bc0eaa49026fb9283258f6ff7686d1b6338922421352d9b6e060"


def test_schemas_load_no_torch() -> None:
    code = (
        "import sys, rats.schemas.params, rats.schemas.recipe, rats.schemas.manifest, rats.schemas.reports,"
        " rats.schemas.horizons; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_snapshot_hash_does_not_depend_on_order_or_place() -> None:
    row = {"prompt_id": "0" * 64, "prompt": "p", "noise_index": 0, "length": 1, "blake3": "1" * 64}
    a, b = (IndexRow(key=key, shard="rollout-000000", offset=0, **typing.cast(Any, row)) for key in "ab")
    moved = b.model_copy(update={"shard": "rollout-000009", "offset": 512})
    assert snapshot_hash([a, b]) == snapshot_hash([moved, a]) != snapshot_hash([a])
    assert snapshot_hash([a.model_copy(update={"blake3": "2" * 64}), b]) != snapshot_hash([a, b])
