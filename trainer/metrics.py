"""`metrics.csv`, the reference of a run: one row for each step, which DVC can plot; and the logs beside it."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

from rats.pipeline.files.atomic import atomic_write, storage_errors
from rats.schemas.errors import DataError

MetricsRow = Mapping[str, float | int | str | None]


def metrics_columns(horizons: int, rewards: Sequence[str] = ("",)) -> list[str]:
    """Header for runs of up to `horizons` steps; a cell is empty if a step has no such value.

    `loss_total` = `loss_reward` + alpha * gate * shape; `loss_shape` and its parts are bare, before alpha and gate;
    `grad_reward` and `grad_shape` are the norms of the two terms as they enter the total, `grad_total` before clipping.
    `bad`: number of samples on which a reward failed. All means leave them out; a step with bad ones only is no update.
    With several `rewards`, `reward_student` and `reward_teacher` are their weighted sums in units of their spreads, and
    each has a column of its own besides.
    `teacher_age`: steps since the followed trajectories were made; `teacher_beaten`: share of samples with R_S >= R_T.
    """
    per_horizon = [f"loss_shape_k{k}" for k in range(1, horizons + 1)]
    per_reward = []
    if len(rewards) > 1:
        for name in rewards:
            per_reward += [f"student_{name}", f"teacher_{name}"]
    return [
        *("step", "nfe", "reward_student", "reward_teacher", "gap", "gate_mean", "gate_std"),
        *("loss_total", "loss_reward", "loss_shape", *per_horizon),
        *("grad_reward", "grad_shape", "grad_total", "lr", "seconds", "position"),
        *("alpha", "bad", "teacher_age", "teacher_beaten"),
        *per_reward,
    ]


class CsvLog:
    """Appends rows to a CSV file. Each checkpoint holds a copy, and a resumed run starts with that copy.

    So the file always ends at the checkpoint's step, whatever happened to it since: more steps, a half-written line, or
    its deletion (`dvc repro` deletes outputs before it runs a stage).
    """

    def __init__(self, path: Path, columns: Sequence[str], kept: bytes | None = None) -> None:
        """`kept`: the checkpoint's copy; None starts a new file."""
        self.path, self.columns = path, list(columns)
        if kept is not None and not kept.startswith(_text([self.columns]).encode()):
            raise DataError(f"the checkpoint's {path.name} has other columns: start over without --resume")
        # replaced, never cut in place: the old file may be a hardlink into DVC's cache
        atomic_write(path, _text([self.columns]).encode() if kept is None else kept)

    def append(self, row: MetricsRow) -> None:
        """Writes one row. Numbers are in full precision, so that runs can be compared bit by bit."""
        values = [row.get(name) for name in self.columns]
        with storage_errors(self.path), self.path.open("a", newline="") as file:
            file.write(_text([[_cell(value) for value in values]]))

    def content(self) -> bytes:
        """All rows so far, as bytes."""
        return self.path.read_bytes()

    def rows(self) -> list[dict[str, str]]:
        """All rows so far, by column."""
        return list(csv.DictReader(io.StringIO(self.content().decode())))


def _cell(value: float | int | str | None) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else repr(value)


def _text(rows: Sequence[Sequence[str]]) -> str:
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows(rows)
    return buffer.getvalue()
