"""Damage, hostile names, full disks and kills: found, refused, survived."""

from __future__ import annotations

import errno
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from rats.pipeline import atomic
from rats.pipeline.atomic import atomic_folder, atomic_path, atomic_write
from rats.pipeline.embeddings import read_embedding, write_embedding
from rats.pipeline.publish import publish
from rats.pipeline.reader import Stream, read_sample, verify_shard
from rats.pipeline.store import ShardSet
from rats.pipeline.writer import write_shard
from rats.schemas.canonical import canonical_json
from rats.schemas.errors import CannotCreateError, DataError, RatsError, StorageError
from rats.schemas.manifest import IndexRow, PlannedSample, ShardPlan
from tests.shards import HORIZONS, params, recipe_of, score, wanted, write_samples, write_set


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A published set with everything in it, for tests that copy it before they spoil it."""
    folder = tmp_path_factory.mktemp("damage")
    shards = write_set(folder / "store", wanted(prompts=3))
    reward = score(shards)
    for sample in wanted(prompts=3):
        write_embedding(shards, sample.prompt_id, {"context": torch.arange(3.0)})
    publish(shards, shards.snapshot(), folder / "out", [reward])
    return folder / "out"


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "copy"))


def read_all(folder: Path) -> None:
    """What training reads, and `rats shards verify`."""
    shards = ShardSet.open(folder)
    snapshot = shards.snapshot()
    stream = Stream(shards, snapshot, seed=0)
    for _ in range(snapshot.samples):
        row, _ = next(stream)
        read_embedding(shards, row.prompt_id)
    shards.read_scores(shards.reward_named("hps")[0], [row.key for row in stream.rows])
    for name, digest in snapshot.shards.items():
        verify_shard(shards, name, digest)


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


def test_every_bit_flip_and_every_cut_is_found_wherever_it_is(copy: Path) -> None:
    generator = random.Random(0)
    files = sorted(path for path in copy.rglob("*") if path.is_file())
    for path in files:
        data = path.read_bytes()
        for _ in range(6):
            bit = generator.randrange(8 * len(data))
            broken = bytearray(data)
            broken[bit // 8] ^= 1 << bit % 8
            path.write_bytes(broken)
            with pytest.raises(RatsError):
                read_all(copy)
        for length in {0, generator.randrange(len(data)), len(data) - 1}:
            path.write_bytes(data[:length])
            with pytest.raises(RatsError):
                read_all(copy)
        path.write_bytes(data)
    read_all(copy)


def test_every_missing_file_is_named(copy: Path) -> None:
    for path in sorted(path for path in copy.rglob("*") if path.is_file()):
        data = path.read_bytes()
        path.unlink()
        with pytest.raises(DataError):
            read_all(copy)
        path.write_bytes(data)


def test_a_link_or_a_device_in_place_of_a_file_is_refused(copy: Path, tmp_path: Path) -> None:
    for number, path in enumerate(sorted(path for path in copy.rglob("*") if path.is_file())):
        elsewhere = tmp_path / str(number)
        os.rename(path, elsewhere)
        path.symlink_to(elsewhere)
        with pytest.raises(DataError, match="link is refused"):
            read_all(copy)
        path.unlink()
        os.mkfifo(path)
        with pytest.raises(DataError):
            read_all(copy)
        path.unlink()
        os.rename(elsewhere, path)
    read_all(copy)


@pytest.mark.parametrize("name", ["../../etc/passwd", "pipe:id", "rollout-1", "rollout-000000\n", "/tmp/x", "a.b"])
def test_names_that_lead_out_of_the_folder_are_no_names(name: str) -> None:
    row = {"key": "a", "prompt_id": "0" * 64, "prompt": "p", "noise_index": 0}
    place = {"offset": 0, "length": 1, "blake3": "1" * 64}
    with pytest.raises(ValueError, match="shard"):
        IndexRow.model_validate({**row, **place, "shard": name})
    with pytest.raises(ValueError, match="shard"):
        ShardPlan(shard=name, samples=(PlannedSample.model_validate(row),))
    if name != "rollout-1":
        with pytest.raises(ValueError, match="key"):
            PlannedSample.model_validate({**row, "key": name})


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


def test_a_manifest_changed_by_hand_is_refused_even_when_it_is_valid_json(copy: Path) -> None:
    path = copy / "manifests" / "0001.json"
    path.write_bytes(re.sub(rb'"samples":6', b'"samples":5', path.read_bytes()))
    with pytest.raises(DataError, match="seal"):
        ShardSet.open(copy).snapshot()
    path.write_bytes(canonical_json({"seal": "0" * 64}))
    with pytest.raises(DataError, match="damaged"):
        ShardSet.open(copy).snapshot()


class FullDisk(OSError):
    """What a write raises when there is no room."""

    def __init__(self) -> None:
        super().__init__(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_at_any_write_tears_nothing_and_the_same_command_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = write_set(tmp_path / "undisturbed", wanted(3)).snapshot()
    real, allowed, calls = os.fsync, [0], [0]

    def fsync(handle: int) -> None:
        calls[0] += 1
        if calls[0] > allowed[0]:
            raise FullDisk
        real(handle)

    monkeypatch.setattr(atomic.os, "fsync", fsync)
    for allowed[0] in range(60):
        calls[0] = 0
        try:
            shards = write_set(tmp_path / "store", wanted(3))
        except StorageError as error:
            assert error.exit_code == 74 and re.search(
                r"disk full writing .*; free .*, run the same command", str(error)
            )
            assert not list(tmp_path.rglob("*.tmp"))
            continue
        assert shards.snapshot() == expected
        return
    raise AssertionError("it never got through")


def test_a_full_disk_keeps_the_old_file_and_says_how_much_to_free(tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    atomic_write(tmp_path / "a", b"old")
    with (
        pytest.raises(StorageError, match=r"disk full writing .*a; free some space"),
        atomic_path(tmp_path / "a") as path,
    ):
        path.write_bytes(b"new")
        Path("/dev/full").write_bytes(b"new")
    assert (tmp_path / "a").read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a"]


def test_a_full_disk_inside_safetensors_is_understood_too(tmp_path: Path) -> None:
    error = RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)")
    with pytest.raises(StorageError, match="disk full"), atomic_folder(tmp_path / "c"):
        raise error
    assert not list(tmp_path.iterdir())


def test_a_file_in_the_place_of_a_folder_cannot_be_created(tmp_path: Path) -> None:
    (tmp_path / "store").write_text("")
    with pytest.raises(CannotCreateError, match="cannot create") as caught:
        write_set(tmp_path / "store")
    assert caught.value.exit_code == 73


def test_a_folder_replaces_an_old_one_whole_or_not_at_all(tmp_path: Path) -> None:
    for text in ("one", "two"):
        with atomic_folder(tmp_path / "f") as folder:
            (folder / "sub").mkdir()
            (folder / "sub" / text).write_text(text)
    with pytest.raises(KeyError), atomic_folder(tmp_path / "f") as folder:
        (folder / "three").write_text("")
        raise KeyError
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["f", "sub", "two"]


def test_what_a_killed_writer_left_goes_when_the_file_is_written_again(tmp_path: Path) -> None:
    child = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    mine, dead = os.getpid(), int(child.stdout)
    with atomic_path(tmp_path / "a") as path:
        host = path.name.removeprefix(".a.").rpartition(f"-{mine}-")[0]
        path.write_bytes(b"")
    left = {pid: tmp_path / f".a.{host}-{pid}-00000000.tmp" for pid in (mine, dead)}
    for path in left.values():
        path.write_bytes(b"torn")
    atomic_write(tmp_path / "a", b"new")
    assert left[mine].exists() and not left[dead].exists()


def fork(work: Callable[[], object]) -> int:
    """A child of our own that needs no second import of torch; it leaves no trace but its files."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of threads, which do not write here
        child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(0)
    return child


