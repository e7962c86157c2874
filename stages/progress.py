"""Progress of a stage on stderr: a bar in a terminal, else a plain line every ten seconds."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

PLAIN_SECONDS = 10.0


@contextmanager
def progress(label: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
    """Gives a function that counts `unit`s done, and shows rate and time left while the block runs."""
    with _bar(label, total, unit) if sys.stderr.isatty() else _lines(label, total, unit) as advance:
        yield advance


@contextmanager
def _bar(label: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    pace = TextColumn("{task.fields[rate]}")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), pace, TimeRemainingColumn())
    start = time.monotonic()
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(label, total=total, rate="")

        def advance(count: int) -> None:
            done = bar.tasks[0].completed + count
            bar.update(task, completed=done, rate=f"{done / (time.monotonic() - start):.1f} {unit}/s")

        yield advance


@contextmanager
def _lines(label: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
    start = last = time.monotonic()
    done = 0

    def advance(count: int) -> None:
        nonlocal done, last
        done += count
        now = time.monotonic()
        if now - last >= PLAIN_SECONDS or done == total:
            last = now
            print(f"{label}: {done}/{total} {unit}, {_pace(done, total, now - start, unit)}", file=sys.stderr)

    yield advance


def _pace(done: int, total: int, seconds: float, unit: str) -> str:
    rate = done / max(seconds, 1e-9)
    return f"{rate:.1f} {unit}/s, {(total - done) / max(rate, 1e-9):.0f} s left"
