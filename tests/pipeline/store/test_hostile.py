"""Hostile sets: members, links, names and URLs that would lead out or run something are refused or never touched."""

from __future__ import annotations

import io
import json
import os
import pickle
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from safetensors.numpy import save

from rats.pipeline.store.shard_set import ShardSet
from rats.schemas.errors import DataError, RatsError
from rats.schemas.manifest import IndexRow, PlannedSample, RewardRecord, ShardPlan
from rats.stages.shards.describe import describe
from tests.support.damage import fork, read_all, reseal, used, vouch
from tests.support.fuzz import put_index, put_sample
from tests.support.shards import HORIZONS

EVENTS = ("exec", "marshal.loads", "os.exec", "os.fork", "os.posix_spawn", "os.system", "pickle.find_class")
EVENTS += ("ctypes.dlopen", "shutil.unpack_archive", "socket.connect", "subprocess.Popen", "tarfile", "zipfile")


class Bomb:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return os.system, (f"touch '{self.path}'",)


def member(
    name: str, data: bytes = b"", kind: bytes = tarfile.REGTYPE, link: str = ""
) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, link, len(data)
    return info, data


def add_members(folder: Path, mark: Path) -> Path:
    """Put hostile members at the end of a shard, and make every document vouch for it."""
    bomb = pickle.dumps(Bomb(mark))
    tar = folder / "shards" / "rollout-000000.tar"
    with tarfile.open(tar, "a:") as archive:
        for info, data in [
            *(member(f"evil.{kind}", bomb) for kind in ("pyd", "pickle", "pkl", "pth", "npz", "npy")),
            *(member(name, b"x") for name in (str(mark), f"../../{mark.name}", "a/../../b.json")),
            *(member("link", b"", kind, "/etc/passwd") for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE)),
            *(member("device", b"", kind) for kind in (tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE)),
        ]:
            archive.addfile(info, io.BytesIO(data))
    vouch(folder)
    return tar


def events(work: Callable[[], object], log: Path) -> set[str]:
    """Audit events of `EVENTS` that `work` raises, in a child: a hook cannot be taken off again."""

    def watched() -> None:
        seen: set[str] = set()
        sys.addaudithook(lambda event, _: seen.add(event) if event in EVENTS or event[:8] == "tarfile." else None)
        try:
            work()
        except Exception as error:
            log.with_suffix(".error").write_text(repr(error))
        log.write_text(json.dumps(sorted(seen)))

    assert os.waitpid(fork(watched), 0)[1] == 0
    return set(json.loads(log.read_text()))


def look_and_read(folder: Path) -> None:
    """Everything that reading a set can mean."""
    describe(folder)
    read_all(folder)


def test_hostile_members_are_never_touched_and_run_in_plain_webdataset(copy: Path, tmp_path: Path) -> None:
    mark, log, expected = tmp_path / "it-ran", tmp_path / "log", used(copy)
    tar = add_members(copy, mark)
    look_and_read(copy)  # imports and caches: what comes after is the reading
    assert events(lambda: look_and_read(copy), log) == set()
    assert not log.with_suffix(".error").exists() and not mark.exists() and used(copy) == expected
    plain = events(lambda: list(webdataset.WebDataset([str(tar)], shardshuffle=False).decode()), log)
    assert plain >= {"pickle.find_class", "os.system"} and mark.exists()


def test_a_pipe_is_a_folder_that_is_not_there_and_a_command_in_plain_webdataset(tmp_path: Path) -> None:
    mark, log = tmp_path / "it-ran", tmp_path / "log"
    url = f"pipe:touch '{mark}'"

    def ours() -> None:
        for open_it in (ShardSet.open, describe, lambda path: ShardSet.open(Path(path))):
            with pytest.raises(RatsError):
                open_it(url)  # type: ignore[arg-type]

    ours()
    assert events(ours, log) == set() and not log.with_suffix(".error").exists() and not mark.exists()
    plain = events(lambda: list(webdataset.WebDataset([url], shardshuffle=False)), log)
    assert "subprocess.Popen" in plain and mark.exists()


@pytest.mark.parametrize(
    "name", ["pipe:touch x", "../../rollout-000000", "/etc/passwd", "s3://a/b", "rollout-000000\n"]
)
def test_a_document_that_names_a_foreign_file_is_refused_however_well_it_is_sealed(copy: Path, name: str) -> None:
    mark = set(Path().iterdir())
    for pattern, changes in [
        ("shards/rollout-000000.done.json", {"shard": name}),
        ("manifests/0001.json", {"shards": {name: "0" * 64}}),
        ("manifests/0001.json", {"index": name}),
        ("scores/*/rollout-000000.done.json", {"shard": name}),
    ]:
        path = next(copy.glob(pattern))
        data = path.read_bytes()
        reseal(path, **changes)
        with pytest.raises(DataError):
            read_all(copy)
        path.write_bytes(data)
    read_all(copy)
    assert set(Path().iterdir()) == mark


def test_a_folder_that_is_a_link_is_refused_wherever_it_is_in_a_set(copy: Path, tmp_path: Path) -> None:
    for number, path in enumerate(sorted(path for path in copy.rglob("*") if path.is_dir())):
        elsewhere = tmp_path / str(number)
        os.rename(path, elsewhere)
        path.symlink_to(elsewhere)
        with pytest.raises(DataError, match="link is refused"):
            read_all(copy)
        path.unlink()
        os.rename(elsewhere, path)
    read_all(copy)


@pytest.mark.parametrize("change", [lambda rows: rows * 2, lambda rows: rows[::-1], lambda rows: rows[:-1] + rows[:1]])
def test_an_index_with_a_sample_twice_or_out_of_order_is_refused(copy: Path, change: Callable[[Any], Any]) -> None:
    put_index(copy, change)
    with pytest.raises(DataError, match="does not hold the samples"):
        read_all(copy)


@pytest.mark.parametrize("shape", [(), (4,), (4, 8), (1, 4, 8), (4, 4, 4, 8)])
def test_a_sample_of_another_shape_is_refused_however_well_it_is_hashed(copy: Path, shape: tuple[int, ...]) -> None:
    x = np.zeros((HORIZONS, *shape), np.float16) if shape else np.float16(0)
    x0 = np.zeros((HORIZONS - 1, *shape), np.float16)
    shards = ShardSet.open(copy)
    put_sample(copy, shards.index(shards.snapshot())[0].model_dump(), save({"x": np.asarray(x), "x0": x0}))
    if len(shape) == 2:
        read_all(copy)  # as it should be
    else:
        with pytest.raises(DataError, match="sample"):
            read_all(copy)


def test_a_column_under_anothers_address_is_refused(copy: Path) -> None:
    path = next(copy.glob("scores/*/reward.json"))
    record = RewardRecord(name="../../x", hashes={"reward": "pipe:touch x"})
    reseal(path, **record.model_dump())
    with pytest.raises(DataError, match="not of its folder"):
        read_all(copy)


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
