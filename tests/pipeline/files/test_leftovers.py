"""Temporary names: whose they are, and whether their writer is gone."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from rats.pipeline.files.atomic import atomic_path, atomic_write
from rats.pipeline.files.leftovers import is_abandoned, is_dead, is_temporary, temporary_name
from tests.support.damage import fork

DAY = 24 * 3600.0
CHILD = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
LIVE, DEAD = os.getpid(), int(CHILD.stdout)


def made_by(process: int, name: str = "rollout-000003.tar") -> str:
    return temporary_name(name).replace(f"-{LIVE}-", f"-{process}-")


@pytest.mark.parametrize("host", ["node7", "node7.cluster.example.org", "gpu-3[a].example"])
def test_a_name_says_whose_it_is_on_machines_of_any_name(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = made_by(DEAD)  # of this machine as it is called now
    monkeypatch.setattr(socket, "gethostname", lambda: host)
    assert is_temporary(mine) and is_temporary(made_by(LIVE))
    assert is_abandoned(made_by(DEAD)) and not is_abandoned(made_by(LIVE)) and not is_abandoned(mine)
    # of a process on this machine at once, of another machine's after a day's silence
    assert is_dead(made_by(DEAD), 50.0, since=60.0) and not is_dead(made_by(LIVE), 50.0, since=60.0)
    assert not is_dead(mine, 50.0, since=60.0) and is_dead(mine, 50.0, since=60.0 + DAY)
    assert not is_dead(made_by(DEAD), 70.0, since=60.0)


@pytest.mark.parametrize("name", ["rollout-000003.tar", ".hidden.tmp", ".a.b-12-0123456g.tmp", ".a-12-01234567.tmp"])
def test_no_other_name_is_a_temporary_one(name: str) -> None:
    assert not is_temporary(name) and not is_abandoned(name) and not is_dead(name, 0.0, since=DAY * 3)


def test_a_number_that_no_process_can_have_is_nobodys_death() -> None:
    assert not is_abandoned(made_by(10**30))


def test_the_first_write_into_a_folder_removes_what_dead_writers_left_in_it_and_nothing_else(tmp_path: Path) -> None:
    gone = [made_by(DEAD), made_by(DEAD, "other.tar"), made_by(DEAD, "rollout-000003.tar.old")]
    kept = [made_by(LIVE), "somebody-1-00000000.tmp", ".hidden.tmp"]
    for name in gone + kept:
        (tmp_path / name).write_bytes(b"torn")
    with atomic_path(tmp_path / "rollout-000003.tar") as temporary:
        temporary.write_bytes(b"whole")
    assert {path.name for path in tmp_path.iterdir()} == {"rollout-000003.tar", *kept}


def test_a_folder_is_listed_once_by_each_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listed = []
    monkeypatch.setattr(os, "scandir", lambda path, scandir=os.scandir: listed.append(Path(path)) or scandir(path))

    def write(names: str, looks: int) -> None:
        for name in names:
            atomic_write(tmp_path / name, b"new")
        assert listed == [tmp_path] * looks

    write("abc", looks=1)
    child = fork(lambda: write("de", looks=2))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
