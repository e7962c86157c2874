"""Progress without a terminal: one line at a time, with what the stage notes of the last step."""

from __future__ import annotations

import pytest

from rats.stages.progress import progress


def test_the_last_line_has_the_count_and_the_last_note(capsys: pytest.CaptureFixture[str]):
    with progress("train", 3, "steps") as advance:
        advance(1, "gap 0.7")
        advance(2, "gap 0.4")
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("train: 3/3 steps, ") and line.endswith("0 s left; gap 0.4")


def test_without_a_note_there_is_none(capsys: pytest.CaptureFixture[str]):
    with progress("verify", 2, "MB") as advance:
        advance(2)
    assert capsys.readouterr().err.endswith("0 s left\n")
