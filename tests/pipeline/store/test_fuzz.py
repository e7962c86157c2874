"""Fuzzed sets and parameters: whatever is in a file, reading it works or says so, soon and in bounded memory."""

from __future__ import annotations

import gc
import json
import os
import random
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from rats.pipeline.store.shard_set import ShardSet
from rats.schemas.errors import DataError, RatsError
from rats.schemas.params import load_params, with_variant
from rats.stages.shards.verify import verify
from tests.pipeline.store.test_format import FOLDER as FORMAT_1
from tests.support.damage import copied, fork, read_all
from tests.support.fuzz import CASES, bomb, yaml_text

SECONDS, MEBIBYTES = 1.0, 256
READERS: list[Callable[[Path], object]] = [read_all, read_all, verify]
"""Training, twice as often, and `rats shards verify`."""


def in_child(folder: Path, work: Callable[[random.Random, int], object], seed: int, count: int) -> list[str]:
    """Run `work` `count` times in a child with little memory; returns what came out that is no RatsError.

    The child's end without a word (out of memory in a library that aborts, no answer) is a finding as well.
    """
    log, at = folder / f"found-{seed}.json", folder / f"at-{seed}"
    child = fork(lambda: log.write_text(json.dumps(_findings(work, seed, count, at))))
    status = os.waitpid(child, 0)[1]
    if status != 0 or not log.exists():
        return [f"{at.read_text()}: the process ended with status {status}"]
    return list(json.loads(log.read_text()))


def _findings(work: Callable[[random.Random, int], object], seed: int, count: int, at: Path) -> list[str]:
    found = []
    gc.freeze()  # else each collection walks, and copies, all that the other tests have left in the parent
    _limit_memory()
    before = _peak()
    for number in range(count):
        at.write_text(f"{seed}/{number}")
        signal.alarm(60)
        started = time.process_time()
        try:
            work(random.Random(f"{seed}/{number}"), number)
        except RatsError as error:
            if len(str(error)) > 2000 or "\n" in str(error):
                found.append(f"{seed}/{number}: {len(str(error))} characters of error: {str(error)[:200]}")
        except BaseException as error:
            found.append(f"{seed}/{number}: {type(error).__name__}: {str(error)[:300]}")
        if (seconds := time.process_time() - started) > SECONDS:
            found.append(f"{seed}/{number}: {seconds:.1f} s")
        if (peak := _peak()) - before > MEBIBYTES:
            found.append(f"{seed}/{number}: {peak - before:.0f} MiB more")
            before = peak
    return found


def _peak() -> float:
    """The most memory that this process has had, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def _limit_memory() -> None:
    """A bomb ends in an error of this process and not of the machine; macOS has no such limit."""
    if sys.platform == "linux":
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + 2**31
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = Path(shutil.copytree(FORMAT_1, tmp_path_factory.mktemp("fuzz") / "set"))
    for reader in (read_all, verify):
        reader(folder)
    return folder


def fuzz_set(whole: Path, scratch: Path, seed: int, count: int) -> list[str]:
    """Each kind of lie in turn, on a copy that is restored in between."""
    folder = Path(shutil.copytree(whole, scratch / f"copy-{seed}"))
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    def work(generator: random.Random, number: int) -> None:
        for path, data in before.items():
            if path.read_bytes() != data:
                path.write_bytes(data)
        CASES[number % len(CASES)](folder, generator)
        READERS[number // len(CASES) % len(READERS)](folder)

    return in_child(scratch, work, seed, count)


def test_a_fuzzed_set_is_read_or_refused_soon_and_in_little_memory(whole: Path, tmp_path: Path) -> None:
    assert fuzz_set(whole, tmp_path, 0, 120) == []


@pytest.mark.parametrize(("rows", "length"), [(1_000_000, 0), (2_000, 100_000), (1, 2**25)])
def test_an_index_that_unfolds_into_gigabytes_is_refused(whole: Path, tmp_path: Path, rows: int, length: int) -> None:
    folder = copied(whole, tmp_path / "set")
    bomb(folder, rows, length)
    assert (folder / "index" / "0001.parquet").stat().st_size < 200_000
    shards = ShardSet.open(folder)
    with pytest.raises(DataError, match="in a file of"):
        shards.index(shards.snapshot())
    assert in_child(tmp_path, lambda generator, number: read_all(folder), 0, 1) == []


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 9))
def test_a_thousand_fuzzed_sets_are_read_or_refused(whole: Path, tmp_path: Path, seed: int) -> None:
    assert fuzz_set(whole, tmp_path, seed, 1000) == []


def fuzz_params(scratch: Path, seed: int, count: int) -> list[str]:
    """Parameter files with values, keys, tags and anchors that nobody should write."""

    def work(generator: random.Random, number: int) -> None:
        path = scratch / "params.yaml"
        path.write_bytes(yaml_text(generator))
        override = [f"train.alpha={yaml_text(generator, small=True).decode()}"] if number % 3 == 0 else []
        params = load_params(path, override)
        for name in params.variants:
            with_variant(params, name)

    return in_child(scratch, work, seed, count)


def test_fuzzed_parameters_are_read_or_refused_soon(tmp_path: Path) -> None:
    assert fuzz_params(tmp_path, 0, 60) == []


@pytest.mark.slow
def test_two_thousand_fuzzed_parameter_files_are_read_or_refused(tmp_path: Path) -> None:
    assert fuzz_params(tmp_path, 1, 2000) == []
