"""A run under way: who may change it, and who looks on."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from rats.trainer.loop import Stopped
from rats.trainer.metrics import MetricsRow
from rats.trainer.run import Run
from tests.support import toy

ROOT = Path(__file__).parents[2]


def set_from_outside(path: Path) -> Iterator[str]:
    """Where a file assigns to something of a variable named `run`."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.Attribute, ast.Subscript)) and isinstance(node.ctx, ast.Store):
            target = ast.unparse(node)
            if target.startswith("run."):
                yield f"{path.relative_to(ROOT)}:{node.lineno} {target}"


def test_a_run_is_changed_by_its_own_methods_only():
    paths = [path for folder in ("stages", "trainer", "bench", "tests") for path in (ROOT / folder).rglob("*.py")]
    assert len(paths) > 100 and [place for path in paths for place in set_from_outside(path)] == []


def test_observers_are_called_in_their_order_and_within_their_block_only(tmp_path):
    given, seen = toy.objective(toy.settings(steps=4)), []
    run = toy.run_of(given, tmp_path)
    with run.with_callbacks(lambda run, row: seen.append(f"outer {row['step']}")):
        with run.with_callbacks(lambda run, row: seen.append(f"inner {row['step']}")):
            run.advance({"step": 7, "seconds": 0.5}, [0.3], 2, 4)
        run.advance({"step": 8, "seconds": 0.5}, [0.3], 2, 8)
    run.advance({"step": 9, "seconds": 0.5}, [0.3], 2, 12)
    assert seen == ["outer 7", "inner 7", "outer 8"]
    assert (run.state.position, run.state.bad, run.state.asked, run.state.seconds) == (12, 6, 9, 1.5)


def test_a_step_is_counted_though_an_observer_stops_in_its_look(tmp_path):
    run, made = toy.run_of(toy.objective(toy.settings()), tmp_path), {"student_forwards": 3, "teacher_forwards": 5}
    run.counted_by(lambda: made)

    def stops(run: Run, row: MetricsRow) -> None:
        raise Stopped

    with pytest.raises(Stopped), run.with_callbacks(stops):
        run.advance({"step": 7, "seconds": 0.5}, [0.3], 2, 4)
    assert (run.state.student_forwards, run.state.teacher_forwards, run.state.teacher_reward_calls) == (3, 5, 0)
    run.advance({"step": 8, "seconds": 0.5}, [0.3], 2, 8)
    assert run.state.student_forwards == 3 + 2 * 3  # the step's, and the observers'
