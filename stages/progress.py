"""Progress of a stage on stderr: a bar in a terminal, else a plain line every ten seconds."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

PLAIN_SECONDS = 10.0


class Advance(Protocol):
    """Counts so many more; `note`, of the last ones, stands behind rate and time left."""

    def __call__(self, count: int, note: str = "") -> None: ...


@contextmanager
def progress(label: str, total: int, unit: str) -> Iterator[Advance]:
    """Gives a function that counts `unit`s done, and shows rate and time left while the block runs."""
    with _bar(label, total, unit) if sys.stderr.isatty() else _lines(label, total, unit) as advance:
        yield advance


@contextmanager
def _bar(label: str, total: int, unit: str) -> Iterator[Advance]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    pace = TextColumn("{task.fields[rate]}")
    columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), pace, TimeRemainingColumn()]
    columns.append(TextColumn("{task.fields[note]}"))
    start = time.monotonic()
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(label, total=total, rate="", note="")

        def advance(count: int, note: str = "") -> None:
            done = bar.tasks[0].completed + count
            bar.update(task, completed=done, rate=f"{done / (time.monotonic() - start):.1f} {unit}/s", note=note)

        yield advance


@contextmanager
def _lines(label: str, total: int, unit: str) -> Iterator[Advance]:
    start = last = time.monotonic()
    done = 0

    def advance(count: int, note: str = "") -> None:
        nonlocal done, last
        done += count
        now = time.monotonic()
        if now - last >= PLAIN_SECONDS or done == total:
            last = now
            said = f"{label}: {done}/{total} {unit}, {_pace(done, total, now - start, unit)}"
            print(f"{said}; {note}" if note else said, file=sys.stderr)

    yield advance


def _pace(done: int, total: int, seconds: float, unit: str) -> str:
    rate = done / max(seconds, 1e-9)
    return f"{rate:.1f} {unit}/s, {(total - done) / max(rate, 1e-9):.0f} s left"
