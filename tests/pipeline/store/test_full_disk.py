"""Full disks and kills: nothing torn under a final name, and the same command goes on."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import time
from pathlib import Path

import pytest

from rats.pipeline.files.atomic import atomic_folder, atomic_path, atomic_write
from rats.pipeline.store.publish import publish
from rats.pipeline.store.shard_set import ShardSet
from rats.pipeline.store.shards import verify_shard
from rats.schemas.errors import CannotCreateError, StorageError
from rats.schemas.manifest import Snapshot
from tests.support.damage import fork
from tests.support.full import NEVER, Disk
from tests.support.project import rats, tree, write_project
from tests.support.shards import embed, score, wanted, write_samples, write_set


def whole_run(folder: Path) -> Snapshot:
    """Everything that writes a set: plans, shards, index, snapshot, scores, embeddings, publishing."""
    shards = write_set(folder / "store", wanted(3))
    reward = score(shards)
    embed(shards, wanted(3))
    publish(shards, shards.snapshot(), folder / "out", [reward])
    return shards.snapshot()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Snapshot, dict[str, str], int]:
    """The snapshot, every file's hash, and how many calls could have failed."""
    folder = tmp_path_factory.mktemp("undisturbed")
    with Disk(folder).limited() as disk:
        snapshot = whole_run(folder / "work")
    return snapshot, files(folder / "work"), len(disk.calls)


def files(folder: Path) -> dict[str, str]:
    """Hash by name of what is there under a final name; locks hold nothing."""
    return {name: digest for name, digest in tree(folder).items() if not name.endswith(".lock")}


def fill(folder: Path, undisturbed: tuple[Snapshot, dict[str, str], int], room: int, once: bool) -> None:
    """Run into a full disk, look at what is left, make room and run again."""
    snapshot, expected, _ = undisturbed
    with Disk(folder, room, once=once).limited(), pytest.raises(StorageError, match="disk full writing") as caught:
        whole_run(folder / "work")
    assert caught.value.exit_code == 74 and "run the same command again" in str(caught.value)
    left = files(folder)
    assert not [name for name in left if ".tmp" in name], room
    assert {f"work/{name}": digest for name, digest in expected.items()}.items() >= left.items(), room
    assert whole_run(folder / "work") == snapshot and files(folder / "work") == expected


def test_a_full_disk_at_any_write_tears_nothing_and_the_same_command_goes_on(
    tmp_path: Path, undisturbed: tuple[Snapshot, dict[str, str], int]
) -> None:
    for room in range(1, undisturbed[2] + 1, 13):
        fill(tmp_path / str(room), undisturbed, room, once=room % 2 == 0)


@pytest.mark.slow
@pytest.mark.parametrize("once", [True, False])
def test_a_full_disk_at_every_single_write_tears_nothing(
    tmp_path: Path, undisturbed: tuple[Snapshot, dict[str, str], int], once: bool
) -> None:
    for room in range(1, undisturbed[2] + 1):
        fill(tmp_path / str(room), undisturbed, room, once)
    print(f"{undisturbed[2]} writes failed, {once=}")


def test_a_full_disk_while_a_published_folder_is_replaced_leaves_the_old_one_or_the_new(tmp_path: Path) -> None:
    shards, out = write_set(tmp_path / "store", wanted(2)), tmp_path / "out"
    old, new = shards.snapshot(), write_samples(shards, wanted(1))
    for room in range(1, 100):
        publish(shards, old, out, [])
        disk = Disk(tmp_path, room, once=True)
        with disk.limited(), contextlib.suppress(StorageError):
            publish(shards, new, out, [])
        assert ShardSet.open(out).snapshots() in ([old.number], [new.number])
        assert not list(tmp_path.rglob("*.tmp"))
        if len(disk.calls) < room:
            assert ShardSet.open(out).snapshot() == new
            break
    assert 10 < room < 99


@pytest.mark.slow
def test_a_full_disk_under_the_command_line_is_exit_74_and_the_same_command_goes_on(
    tmp_path: Path, models: Path
) -> None:
    arguments = ["stage", "rollout", "--split", "train", "--out", "data", "--json"]
    snapshots, writes = set(), 0
    for room in [NEVER, *range(1, 400, 23)]:
        if room > writes > 0:
            break
        folder = tmp_path / str(room)
        folder.mkdir()
        write_project(models, folder)
        with Disk(folder, room).limited() as disk:
            rats(folder, *arguments, code=0 if room == NEVER else 74)
        writes = writes or len(disk.calls)
        assert not list(folder.rglob("*.tmp"))
        snapshots.add(json.loads(rats(folder, *arguments).stdout)["snapshot"])
    print(f"{writes} writes of a rollout, every 23rd failed")
    assert len(snapshots) == 1 and writes > 100


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


@pytest.mark.parametrize("kills", [8, pytest.param(60, marks=pytest.mark.slow)])
def test_a_writer_killed_anywhere_leaves_no_torn_shard_and_the_same_snapshot_in_the_end(
    tmp_path: Path, kills: int
) -> None:
    started = time.monotonic()
    expected = write_set(tmp_path / "undisturbed", wanted(80), shard_samples=4).snapshot()
    whole = time.monotonic() - started
    generator, stores = random.Random(0), [tmp_path / "store-0"]
    while kills:
        child = fork(lambda: write_set(stores[-1], wanted(80), shard_samples=4))
        time.sleep(generator.uniform(0.05, 0.3) * whole)
        os.kill(child, signal.SIGKILL)
        if not os.WIFSIGNALED(os.waitpid(child, 0)[1]):  # it was through: the next one begins anew
            assert ShardSet.open(stores[-1] / expected.fingerprint).snapshot() == expected
            stores.append(tmp_path / f"store-{len(stores)}")
            continue
        kills -= 1
        if (stores[-1] / expected.fingerprint / "recipe.json").exists():
            shards = ShardSet.open(stores[-1] / expected.fingerprint)
            assert all(verify_shard(shards, plan.shard) for plan in shards.plans() if shards.done(plan.shard))
    for store in stores:
        assert write_set(store, wanted(80), shard_samples=4).snapshot() == expected
        assert not list(store.rglob("*.tar.*.tmp"))