def test_a_writer_killed_anywhere_leaves_no_torn_shard_and_the_same_snapshot_in_the_end(tmp_path: Path) -> None:
    started = time.monotonic()
    expected = write_set(tmp_path / "undisturbed", wanted(80), shard_samples=4).snapshot()
    whole = time.monotonic() - started
    generator, kills = random.Random(0), 0
    for _ in range(8):
        child = fork(lambda: write_set(tmp_path / "store", wanted(80), shard_samples=4))
        time.sleep(generator.uniform(0.3, 1.0) * whole / 8)
        os.kill(child, signal.SIGKILL)
        kills += os.WIFSIGNALED(os.waitpid(child, 0)[1])
        for root in (tmp_path / "store").glob("*"):
            shards = ShardSet.open(root)
            finished = [plan.shard for plan in shards.plans() if shards.done(plan.shard)]
            assert all(verify_shard(shards, shard) for shard in finished)
    assert kills >= 1
    assert write_set(tmp_path / "store", wanted(80), shard_samples=4).snapshot() == expected
    assert not list((tmp_path / "store").rglob("*.tar.*.tmp"))


def test_scores_of_a_shard_that_was_made_again_differently_are_not_taken(tmp_path: Path) -> None:
    shards = write_set(tmp_path, wanted(2))
    reward = score(shards)
    shards.shard_path("rollout-000000").unlink()
    plan = shards.plans()[0]
    other = {"x": np.zeros((HORIZONS, 4, 8), np.float16), "x0": np.zeros((HORIZONS - 1, 4, 8), np.float16)}
    write_shard(shards, plan, [(sample, other) for sample in plan.samples])
    assert not shards.scores_done(reward, "rollout-000000")
    with pytest.raises(DataError, match="scores another"):
        shards.read_scores(reward, [sample.key for sample in plan.samples])
