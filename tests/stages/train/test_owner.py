"""A run folder belongs to one process: real processes that train toys, are killed, are orphaned, and meet."""

from __future__ import annotations

import csv
import hashlib
import json
import multiprocessing
import os
import signal
import socket
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

from rats.schemas.errors import RetryLaterError
from rats.stages.train import owner
from rats.stages.train.owner import OWNER, owned, read_owner
from rats.stages.train.resume import stop_flag
from rats.trainer.loop import train
from rats.trainer.metrics import CsvLog
from tests.support import toy

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.support.toy", "tests.stages.train.test_owner"])
STEPS = 40


class SlowStream(toy.ToyStream):
    """Has its samples a little later."""

    def take(self):
        time.sleep(0.05)
        return super().take()


def training(out: Path) -> None:
    """A process that owns the folder, and trains from its newest checkpoint."""
    try:
        with owned(out) as check, stop_flag() as stopping:
            given = toy.objective(toy.settings(steps=STEPS, checkpoint_every=STEPS, checkpoints_total_limit=STEPS))
            run = toy.run_of(given, out, resume=True)
            run.owned_by(check)
            run.stop_when(stopping)
            train(given, SlowStream(run.state.position), run)
    except RetryLaterError as error:
        (out / f"refused-{os.getpid()}").write_text(str(error))
        raise SystemExit(error.exit_code) from None


def starting(out: Path) -> None:
    """A process that starts `training` and waits for it, as dvc does."""
    child = CONTEXT_OF_A_PARENT.Process(target=training, args=(out,))
    child.start()
    (out / "child").write_text(str(child.pid))
    child.join()


CONTEXT_OF_A_PARENT = multiprocessing.get_context("fork")


def started(target: Callable[[Path], None], out: Path):
    out.mkdir(exist_ok=True)
    process = CONTEXT.Process(target=target, args=(out,))
    process.start()
    return process


def steps(out: Path) -> list[int]:
    path = out / "metrics.csv"
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [int(row["step"]) for row in csv.DictReader(file)]


def wait_for(condition: Callable[[], object]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_the_second_process_is_refused_by_the_firsts_number_and_a_dead_one_holds_nothing(tmp_path):
    first = started(training, tmp_path)
    wait_for(lambda: len(steps(tmp_path)) > 3)
    with (
        pytest.raises(RetryLaterError, match=f"process {first.pid} on {socket.gethostname()}") as error,
        owned(tmp_path),
    ):
        pass
    assert error.value.exit_code == 75 and "--out" in error.value.remedy
    with pytest.raises(RetryLaterError), owned(tmp_path, force=True):  # nor by force: it is alive
        pass
    first.kill()
    first.join()
    assert read_owner(tmp_path).process == first.pid
    with owned(tmp_path):
        assert read_owner(tmp_path).process == os.getpid()
    assert read_owner(tmp_path) is None


def test_two_trainers_an_orphan_and_a_new_one_leave_the_metrics_of_one_run(tmp_path):
    parent = started(starting, tmp_path)
    wait_for(lambda: len(steps(tmp_path)) > 3)
    second = started(training, tmp_path)
    second.join()
    child = int((tmp_path / "child").read_text())
    assert second.exitcode == 75 and f"process {child} " in next(tmp_path.glob("refused-*")).read_text()
    cached = tmp_path / "cached"  # as dvc keeps the file of a stage
    os.link(tmp_path / "metrics.csv", cached)
    digest, seen = hashlib.md5(cached.read_bytes()).hexdigest(), len(steps(tmp_path))
    wait_for(lambda: len(steps(tmp_path)) > seen + 1)
    os.kill(parent.pid, signal.SIGKILL)
    parent.join()
    (tmp_path / "metrics.csv").unlink()  # as dvc does before it runs the stage again
    third = started(training, tmp_path)
    third.join()
    assert third.exitcode == 0 and steps(tmp_path) == list(range(STEPS))
    assert hashlib.md5(cached.read_bytes()).hexdigest() == digest
    saved = [int(path.name) for path in (tmp_path / "checkpoints").iterdir()]
    assert any(step < STEPS for step in saved)  # the orphan has saved where it noticed


def elsewhere(out: Path, silent: float) -> None:
    """Another machine owns the folder, and was last heard of so long ago."""
    with owned(out):
        mine = json.loads((out / OWNER).read_text())
    (out / OWNER).write_text(json.dumps(mine | {"host": "elsewhere"}))
    os.utime(out / OWNER, (time.time() - silent,) * 2)


def test_an_owner_on_another_machine_is_believed_until_it_is_silent_or_by_force(tmp_path):
    elsewhere(tmp_path, silent=300)
    with pytest.raises(RetryLaterError, match="on elsewhere.*by --force"), owned(tmp_path):
        pass
    with owned(tmp_path, force=True):
        assert read_owner(tmp_path).host == socket.gethostname()
    elsewhere(tmp_path, silent=1000)
    with owned(tmp_path):
        assert read_owner(tmp_path).host == socket.gethostname()


def test_an_owner_says_that_it_lives(tmp_path, monkeypatch):
    monkeypatch.setattr(owner, "LOOK", 0.01)
    monkeypatch.setattr(owner, "BEAT", 0.02)
    with owned(tmp_path):
        os.utime(tmp_path / OWNER, (5, 5))
        wait_for(lambda: (tmp_path / OWNER).stat().st_mtime > 5)


def test_a_run_whose_folder_was_taken_writes_nothing_more(tmp_path):
    given = toy.objective(toy.settings(checkpoint_every=1))
    with ExitStack() as stack:
        run = toy.run_of(given, tmp_path)
        run.owned_by(stack.enter_context(owned(tmp_path)))
        run.stop_when(lambda: run.state.step == 2 and not taken(tmp_path))
        with pytest.raises(RetryLaterError, match="on elsewhere.*taken from this run"):
            toy.train_on(given, run)
        assert steps(tmp_path) == [0, 1] and not (tmp_path / "checkpoints" / "000003").exists()
    assert read_owner(tmp_path).host == "elsewhere"  # and it leaves the other's sign


def taken(out: Path) -> bool:
    """Somebody on another machine takes the folder now."""
    mine = json.loads((out / OWNER).read_text())
    (out / OWNER).write_text(json.dumps(mine | {"host": "elsewhere"}))
    return True


def test_only_the_main_rank_owns(tmp_path):
    with owned(tmp_path), owned(tmp_path, is_main=False) as check:
        check()


def test_nohup_outlives_its_parent(tmp_path):
    assert owner.ancestors() or os.getsid(0) == os.getpid()
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert owner.ancestors() == []
        with owned(tmp_path):
            assert read_owner(tmp_path).parent is None
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("became", ["linked", "replaced", "gone", "longer"])
def test_a_log_appends_to_the_file_that_it_made_and_to_no_other(tmp_path, became):
    path, other = tmp_path / "metrics.csv", tmp_path / "other"
    log = CsvLog(path, ["step"])
    log.append({"step": 2})
    if became == "linked":
        os.link(path, other)
    elif became == "replaced":
        other.write_text("of another run\n")
        path.unlink()
        os.link(other, path)
    elif became == "gone":
        path.unlink()
    else:
        path.write_text("step\n2\n3\n")
    before = other.read_bytes() if other.exists() else None
    log.append({"step": 5})
    log.append({"step": 7})
    assert path.read_text() == "step\n2\n5\n7\n" and path.stat().st_nlink == 1
    assert before is None or other.read_bytes() == before
