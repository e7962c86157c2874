"""What is published: exactly what a snapshot needs, by link or copy, from a store that may be read-only."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import pytest

from rats.pipeline.store import layout
from rats.pipeline.store.embeddings import read_embedding
from rats.pipeline.store.publish import publish
from rats.pipeline.store.scores import read_scores, reward_column
from rats.pipeline.store.shard_set import ShardSet
from rats.schemas.errors import CannotCreateError, DataError
from tests.support.damage import read_all
from tests.support.full import Disk
from tests.support.project import rats, tree, write_project
from tests.support.shards import embed, in_order, score, wanted, write_samples, write_set


def test_a_published_folder_is_a_shard_set_with_exactly_what_its_snapshot_needs(tmp_path: Path) -> None:
    shards = write_set(tmp_path / "store")
    embed(shards, wanted())
    reward = score(shards)
    write_samples(shards, wanted(prompts=9))  # growth that the first snapshot does not know
    snapshot = shards.snapshot(1)
    publish(shards, snapshot, tmp_path / "out", [reward])
    out = ShardSet.open(tmp_path / "out")
    assert (out.fingerprint, out.snapshot(), out.index(snapshot)) == (
        shards.fingerprint,
        snapshot,
        shards.index(snapshot),
    )
    assert read_scores(out, *[reward_column(out, "hps")[0], [s.key for s in wanted()]]) == read_scores(
        shards, reward, [s.key for s in wanted()]
    )
    assert read_embedding(out, wanted()[0].prompt_id)
    assert [key.key for key, _ in (next(in_order(out, out.snapshot(), 0, i)) for i in range(10))]
    parts = {name.split("/")[0]: 0 for name in tree(out.root)}
    for name in tree(out.root):
        parts[name.split("/")[0]] += 1
        assert os.path.samefile(out.root / name, shards.root / name)
    assert parts == {"recipe.json": 1, "shards": 6, "index": 1, "embeddings": 5, "scores": 7, "manifests": 1}


def test_publishing_again_changes_nothing_and_another_snapshot_replaces_the_old(tmp_path: Path) -> None:
    shards = write_set(tmp_path / "store")
    out = tmp_path / "data" / "train"
    publish(shards, shards.snapshot(), out, [])
    inode = out.stat().st_ino
    publish(shards, shards.snapshot(), out, [])
    assert out.stat().st_ino == inode
    publish(shards, write_samples(shards, wanted(prompts=1)), out, [])
    assert ShardSet.open(out).snapshots() == [2]
    assert set(tree(out / "shards")) < set(tree(shards.root / "shards"))
    assert [path.name for path in out.parent.iterdir()] == ["train"]


def writable(folder: Path) -> set[str]:
    """Names of the files that somebody may write to, without locks."""
    found = (path for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock")
    return {path.name for path in found if path.stat().st_mode & 0o222}


@pytest.mark.parametrize("mask", [0o002, 0o077])
def test_nothing_of_a_set_can_be_written_to_or_read_by_more_than_the_umask_says(tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        shards = write_set(tmp_path / "store")
        embed(shards, wanted())
        publish(shards, shards.snapshot(), tmp_path / "out", [score(shards)])
    finally:
        os.umask(before)
    assert writable(tmp_path) == set()
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "out").glob("*/*.*")} == {0o444 & ~mask}


def test_a_set_of_an_older_rats_is_read_only_once_it_is_published(tmp_path: Path) -> None:
    shards = write_set(tmp_path / "store")
    for path in shards.root.rglob("*.*"):
        os.chmod(path, 0o644)
    publish(shards, shards.snapshot(), tmp_path / "out", [])
    assert writable(tmp_path / "out") == set()


def test_publishing_across_file_systems_copies(tmp_path: Path) -> None:
    other = Path("/dev/shm")
    if not other.is_dir() or other.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("needs a second file system")
    shards = write_set(tmp_path)
    out = other / f"rats-test-{os.getpid()}"
    shard = out / layout.SHARD.name(shard="rollout-000000")
    try:
        publish(shards, shards.snapshot(), out, [])
        assert ShardSet.open(out).index(shards.snapshot()) == shards.index(shards.snapshot())
        assert writable(out) == set()
        first, before = out.stat().st_ino, shard.read_bytes()
        publish(shards, shards.snapshot(), out, [])
        assert out.stat().st_ino == first  # what has the same content is not copied again
        shard.unlink()
        shard.write_bytes(before[:-700] + b"7" + before[-699:])
        publish(shards, shards.snapshot(), out, [])
        assert shard.read_bytes() == before and out.stat().st_ino != first
    finally:
        shutil.rmtree(out, ignore_errors=True)


def test_publishing_never_replaces_a_folder_that_is_not_ours(tmp_path: Path) -> None:
    shards = write_set(tmp_path / "store")
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "thesis.txt").write_text("years")
    for out in (tmp_path / "work", tmp_path, tmp_path / "work" / "thesis.txt", shards.root, shards.root / "x"):
        with pytest.raises(CannotCreateError):
            publish(shards, shards.snapshot(), out, [])
    assert (tmp_path / "work" / "thesis.txt").read_text() == "years"


def test_publishing_without_the_scores_is_refused(tmp_path: Path) -> None:
    shards = write_set(tmp_path / "store")
    with pytest.raises(DataError, match="no scores"):
        publish(shards, shards.snapshot(), tmp_path / "out", ["f" * 64])
    assert not (tmp_path / "out").exists()


def test_a_read_only_store_is_read_verified_and_published_and_says_73_when_it_is_written(tmp_path: Path) -> None:
    shards = write_set(tmp_path / "store")
    embed(shards, wanted())
    reward = score(shards)
    disk = Disk(shards.root, 1, errno.EROFS)
    with disk.limited():
        read_all(shards.root)
        rats(tmp_path, "shards", "verify", str(shards.root))
        publish(shards, shards.snapshot(), tmp_path / "out", [reward])
        assert disk.calls == []  # nothing even tried
        with pytest.raises(CannotCreateError, match="Read-only file system") as caught:
            write_samples(shards, wanted(7))
    assert caught.value.exit_code == 73
    read_all(tmp_path / "out")


@pytest.mark.slow
def test_a_published_folder_is_trained_from_without_a_single_write_into_it(tmp_path: Path, models: Path) -> None:
    write_project(models, tmp_path)
    rats(tmp_path, "stage", "rollout", "--split", "train", "--out", "data")
    disks = [Disk(tmp_path / name, 1, errno.EROFS) for name in ("data", "store")]
    with disks[0].limited(), disks[1].limited():
        rats(tmp_path, "stage", "train", "--shards", "data", "--out", "run")
        assert disks[0].calls == disks[1].calls == []
        rats(tmp_path, "stage", "rollout", "--split", "train", "--set", "teacher.noises_per_prompt=2", code=73)


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is read-only to root")
def test_a_store_without_the_right_to_write_says_73(tmp_path: Path) -> None:
    shards = write_set(tmp_path)
    folders = [shards.root, *(path for path in shards.root.rglob("*") if path.is_dir())]
    try:
        for folder in folders:
            folder.chmod(0o555)
        assert len(shards.index(shards.snapshot())) == 10
        with pytest.raises(CannotCreateError):
            write_samples(shards, wanted(7))
    finally:
        for folder in folders:
            folder.chmod(0o755)
