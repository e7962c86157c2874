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


NOTED = {
    "reward": "reward_student",
    "teacher": "reward_teacher",
    "gap": "gap",
    "gate": "gate_mean",
    "loss": "loss_total",
}


def note_of(row: MetricsRow) -> str:
    """A step in a few words: "3 NFE: reward 11.1, teacher 11.4, gap 0.3, gate 0.55, loss -8.1, 2.4 s/step"."""
    found = {name: row.get(column) for name, column in NOTED.items()}
    said = [f"{name} {value:.4g}" for name, value in found.items() if isinstance(value, int | float)]
    return f"{row['nfe']} NFE: " + ", ".join([*said, f"{row['seconds']:.2g} s/step"])


class CsvLog:
    """Appends rows to a CSV file. Each checkpoint holds a copy, and a resumed run starts with that copy.

    So the file is cut back to the checkpoint's step by construction, whatever became of it since: a step too many, a
    half-written line, or gone (`dvc repro` deletes outs before it runs a stage).

    It appends only to the file that it made, under no other name: DVC's cache keeps the file of a stage by a hardlink,
    and an orphan must not write into it. Where the file is another one, all rows so far are written anew.
    """

    def __init__(self, path: Path, columns: Sequence[str], kept: bytes | None = None) -> None:
        """`kept`: the checkpoint's copy; None starts a new file."""
        self.path, self.columns = path, list(columns)
        if kept is not None and not kept.startswith(_text([self.columns]).encode()):
            raise DataError(f"the checkpoint's {path.name} has other columns: start over with --force")
        self._rows = bytearray(_text([self.columns]).encode() if kept is None else kept)
        self._write_anew()

    def append(self, row: MetricsRow) -> None:
        """Writes one row. Numbers are in full precision, so that runs can be compared bit by bit."""
        values = [row.get(name) for name in self.columns]
        line = _text([[_cell(value) for value in values]]).encode()
        is_ours = self._is_ours()
        self._rows += line
        if not is_ours:
            self._write_anew()
            return
        with storage_errors(self.path), self.path.open("ab") as file:
            file.write(line)

    def _write_anew(self) -> None:
        # replaced, never cut in place: the old file may be a hardlink into DVC's cache
        atomic_write(self.path, bytes(self._rows))
        self._made = self._file()

    def _is_ours(self) -> bool:
        # the number of a file that is gone may come back, so the size has to fit too
        return self._file() == self._made and self.path.stat().st_size == len(self._rows)

    def _file(self) -> tuple[int, int, int] | None:
        """Device and number of the file, and how many names it has."""
        try:
            about = self.path.stat()
        except FileNotFoundError:
            return None
        return about.st_dev, about.st_ino, about.st_nlink

    def content(self) -> bytes:
        """All rows so far, as bytes."""
        return bytes(self._rows)

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
