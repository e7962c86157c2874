"""The guard against reward hacking in a training run: it validates, writes panel.csv, warns, stops, and keeps the best.

The rules are in `rules.py`. The guard's state follows from its logs, of which each checkpoint holds a copy, so a
resumed run needs nothing else.
"""

from __future__ import annotations

import csv
import io
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from rats.pipeline.files.atomic import atomic_write
from rats.schemas.errors import DataError
from rats.schemas.train_params import TrainParams
from rats.stages.measure.pictures import encode_image
from rats.stages.train.guard.look import Validator
from rats.stages.train.guard.rules import (
    Roles,
    ValidationScores,
    alarms_in_a_row,
    best_step,
    fallen_metrics,
    panel_columns,
    panel_row,
    sample_std,
)
from rats.trainer.loop import Stopped
from rats.trainer.metrics import CsvLog, MetricsRow
from rats.trainer.run import Run

log = logging.getLogger(__name__)

PANEL_FILE, PANEL_SAMPLES_FILE, SHEETS = "panel.csv", "panel_samples.csv", "samples"
SHOWN = 8
"""Prompts on a sheet."""

Act = Callable[[Run, Callable[[], bool]], str | None]


@dataclass
class Panel:
    """An observer of a run: call `start` before its first step and `leave_best` after its last.

    `eye` is None on ranks that do not validate.
    """

    chosen: TrainParams
    roles: Roles
    out: Path
    validator: Validator | None
    kept: Mapping[str, bytes | None]
    """The logs of the checkpoint that the run resumes from."""
    looks: dict[int, ValidationScores] = field(default_factory=dict)
    seen: set[int] = field(default_factory=set)

    @property
    def nfe(self) -> list[int]:
        """The smallest and the largest trained number of steps: a student may exploit the reward at one of them."""
        return sorted({min(self.chosen.grid), max(self.chosen.grid)})

    def start(self, run: Run) -> None:
        """Opens the logs, and validates the untrained student, or repeats a validation that a stop interrupted.

        Raises:
            DataError: the run began with other validation prompts or metrics; a metric that tells no pictures apart.
            SystemExit: 143 after SIGTERM.
        """
        self.seen = set(steps_in(self.kept.get(PANEL_FILE)))
        if run.ranks.is_main and self.validator is not None:
            self._open_logs(run, self.validator)
        try:
            self._see(run)
        except Stopped:
            raise SystemExit(143) from None

    def _open_logs(self, run: Run, eye: Validator) -> None:
        for stale in (self.out / SHEETS).glob("[0-9]*.png"):
            if int(stale.stem) > run.state.step or run.state.step == 0:
                stale.unlink()
        if self.chosen.guard.every is None:
            return
        values = ["step", "nfe", "key", "concept", *self.roles.metrics]
        for name, header in ((PANEL_FILE, panel_columns(self.roles, self.nfe)), (PANEL_SAMPLES_FILE, values)):
            run.open_log(CsvLog(self.out / name, header, self.kept.get(name)))
        self.looks = read_validation_scores(
            run.logs[PANEL_SAMPLES_FILE].rows(), eye.validation.keys, self.roles.metrics
        )
        self._keep(run)

    def __call__(self, run: Run, row: MetricsRow) -> None:
        """After a step: validates and draws a sheet if they are due. Raises Stopped if the run must stop."""
        self._see(run)

    def _see(self, run: Run) -> None:
        step, every, sheets = run.state.step, self.chosen.guard.every, self.chosen.samples_every
        last = step >= self.chosen.steps
        if every and step not in self.seen and (step % every == 0 or last or not self.seen):
            reason = self._agreed(run, self._look)
            self.seen.add(step)
            if reason and run.state.finished is None:
                run.finish(reason)
        if sheets and (step % sheets == 0 or last) and not run.ranks.gather_objects(self._sheet_path(step).exists())[0]:
            self._agreed(run, self._draw_sheet)

    def _agreed(self, run: Run, act: Act) -> str | None:
        """Gives all ranks the main rank's result of `act`. With a sharded network all ranks run `act`."""
        ranks, answer, stopped = run.ranks, None, False
        try:
            if self.validator is not None:
                answer = act(run, (lambda: ranks.any(run.stopping())) if ranks.is_sharded else run.stopping)
        except Stopped:
            stopped = True
        if ranks.any(stopped):
            raise Stopped
        return ranks.gather_objects(answer)[0]

    def _look(self, run: Run, stopping: Callable[[], bool]) -> str | None:
        """Validates once. Returns the reason if the run must end now."""
        assert self.validator is not None
        step, look = run.state.step, self.validator.look(run.learner, self.nfe, stopping)
        if not self.seen:
            for metric in self.roles.metrics:
                sample_std(metric, look[metric])
        if not run.ranks.is_main:
            return None
        self.looks[step] = look
        for row in value_rows(step, look, self.nfe, self.validator.validation.keys, self.validator.validation.concepts):
            run.logs[PANEL_SAMPLES_FILE].append(row)
        panel, concepts = run.logs[PANEL_FILE], self.validator.validation.concepts
        before = best_step(panel.rows())
        against = step if before is None else before
        panel.append(panel_row(step, self.looks, against, self.roles, self.nfe, concepts))
        self._keep(run)
        return self._judge(panel.rows())

    def _judge(self, rows: Sequence[Mapping[str, str]]) -> str | None:
        row, guard, count = rows[-1], self.chosen.guard, alarms_in_a_row(rows)
        log.info("step %s: %s", row["step"], changes_text(row, "", "since the first look"))
        if count == 0:
            return None
        down = fallen_metrics({name: float(value) for name, value in row.items() if value}, self.roles)
        log.warning(
            "step %s: alarm %d: %s; down beyond noise: %s. The student learns what the reward cannot see: lower "
            "train.lr or train.reward_weight, raise train.alpha, or train on several rewards; best look: step %s",
            *(row["step"], count, changes_text(row, "_since", f"since step {row['against']}"), ", ".join(down)),
            best_step(rows),
        )
        stop = guard.stop and count >= guard.patience
        return f"guard: {count} alarms in a row, the last at step {row['step']}" if stop else None

    def _draw_sheet(self, run: Run, stopping: Callable[[], bool]) -> None:
        assert self.validator is not None
        sheet = self.validator.sheet(run.learner, self.chosen.grid, SHOWN, stopping)
        if run.ranks.is_main:
            atomic_write(self._sheet_path(run.state.step), encode_image(sheet, ".png"))

    def _sheet_path(self, step: int) -> Path:
        return self.out / SHEETS / f"{step:06d}.png"

    def _keep(self, run: Run) -> None:
        """Keeps the best checkpoint from being pruned. (The current step's is saved after its validation.)"""
        rows = run.logs[PANEL_FILE].rows()
        steps = [int(row["step"]) for row in rows]
        saved = [step for step in steps if step > 0 and step % self.chosen.checkpoint_every == 0]
        run.checkpoints.never_drop(best_step(rows, saved))

    def leave_best(self, run: Run) -> None:
        """With `guard.keep: best`, loads the weights of the best validation into the learner."""
        if self.chosen.guard.keep == "last":
            return
        best = run.ranks.gather_objects(self._best(run) if run.ranks.is_main else None)[0]
        if best is None or best == run.state.step:
            return
        run.go_back_to(best)
        log.info("the student is that of step %d, where the panel was best", best)

    def _best(self, run: Run) -> int | None:
        rows = run.logs[PANEL_FILE].rows()
        if best_step(rows) == int(rows[0]["step"]):
            log.warning("no look had a better panel than the first: the student as it started was the best one")
        steps = [int(row["step"]) for row in rows]
        return best_step(rows, [step for step in steps if run.checkpoints.path(step).is_dir()])


