"""`rats shards diff`: what sets two shard sets apart, in words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rats.pipeline.store.publish import publish
from rats.pipeline.store.scores import record_reward, write_scores
from rats.pipeline.store.shard_set import ShardSet
from rats.pipeline.store.shards import write_shard
from rats.schemas.errors import DataError
from rats.schemas.manifest import ScoreRow
from rats.schemas.recipe import ComputeRecipe, Recipe
from rats.stages.shards.diff import compare_sets, diff_lines, recipe_differences
from tests.support.project import rats
from tests.support.shards import fill, params, recipe_of, score, wanted, write_samples, write_set

RECIPE = recipe_of(params())


def flipped(name: str, value: Any) -> Any:
    """Another value of the same kind."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, str):
        return "f" * 64 if len(value) == 64 else value + "x"
    if isinstance(value, tuple):
        return (*value[:5], value[5] - 0.001, *value[6:]) if name in ("sigmas", "horizons") else (*value, 1)
    if isinstance(value, dict):
        return {part: flipped(part, text) for part, text in value.items()}
    return ComputeRecipe(**flipped(name, value.model_dump())) if isinstance(value, ComputeRecipe) else value + 1


@pytest.mark.parametrize("name", Recipe.model_fields)
def test_every_field_of_the_recipe_is_named_when_it_differs_and_no_other(name: str) -> None:
    value = getattr(RECIPE, name)
    other = RECIPE.model_copy(update={name: flipped(name, value)})
    found = recipe_differences(RECIPE, other)
    parts = value.model_dump() if isinstance(value, ComputeRecipe) else value
    expected = {f"{name}.{part}" for part in parts} if isinstance(parts, dict) else {name}
    assert {difference.field for difference in found} == expected
    assert all(" in A, " in difference.words for difference in found)
    assert recipe_differences(RECIPE, RECIPE) == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"true_cfg_scale": 3.0}, "true_cfg_scale: 1.0 in A, 3.0 in B"),
        ({"negative_prompt": "blur"}, "negative_prompt: '' in A, 'blur' in B"),
        ({"weights": {"transformer": "e" * 64}}, "weights of transformer: aaaaaaaaaaaa in A, eeeeeeeeeeee in B"),
        (
            {"weights": {**RECIPE.weights, "text_encoder_2": "e" * 64}},
            "weights of text_encoder_2: none in A, eeeeeeeeeeee in B",
        ),
        ({"horizons": RECIPE.sigmas}, "horizons: 15 in A, 51 in B"),
        ({"sigmas": RECIPE.horizons}, "sigmas: 50 steps in A, 14 in B"),
        (
            {"sigmas": flipped("sigmas", RECIPE.sigmas)},
            "sigmas: 50 steps in both, 1 differ, the first at 5: 0.9000 in A, 0.8990 in B",
        ),
        ({"compute": RECIPE.compute.model_copy(update={"threads": 8})}, "compute: threads: 1 in A, 8 in B"),
    ],
)
def test_a_difference_reads_as_a_person_would_say_it(change: dict[str, Any], words: str) -> None:
    (found,) = recipe_differences(RECIPE, RECIPE.model_copy(update=change))
    assert found.words == words


def test_a_published_folder_and_its_set_are_the_same(tmp_path: Path) -> None:
    shards = write_set(tmp_path / "store")
    publish(shards, shards.snapshot(), tmp_path / "out", [score(shards)])
    result = compare_sets(shards.root, tmp_path / "out")
    assert result["same"] and result["differences"] == [] and result["samples_in_both"] == 10
    assert "they are the same" in diff_lines(result)[-1]


def test_growth_is_said_in_samples_prompts_and_noises(tmp_path: Path) -> None:
    shards = write_set(tmp_path, wanted(prompts=2, noises=2))
    write_samples(shards, wanted(prompts=3, noises=3))
    result = compare_sets(shards.root, shards.root, 1, 2)
    assert not result["same"] and result["samples_in_both"] == 4
    _, _, *lines = diff_lines(result)
    assert lines[0] == "one recipe"
    assert lines[1].startswith("5 samples only in B: ") and lines[1].endswith(" and 2 more")
    assert lines[2:] == ["1 prompts only in B: 'a picture of thing 2'", "noises: 0 to 1 in A, 0 to 2 in B"]
    only = next(part for part in result["differences"] if part["field"] == "samples")
    assert only["a"] == [] and len(only["b"]) == 5
    back = compare_sets(shards.root, shards.root, 2, 1)
    assert any(part["words"].startswith("5 samples only in A: ") for part in back["differences"])


def test_samples_of_one_key_with_other_bytes_are_found(tmp_path: Path) -> None:
    one = write_set(tmp_path / "one", wanted(2))
    two = ShardSet.open_or_create(tmp_path / "two", recipe_of(params()))
    (plan,) = two.plan(wanted(2), 4)
    samples = fill(two, plan)
    samples[1][1]["x"][0, 0, 0] += np.float16(1)
    write_shard(two, plan, samples)
    two.write_snapshot(sample.key for sample in wanted(2))
    result = compare_sets(one.root, two.root)
    (found,) = result["differences"]
    assert found["words"] == f"1 of the 4 samples in both have other bytes: {plan.samples[1].key}"
    assert found["a"][0]["blake3"] != found["b"][0]["blake3"]


def test_columns_of_scores_say_which_of_their_hashes_differ(tmp_path: Path) -> None:
    one, two = write_set(tmp_path / "one", wanted(1)), write_set(tmp_path / "two", wanted(1))
    score(one)
    for name, hashes in (("hps", {"reward": "d" * 64, "vae": "e" * 64}), ("pick", {"reward": "d" * 64})):
        column = record_reward(two, name, hashes)
        write_scores(two, column, "rollout-000000", [ScoreRow(key=s.key, score=0.0) for s in wanted(1)])
    words = [part["words"] for part in compare_sets(one.root, two.root)["differences"]]
    assert [line.partition(" (")[0] for line in words] == ["scores by hps", "scores by hps", "scores by pick"]
    assert words[0].endswith(") only in A: vae bbbbbbbbbbbb, there eeeeeeeeeeee")
    assert words[1].endswith(") only in B: vae eeeeeeeeeeee, there bbbbbbbbbbbb") and words[2].endswith("only in B")


def test_a_set_without_a_snapshot_is_compared_by_its_recipe(tmp_path: Path) -> None:
    one = write_set(tmp_path, wanted(1))
    two = ShardSet.open_or_create(tmp_path, recipe_of(params(seed=1)))
    words = [part["words"] for part in compare_sets(one.root, two.root)["differences"]]
    assert words[:2] == ["seed: 0 in A, 1 in B", "B has no snapshot yet"]
    with pytest.raises(DataError, match=r"0009\.json is missing"):
        compare_sets(one.root, one.root, 9)


def test_the_command_prints_words_or_data_and_exits_0_either_way(tmp_path: Path) -> None:
    one = write_set(tmp_path / "store", wanted(1))
    two = ShardSet.open_or_create(tmp_path / "store", recipe_of(params(seed=1)))
    write_samples(two, wanted(1))
    paths = [str(shards.root) for shards in (one, two)]
    assert "seed: 0 in A, 1 in B" in rats(tmp_path, "shards", "diff", *paths).stdout.splitlines()
    data = json.loads(rats(tmp_path, "shards", "diff", *paths, "--json").stdout)
    assert [part["field"] for part in data["differences"]] == ["seed"] and not data["same"]
    assert "they are the same" in rats(tmp_path, "shards", "diff", paths[0], paths[0]).stdout
