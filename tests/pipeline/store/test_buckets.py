"""Stores beyond the local disk: fsspec's memory file system, and a real S3 API on loopback."""

from __future__ import annotations

import threading
import uuid
from pathlib import Path

import numpy as np
import pytest
import torch

from rats.pipeline.files import cache
from rats.pipeline.files.cache import Cache
from rats.pipeline.files.places import Place, open_place
from rats.pipeline.files.remote import RemotePlace
from rats.pipeline.store.embeddings import read_embedding
from rats.pipeline.store.publish import publish
from rats.pipeline.store.scores import read_scores, reward_column, reward_columns
from rats.pipeline.store.shard_set import ShardSet
from rats.pipeline.store.shards import read_sample, verify_shard, write_shard
from rats.schemas.errors import ConfigError, DataError, StorageError
from tests.support.shards import embed, fill, in_order, params, recipe_of, score, wanted, write_samples, write_set

pytestmark = pytest.mark.usefixtures("own_cache")
S3 = pytest.param("s3", marks=pytest.mark.slow)


@pytest.fixture(params=["memory", S3])
def store(request: pytest.FixtureRequest) -> Place:
    """An empty remote store."""
    base = "memory://stores" if request.param == "memory" else request.getfixturevalue("s3")
    return open_place(f"{base}/{uuid.uuid4().hex}")


def names(place: Place) -> set[str]:
    """Names of all objects below a place."""
    assert isinstance(place, RemotePlace)
    return {name.removeprefix(place.path).lstrip("/") for name in place.fs.find(place.path)}


def test_a_remote_store_holds_the_bytes_of_a_local_one(store: Place, tmp_path: Path) -> None:
    remote, local = write_set(store), write_set(tmp_path)
    score(remote), score(local)
    found = {path.relative_to(local.root).as_posix() for path in local.root.rglob("*") if path.is_file()}
    assert names(remote.root) == {name for name in found if not name.startswith("locks/")}
    for name in names(remote.root):
        assert (remote.root / name).read_bytes() == (local.root / name).read_bytes(), name
    assert remote.snapshot() == local.snapshot()


def test_a_remote_set_is_planned_written_grown_scored_and_streamed_as_a_local_one(store: Place, tmp_path: Path) -> None:
    shards, local = write_set(store), write_set(tmp_path)
    old = shards.snapshot()
    assert write_samples(shards, wanted(7)).number == 2
    assert write_samples(shards, wanted()) == old
    reward = score(shards)
    assert read_scores(shards, reward_column(shards, "hps")[0], [wanted()[0].key]) == {wanted()[0].key: 0.0}
    assert list(reward_columns(shards)) == [reward]
    here, there = in_order(local, local.snapshot(), seed=3), in_order(ShardSet.open(str(shards.root)), old, seed=3)
    for _ in range(25):
        (row, arrays), (other, others) = next(here), next(there)
        assert row == other
        np.testing.assert_array_equal(arrays["x"], others["x"])
    assert all(verify_shard(shards, name, digest) for name, digest in old.shards.items())


def test_a_remote_set_is_published_into_a_folder_that_trains_without_the_store(store: Place, tmp_path: Path) -> None:
    shards = write_set(store)
    reward = score(shards)
    embed(shards, wanted())
    publish(shards, shards.snapshot(), tmp_path / "out", [reward])
    inode = (tmp_path / "out").stat().st_ino
    publish(shards, shards.snapshot(), tmp_path / "out", [reward])
    assert (tmp_path / "out").stat().st_ino == inode
    out = ShardSet.open(tmp_path / "out")
    assert out.index(out.snapshot()) == shards.index(shards.snapshot())
    assert torch.equal(read_embedding(out, wanted()[0].prompt_id)["pooled"], torch.arange(4.0))
    assert len(read_scores(out, reward, [sample.key for sample in wanted()])) == 10


