"""The store: plans, shards, snapshots, scores and what is published."""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset

from rats.pipeline.store.embeddings import has_embedding, read_embedding
from rats.pipeline.store.scores import (
    read_scores,
    record_reward,
    reward_column,
    reward_columns,
    score_rows,
    scores_done,
    write_scores,
)
from rats.pipeline.store.shard_set import ShardSet
from rats.pipeline.store.shards import SampleArrays, read_sample, verify_shard, write_shard
from rats.schemas.errors import ConfigError, DataError
from rats.schemas.identity import KEY_PATTERN
from rats.schemas.manifest import PlannedSample, ScoreRow
from tests.support.project import tree
from tests.support.shards import (
    HORIZONS,
    embed,
    fill,
    in_order,
    latents,
    params,
    recipe_of,
    score,
    wanted,
    write_samples,
    write_set,
)


def test_the_address_is_the_sha256_of_recipe_json(tmp_path: Path) -> None:
    shards = write_set(tmp_path)
    assert shards.root.name == shards.fingerprint
    assert hashlib.sha256((shards.root / "recipe.json").read_bytes()).hexdigest() == shards.fingerprint
    assert ShardSet.open(shards.root).recipe == recipe_of(params())


def test_what_is_written_is_read_back_bit_for_bit(tmp_path: Path) -> None:
    shards = write_set(tmp_path)
    rows = shards.index(shards.snapshot())
    samples = {sample.key: sample for sample in wanted()}
    assert [row.key for row in rows] == sorted(samples)
    for row in rows:
        arrays = read_sample(shards, row)
        for name, array in latents(samples[row.key], len(shards.recipe.horizons)).items():
            np.testing.assert_array_equal(arrays[name], array)
    assert all(verify_shard(shards, name, digest) for name, digest in shards.snapshot().shards.items())


def test_two_stores_hold_the_same_bytes(tmp_path: Path) -> None:
    one = write_set(tmp_path / "one")
    two = write_set(tmp_path / "two", wanted()[::-1])
    assert one.snapshot() == two.snapshot()
    for name in sorted(name for name in tree(one.root) if not name.startswith("locks/")):
        assert (one.root / name).read_bytes() == (two.root / name).read_bytes(), name


def test_shards_open_in_plain_webdataset_with_every_sample_whole(tmp_path: Path) -> None:
    shards = write_set(tmp_path)
    keys = []
    for name in sorted(shards.snapshot().shards):
        with shards.shard_path(name).open("rb") as file:
            stream = webdataset.tariterators.tar_file_expander([{"url": name, "stream": file}])
            for sample in webdataset.tariterators.group_by_keys(stream):
                assert set(sample) >= {"latents.safetensors", "json"}
                about = json.loads(sample["json"])
                assert about["sigmas"] == list(shards.recipe.horizons)
                assert about["key"] == sample["__key__"]
                keys.append(sample["__key__"])
    assert sorted(keys) == sorted(sample.key for sample in wanted())


def test_members_are_plain_and_carry_no_time_or_owner(tmp_path: Path) -> None:
    shards = write_set(tmp_path)
    with tarfile.open(shards.shard_path("rollout-000000"), "r:") as tar:
        for member in tar:
            assert (member.mtime, member.uid, member.gid, member.uname) == (0, 0, 0, "rats")
            assert member.isreg() and re.match(KEY_PATTERN, member.name.split(".")[0])
            assert member.name.endswith((".latents.safetensors", ".json"))


def test_a_second_plan_returns_the_first_and_writing_again_consumes_nothing(tmp_path: Path) -> None:
    shards = write_set(tmp_path)
    plans = shards.plan(wanted()[::-1], 3)
    assert [len(plan.samples) for plan in plans] == [4, 4, 2]

    def forbidden() -> object:
        raise AssertionError("a finished shard was made again")
        yield

    for plan in plans:
        assert write_shard(shards, plan, forbidden()) == shards.done(plan.shard)  # type: ignore[arg-type]


def test_a_killed_run_finds_its_shards_as_they_were_planned(tmp_path: Path) -> None:
    shards = ShardSet.open_or_create(tmp_path, recipe_of(params()))
    first = shards.plan(wanted(), 4)
    write_shard(shards, first[1], fill(shards, first[1]))
    again = ShardSet.open_or_create(tmp_path, recipe_of(params())).plan(wanted(prompts=6), 4)
    assert again[: len(first)] == first
    assert [plan.shard for plan in again if shards.done(plan.shard)] == ["rollout-000001"]
    new = {sample.key for sample in again[-1].samples}
    assert new == {sample.key for sample in wanted(6)} - {sample.key for sample in wanted(5)}


