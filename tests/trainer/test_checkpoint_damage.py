"""Checkpoints that are spoiled, forged, or cut short by a full disk: an error of ours or the one before, not a mix."""

from __future__ import annotations

import json
import random
import shutil
import time
from pathlib import Path

import pytest
from blake3 import blake3

from rats.schemas.errors import RatsError, StorageError
from rats.trainer.checkpoint import Checkpoints, read_checkpoint
from tests.support.full import Disk
from tests.support.fuzz import changed, spoiled
from tests.support.toy import objective, run_of, settings, train_in


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A run with checkpoints after 4 and 6 steps."""
    folder = tmp_path_factory.mktemp("run")
    train_in(folder, settings(ema=0.9))
    return folder


def spoil_a_file(folder: Path, generator: random.Random) -> None:
    path = generator.choice(sorted(folder.iterdir()))
    path.write_bytes(spoiled(path.read_bytes(), generator))


def forge_a_file(folder: Path, generator: random.Random) -> None:
    """Spoiled, and vouched for: the hash in state.json is that of what lies there."""
    path = generator.choice([path for path in sorted(folder.iterdir()) if path.name != "state.json"])
    path.write_bytes(spoiled(path.read_bytes(), generator))
    state = folder / "state.json"
    record = json.loads(state.read_text())
    record["files"][path.name] = blake3(path.read_bytes()).hexdigest()
    state.write_text(json.dumps(record))


def forge_the_state(folder: Path, generator: random.Random) -> None:
    state = folder / "state.json"
    text = json.dumps(changed(json.loads(state.read_text()), generator))
    state.write_text(text.replace('"@deep@"', "[" * 20_000), encoding="utf-8", errors="replace")


def open_spoiled(trained: Path, folder: Path, case, seed: int) -> None:
    """Read and go on from a spoiled newest checkpoint: well, or by an error of ours, within a second."""
    path = folder / "000006"
    shutil.rmtree(path, ignore_errors=True)
    shutil.copytree(trained / "checkpoints" / "000006", path)
    case(path, random.Random(seed))
    run, started = run_of(objective(settings(ema=0.9)), folder / "run"), time.monotonic()
    try:
        run.restore(read_checkpoint(path))
    except RatsError as error:
        assert "\n" not in str(error), seed
    assert time.monotonic() - started < 1, seed


@pytest.mark.parametrize("case", [spoil_a_file, forge_a_file, forge_the_state])
def test_a_spoiled_or_forged_checkpoint_is_an_error_of_ours(trained, tmp_path, case):
    for seed in range(20):
        open_spoiled(trained, tmp_path, case, seed)


@pytest.mark.slow
@pytest.mark.parametrize("case", [spoil_a_file, forge_a_file, forge_the_state])
def test_a_thousand_spoiled_or_forged_checkpoints_are_errors_of_ours(trained, tmp_path, case):
    for seed in range(1000):
        open_spoiled(trained, tmp_path, case, seed)


@pytest.mark.parametrize("room", [1, 5, 20])
def test_a_save_on_a_full_disk_keeps_the_checkpoint_before_and_the_run_goes_on_from_it(trained, tmp_path, room):
    folder = tmp_path / "run"
    shutil.copytree(trained, folder)
    longer = settings(ema=0.9, steps=8)
    with pytest.raises(StorageError) as error, Disk(folder / "checkpoints", room).limited():
        train_in(folder, longer, resume=True)
    assert error.value.exit_code == 74
    assert Checkpoints(folder / "checkpoints").newest().state.step == 6
    assert [path.name for path in sorted((folder / "checkpoints").iterdir()) if path.name.isdigit()][-1] == "000006"
    assert train_in(folder, longer, resume=True).state.step == 8