@pytest.mark.parametrize("store", ["memory", "s3"], indirect=True)
def test_two_drivers_at_once_plan_each_sample_once_and_name_one_content(store: Place) -> None:
    """Without a lock: the store's own "create unless there is one" decides."""
    start, plans, snapshots = threading.Barrier(3), [], []

    def drive(prompts: int) -> None:
        shards = ShardSet.open_or_create(store, recipe_of(params()))
        start.wait()
        plans.append(shards.plan(wanted(prompts), 2))
        for plan in plans[-1]:
            write_shard(shards, plan, fill(shards, plan))
        start.wait()
        snapshots.append(shards.write_snapshot(sample.key for sample in wanted(prompts)))

    threads = [threading.Thread(target=drive, args=(prompts,)) for prompts in (6, 6, 4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    shards = ShardSet.open_or_create(store, recipe_of(params()))
    keys = [sample.key for plan in shards.plans() for sample in plan.samples]
    assert sorted(keys) == sorted(sample.key for sample in wanted(6))
    assert len({snapshot.hash for snapshot in snapshots}) == 2
    for number in shards.snapshots():
        assert shards.index(shards.snapshot(number))


def test_a_number_whose_index_was_left_by_a_killed_driver_is_passed_over(store: Place) -> None:
    shards = write_set(store)
    (shards.root / "index" / "0002.parquet").write(b"of a snapshot whose manifest never came")
    assert write_samples(shards, wanted(2)).number == 3
    assert shards.index(shards.snapshot(3))


def test_a_tar_without_its_document_is_no_shard_and_is_made_again(store: Place) -> None:
    shards = ShardSet.open_or_create(store, recipe_of(params()))
    plan = shards.plan(wanted(1), 4)[0]
    shards.shard_path(plan.shard).write(b"at worst what a killed writer left, were uploads not whole")
    assert shards.done(plan.shard) is None and shards.finished() == []
    assert write_shard(shards, plan, fill(shards, plan)) == verify_shard(shards, plan.shard)


def test_a_changed_cut_or_missing_object_is_found(store: Place) -> None:
    shards = write_set(store)
    row = shards.index(shards.snapshot())[0]
    path = shards.shard_path(row.shard)
    data = path.read_bytes()
    path.write(data[: row.offset] + b"\x00\x01" + data[row.offset + 2 :])
    with pytest.raises(DataError, match=f"damaged at sample {row.key}"):
        read_sample(shards, row)
    path.write(data[:-1])
    with pytest.raises(DataError, match="bytes"):
        shards.done(row.shard)
    path.unlink()
    with pytest.raises(DataError, match=r"missing.*rats stage rollout"):
        read_sample(shards, row)


def test_a_sample_is_fetched_once_and_a_spoiled_cache_is_fetched_again(
    store: Place, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = write_set(store)
    rows = shards.index(shards.snapshot())
    fetched: list[int] = []
    real = RemotePlace.read_range
    monkeypatch.setattr(RemotePlace, "read_range", lambda *a: fetched.append(1) or real(*a))
    for _ in range(2):
        for row in rows:
            read_sample(shards, row)
    assert len(fetched) == len(rows)
    for path in own_cache.glob("??/*"):
        path.write_bytes(path.read_bytes()[:-1] + b"!")
    read_sample(shards, rows[0])
    assert len(fetched) == len(rows) + 1


def test_the_cache_never_grows_beyond_its_bound_and_keeps_what_was_used_last(tmp_path: Path) -> None:
    small = Cache(tmp_path / "small", limit=10_000)
    held = []
    for i in range(100):
        name = f"{i:064d}"[::-1]
        assert small.get(name, lambda: bytes(700), lambda data: len(data) == 700) == bytes(700)
        small.get("0" * 64, lambda: bytes(900), lambda data: len(data) == 900)  # in use all the time
        held.append(sum(path.stat().st_size for path in small.folder.glob("??/*")))
    assert 5_000 < max(held) <= 10_000
    assert (small.folder / "00" / ("0" * 64)).exists()
    small.get("1" * 64, lambda: bytes(20_000), lambda data: True)
    assert not (small.folder / "11" / ("1" * 64)).exists()


def test_a_cache_that_cannot_be_written_costs_only_time(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert Cache(tmp_path / "file", 1000).get("a" * 64, lambda: b"data", lambda data: True) == b"data"


@pytest.mark.parametrize("text", ["", "-1", "many", "inf"])
def test_a_wrong_size_of_the_cache_is_named(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("RATS_CACHE_GIB", text)
    cache.shared.cache_clear()
    with pytest.raises(ConfigError, match="RATS_CACHE_GIB"):
        cache.shared()


def test_an_unknown_protocol_and_a_store_out_of_reach_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="'s4'"):
        open_place("s4://bucket/store")
    assert open_place("file:///a/b") == Path("/a/b") == open_place("/a/b")

    def fail(*args: object, **kwargs: object) -> None:
        raise TimeoutError("no route")

    place = open_place("memory://unreachable/x")
    monkeypatch.setattr(type(place.fs), "pipe_file", fail)
    with pytest.raises(StorageError, match=r"cannot write memory://.*no route.*run the same command again"):
        place.write(b"")