def test_of_two_writers_of_one_shard_the_first_wins_and_both_agree(tmp_path: Path) -> None:
    shards = ShardSet.open_or_create(tmp_path, recipe_of(params()))
    plan = shards.plan(wanted(1), 4)[0]
    first = []

    def slow() -> Iterator[SampleArrays]:
        first.append(write_shard(shards, plan, fill(shards, plan)))
        for sample, arrays in fill(shards, plan):
            yield sample, {name: -array for name, array in arrays.items()}

    assert write_shard(shards, plan, slow()) == first[0] == shards.done(plan.shard)
    assert verify_shard(shards, plan.shard) == first[0]
    assert not list(tmp_path.rglob("*.tmp"))


def test_growth_writes_a_new_snapshot_and_leaves_the_old_one_readable(tmp_path: Path) -> None:
    shards = write_set(tmp_path)
    old, old_rows = shards.snapshot(), shards.index(shards.snapshot())
    before = {name: (shards.root / name).stat().st_mtime_ns for name in tree(shards.root) if "locks" not in name}
    new = write_samples(shards, wanted(prompts=5, noises=3))
    assert (old.number, new.number, old.samples, new.samples) == (1, 2, 10, 15)
    assert shards.snapshot(1) == old and shards.index(old) == old_rows
    assert set(old.shards) < set(new.shards)
    assert before == {name: (shards.root / name).stat().st_mtime_ns for name in before}


def test_the_same_samples_give_the_snapshot_that_is_there(tmp_path: Path) -> None:
    shards = write_set(tmp_path)
    first = shards.snapshot()
    write_samples(shards, wanted(prompts=2))
    assert write_samples(shards, wanted()[::-1]) == first
    assert shards.snapshots() == [1, 2]


def test_a_snapshot_of_unmade_samples_is_refused(tmp_path: Path) -> None:
    shards = write_set(tmp_path)
    shards.plan(wanted(prompts=6), 4)
    with pytest.raises(DataError, match="2 samples are not rolled out yet"):
        shards.write_snapshot(sample.key for sample in wanted(prompts=6))


def test_a_sample_wanted_twice_is_refused(tmp_path: Path) -> None:
    shards = ShardSet.open_or_create(tmp_path, recipe_of(params()))
    with pytest.raises(ConfigError, match="wanted twice"):
        shards.plan([*wanted(1), *wanted(1)], 4)


def test_another_recipe_has_another_folder(tmp_path: Path) -> None:
    assert write_set(tmp_path).root != ShardSet.open_or_create(tmp_path, recipe_of(params(seed=1))).root


def spoiled(sample: PlannedSample, case: str) -> tuple[PlannedSample, dict[str, np.ndarray]]:
    arrays = latents(sample, HORIZONS)
    if case == "inf":
        arrays["x"][0, 0, 0] = np.inf
    elif case == "nan":
        arrays["x0"][0, 0, 0] = np.nan
    elif case == "dtype":
        arrays["x"] = arrays["x"].astype(np.float32)
    elif case == "rows":
        arrays["x"] = arrays["x"][1:]
    elif case == "names":
        arrays["y"] = arrays.pop("x0")
    else:
        sample = sample.model_copy(update={"key": "other"})
    return sample, arrays


@pytest.mark.parametrize("case", ["inf", "nan", "dtype", "rows", "names", "key"])
def test_a_sample_that_is_not_as_planned_is_refused_and_leaves_no_shard(tmp_path: Path, case: str) -> None:
    shards = ShardSet.open_or_create(tmp_path, recipe_of(params()))
    plan = shards.plan(wanted(1), 4)[0]
    with pytest.raises(DataError, match=r"sample|planned"):
        write_shard(shards, plan, [spoiled(sample, case) for sample in plan.samples])
    assert set(tree(shards.root / "shards")) == {"rollout-000000.plan.json"}


@pytest.mark.parametrize("change", [slice(0, -1), slice(0, 0)])
def test_too_few_samples_are_refused(tmp_path: Path, change: slice) -> None:
    shards = ShardSet.open_or_create(tmp_path, recipe_of(params()))
    plan = shards.plan(wanted(1), 4)[0]
    with pytest.raises(DataError, match="2 planned samples, got"):
        write_shard(shards, plan, fill(shards, plan)[change])
    with pytest.raises(DataError, match="2 planned samples, got"):
        write_shard(shards, plan, fill(shards, plan) * 2)


