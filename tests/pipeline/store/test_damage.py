"""Damage: every flipped bit, every cut, every missing or foreign file is found before a sample is used."""

from __future__ import annotations

import contextlib
import io
import os
import random
import re
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset

from rats.pipeline.store.scores import read_scores, scores_done
from rats.pipeline.store.shard_set import ShardSet
from rats.pipeline.store.shards import read_sample, write_shard
from rats.schemas.canonical import canonical_json
from rats.schemas.errors import DataError
from tests.support.damage import cut, files, flipped, read_all, used
from tests.support.shards import HORIZONS, params, recipe_of, score, wanted, write_samples, write_set

FORMAT_1 = Path(__file__).parents[2] / "fixtures" / "format-1"


def test_a_whole_set_is_read(copy: Path) -> None:
    read_all(copy)


def test_a_truncated_shard_is_refused_before_a_sample_is_used(copy: Path) -> None:
    shards = ShardSet.open(copy)
    row = shards.index(shards.snapshot())[0]
    path = shards.shard_path(row.shard)
    os.truncate(path, row.offset + row.length - 1)
    with pytest.raises(DataError, match=f"{row.shard}.*{row.key}.*rats stage rollout") as caught:
        read_sample(shards, row)
    assert caught.value.exit_code == 65 and "\n" not in str(caught.value)
    with pytest.raises(DataError, match="bytes"):
        shards.done(row.shard)


def spoil(folder: Path, damage: Callable[[bytes, random.Random], bytes], count: int) -> Counter[str]:
    """Damage one file at a time, `count` times: what training is given is unchanged or refused, always found.

    Returns how many were damaged by kind of file, and what plain WebDataset did with the shards among them.
    """
    generator, paths, expected, seen = random.Random(count), files(folder), used(folder), Counter[str]()
    for number in range(count):
        path = paths[number % len(paths)]
        data = path.read_bytes()
        spoiled = damage(data, generator)
        path.write_bytes(spoiled)
        with contextlib.suppress(DataError):
            assert used(folder) == expected, path
        with pytest.raises(DataError):
            read_all(folder)
        path.write_bytes(data)
        seen[path.name.partition(".")[2]] += 1
        if path.suffix == ".tar":
            seen["webdataset " + by_webdataset(data, spoiled)] += 1
    assert used(folder) == expected
    return seen


def by_webdataset(data: bytes, spoiled: bytes) -> str:
    """What WebDataset's own reader makes of a spoiled shard: "refused", "same" or "other" samples, unsaid."""
    try:
        return "same" if plain(spoiled) == plain(data) else "other"
    except Exception:  # whatever it raises, it said something
        return "refused"


def plain(data: bytes) -> list[dict[str, Any]]:
    """The samples of a shard as `webdataset` groups them."""
    stream = webdataset.tariterators.tar_file_expander([{"url": "a.tar", "stream": io.BytesIO(data)}])
    return list(webdataset.tariterators.group_by_keys(stream))


@pytest.mark.parametrize(("damage", "count"), [(flipped, 60), (cut, 30)])
def test_every_bit_flip_and_every_cut_is_found_wherever_it_is(copy: Path, damage: Any, count: int) -> None:
    spoil(copy, damage, count)


@pytest.mark.slow
@pytest.mark.parametrize(("damage", "count"), [(flipped, 3000), (cut, 1000)])
def test_all_of_thousands_are_found_where_webdataset_is_silent(tmp_path: Path, damage: Any, count: int) -> None:
    seen = spoil(Path(shutil.copytree(FORMAT_1, tmp_path / "copy")), damage, count)
    print(f"{count} x {damage.__name__}, all found: {dict(sorted(seen.items()))}")
    assert sum(number for kind, number in seen.items() if "webdataset" not in kind) == count
    assert seen["webdataset other"] + seen["webdataset same"] > 0


def test_every_missing_file_is_named(copy: Path) -> None:
    for path in sorted(path for path in copy.rglob("*") if path.is_file()):
        data = path.read_bytes()
        path.unlink()
        with pytest.raises(DataError):
            read_all(copy)
        path.write_bytes(data)


def test_shards_of_another_recipe_are_refused_with_both_addresses(whole: Path, tmp_path: Path) -> None:
    other = ShardSet.open_or_create(tmp_path / "store", recipe_of(params(seed=1)))
    shutil.copytree(whole / "manifests", other.root / "manifests")
    with pytest.raises(DataError, match=f"{ShardSet.open(whole).fingerprint[:12]}.*{other.fingerprint[:12]}"):
        other.snapshot()


def test_a_store_folder_under_a_wrong_address_is_refused(whole: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="not the one of its name"):
        ShardSet.open(Path(shutil.copytree(whole, tmp_path / ("0" * 64))))


def test_a_later_format_asks_for_a_newer_rats(copy: Path) -> None:
    path = copy / "recipe.json"
    path.write_bytes(path.read_bytes().replace(b'"format_version":1', b'"format_version":2'))
    with pytest.raises(DataError, match=r"format version 2.*update rats"):
        ShardSet.open(copy)


@pytest.mark.parametrize("data", [b"", b"[]", b"{}", b"null", b"[" * 100_000, b"\xff", b'{"format_version": "1"}'])
def test_what_is_no_recipe_is_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "recipe.json").write_bytes(data)
    with pytest.raises(DataError, match=r"recipe|format"):
        ShardSet.open(tmp_path)


def test_a_folder_that_is_no_shard_set_says_what_to_name(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="rats stage rollout"):
        ShardSet.open(tmp_path / "none")


def test_a_deleted_shard_is_made_again_with_the_same_bytes(tmp_path: Path) -> None:
    shards = write_set(tmp_path)
    snapshot, path = shards.snapshot(), shards.shard_path("rollout-000001")
    data = path.read_bytes()
    path.unlink()
    assert shards.done("rollout-000001") is None
    assert write_samples(shards, wanted()) == snapshot
    assert path.read_bytes() == data


def test_a_document_under_another_shards_name_is_refused(copy: Path) -> None:
    folder = copy / "shards"
    for suffix in (".tar", ".done.json"):
        shutil.copyfile(folder / f"rollout-000000{suffix}", folder / f"rollout-000001{suffix}")
    shards = ShardSet.open(copy)
    for look in (lambda: shards.done("rollout-000001"), shards.finished):
        with pytest.raises(DataError, match=r"rollout-000001.done.json describes another shard"):
            look()


def test_a_manifest_changed_by_hand_is_refused_even_when_it_is_valid_json(copy: Path) -> None:
    path = copy / "manifests" / "0001.json"
    path.write_bytes(re.sub(rb'"samples":6', b'"samples":5', path.read_bytes()))
    with pytest.raises(DataError, match="seal"):
        ShardSet.open(copy).snapshot()
    path.write_bytes(canonical_json({"seal": "0" * 64}))
    with pytest.raises(DataError, match="damaged"):
        ShardSet.open(copy).snapshot()


def test_scores_of_a_shard_that_was_made_again_differently_are_not_taken(tmp_path: Path) -> None:
    shards = write_set(tmp_path, wanted(2))
    reward = score(shards)
    shards.shard_path("rollout-000000").unlink()
    plan = shards.plans()[0]
    other = {"x": np.zeros((HORIZONS, 4, 8), np.float16), "x0": np.zeros((HORIZONS - 1, 4, 8), np.float16)}
    write_shard(shards, plan, [(sample, other) for sample in plan.samples])
    assert not scores_done(shards, reward, "rollout-000000")
    with pytest.raises(DataError, match="scores another"):
        read_scores(shards, reward, [sample.key for sample in plan.samples])