def changes_text(row: Mapping[str, str], name: str, since: str) -> str:
    """The changes in a row as text."""
    trained, panel = (
        f"{float(row[which + name]):+.2f} +- {float(row[f'{which}{name}_noise']):.2f}" for which in ("trained", "panel")
    )
    return f"the trained reward {trained}, the panel {panel} spreads {since}"


def steps_in(kept: bytes | None) -> list[int]:
    """The steps in a checkpoint's panel.csv."""
    return [int(row["step"]) for row in csv.DictReader(io.StringIO((kept or b"").decode()))]


def value_rows(
    step: int, look: ValidationScores, nfe: Sequence[int], keys: Sequence[str], concepts: Sequence[str]
) -> list[dict[str, float | int | str | None]]:
    """Rows of panel_samples.csv: one for each sample and number of steps, with its score by each metric, or empty."""
    rows: list[dict[str, float | int | str | None]] = []
    for n, steps in enumerate(nfe):
        for s, (key, concept) in enumerate(zip(keys, concepts, strict=True)):
            row: dict[str, float | int | str | None] = {"step": step, "nfe": steps, "key": key, "concept": concept}
            values = {name: float(values_NS[n, s]) for name, values_NS in look.items()}
            rows.append(row | {name: value if np.isfinite(value) else None for name, value in values.items()})
    return rows


def read_validation_scores(
    rows: Sequence[Mapping[str, str]], keys: Sequence[str], metrics: Sequence[str]
) -> dict[int, ValidationScores]:
    """Reads what `value_rows` wrote, by step. Raises DataError if it is of other validation prompts."""
    by_step: dict[int, list[Mapping[str, str]]] = {}
    for row in rows:
        by_step.setdefault(int(row["step"]), []).append(row)
    for found in by_step.values():
        if [row["key"] for row in found] != list(keys) * (len(found) // len(keys)):
            raise DataError(
                "the run began with other validation prompts than prompts.validation and train.guard.prompts give "
                "now: restore them, or start over with --force"
            )
    return {
        step: {m: np.array([float(row[m] or "nan") for row in found]).reshape(-1, len(keys)) for m in metrics}
        for step, found in by_step.items()
    }