def test_the_stream_goes_on_from_a_position_as_if_it_had_never_stopped(tmp_path: Path) -> None:
    shards = write_set(tmp_path)
    whole = in_order(shards, shards.snapshot(), seed=3)
    keys = [next(whole)[0].key for _ in range(25)]
    for position in (0, 1, 9, 10, 24):
        resumed = in_order(ShardSet.open(shards.root), shards.snapshot(), seed=3, position=position)
        assert [next(resumed)[0].key for _ in range(25 - position)] == keys[position:]
    assert sorted(keys[:10]) == sorted(keys[10:20]) == sorted(sample.key for sample in wanted())


def test_growth_does_not_change_the_order_of_a_run_under_way(tmp_path: Path) -> None:
    shards = write_set(tmp_path)
    snapshot = shards.snapshot()
    before = [row.key for row, _ in (next(in_order(shards, snapshot, 0, i)) for i in range(20))]
    write_samples(shards, wanted(prompts=7))
    assert before == [row.key for row, _ in (next(in_order(shards, snapshot, 0, i)) for i in range(20))]


def test_scores_are_read_by_key_and_a_failed_one_is_never_a_number(tmp_path: Path) -> None:
    shards = write_set(tmp_path)
    reward = score(shards)
    keys = [sample.key for sample in wanted()]
    assert read_scores(shards, reward, keys) == {sample.key: sample.noise_index / 2 for sample in wanted()}
    bad = shards.plans()[0].samples[0].key
    rows = [ScoreRow(key=s.key, score=1.0) for s in shards.plans()[0].samples if s.key != bad]
    rows.append(ScoreRow(key=bad, score=None, status="failed", error="no"))
    write_scores(shards, reward, "rollout-000000", rows)
    assert bad not in read_scores(shards, reward, keys)
    assert [row.error for row in score_rows(shards, reward, "rollout-000000") if row.key == bad] == ["no"]


@pytest.mark.parametrize("row", [{"score": None}, {"score": 1.0, "status": "failed"}, {"score": float("nan")}])
def test_a_score_is_a_finite_number_or_an_error(row: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="score"):
        ScoreRow.model_validate({"key": "a", **row})


def test_unscored_samples_and_foreign_scores_are_refused(tmp_path: Path) -> None:
    shards = write_set(tmp_path)
    reward = score(shards)
    assert all(scores_done(shards, reward, plan.shard) for plan in shards.plans())
    write_samples(shards, wanted(prompts=6))
    assert not scores_done(shards, reward, "rollout-000003")
    with pytest.raises(DataError, match="2 samples have no score"):
        read_scores(shards, reward, [sample.key for sample in wanted(prompts=6)])
    with pytest.raises(DataError, match="not for its samples"):
        write_scores(shards, reward, "rollout-000000", [ScoreRow(key="a", score=0.0)])


def test_a_column_is_found_by_name_and_knows_what_made_it(tmp_path: Path) -> None:
    shards = write_set(tmp_path)
    reward = score(shards)
    assert reward_column(shards, "hps") == (reward, reward_columns(shards)[reward])
    assert reward_columns(shards)[reward].hashes["vae"] == "b" * 64
    assert record_reward(shards, "hps", {"reward": "e" * 64, "vae": "b" * 64}) != reward
    with pytest.raises(DataError, match="2 columns"):
        reward_column(shards, "hps")
    with pytest.raises(DataError, match="0 columns"):
        reward_column(shards, "pick")


def test_embeddings_come_back_in_their_own_dtype(tmp_path: Path) -> None:
    shards = write_set(tmp_path)
    embed(shards, wanted())
    one = wanted()[0].prompt_id
    tensors = read_embedding(shards, one)
    assert has_embedding(shards, one) and not has_embedding(shards, "0" * 64)
    assert tensors["context"].dtype == torch.bfloat16
    assert torch.equal(tensors["pooled"], torch.arange(4.0))


def test_written_files_obey_the_umask(tmp_path: Path) -> None:
    shards = write_set(tmp_path)
    mask = os.umask(0)
    os.umask(mask)
    for path in (shards.shard_path("rollout-000000"), shards.root / "recipe.json"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o444 & ~mask
