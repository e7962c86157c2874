"""The results of the stages: what `--json` prints, and `reports/evaluate.json`."""

from __future__ import annotations

from typing import Literal

from rats.schemas.record import Record

SystemKind = Literal["teacher", "base_guided", "base_unguided", "student"]
Role = Literal["trained", "held_out", "judge"]


class RolloutReport(Record):
    """`rats stage rollout`; `snapshot` is the snapshot's hash, `seconds` wall time."""

    fingerprint: str
    snapshot: str
    samples: int
    shards_total: int
    shards_reused: int
    teacher_forwards: int
    seconds: float
    snapshot_number: int = 0
    samples_failed: int = 0
    """Number of failed scores of these samples in the store, also from earlier runs."""


class ScoreReport(Record):
    """`rats stage score`; `rewards` maps a reward's name to its column, `seconds` is wall time.

    `scored` counts the rows written by this run, `failed` the failed scores of the snapshot's samples as stored now;
    `teacher_forwards` is counted by a hook on every network of the teacher's class.
    """

    fingerprint: str
    snapshot: str
    rewards: dict[str, str]
    samples: int
    scored: int
    failed: int
    shards_total: int
    shards_reused: int
    teacher_forwards: int
    seconds: float
    snapshot_number: int = 0


class TrainReport(Record):
    """`rats stage train`; `snapshot` is the snapshot's hash, `checkpoint` the newest one's folder."""

    snapshot: str
    steps: int
    teacher_forwards: int | None
    teacher_reward_calls: int | None
    seconds: float
    checkpoint: str


class Cell(Record):
    """One value of the results, with its 95 % interval and the paired difference to the teacher.

    The difference is None for the teacher itself. The interval is None where a metric has none.
    """

    system: SystemKind
    variant: str
    nfe: int
    evaluations: int
    metric: str
    role: Role
    split: str
    mean: float
    ci_low: float | None
    ci_high: float | None
    delta_vs_teacher: float | None
    delta_ci_low: float | None
    delta_ci_high: float | None
    num_prompts: int
    num_concepts: int


class LengthCell(Cell):
    """As a cell; the student has moved `length` of the way from the base to what was trained."""

    length: float


class Made(Record):
    """When, where and by what something was made: `code` is a version and a commit, `command` what was typed."""

    date: str
    code: str
    machine: str
    command: str


class EvaluateReport(Record):
    """`reports/evaluate.json`; `snapshot` names the test samples, `students` each variant's network by its hash.

    `made` is None where an older rats has evaluated.
    """

    cells: tuple[Cell, ...]
    snapshot: str = ""
    seconds: float = 0.0
    students: dict[str, str] = {}
    made: Made | None = None


class LengthsReport(Record):
    """`reports/update-lengths.json`: students at several lengths; `chosen`: by variant, for `train.update_length`."""

    cells: tuple[LengthCell, ...]
    chosen: dict[str, float]
    snapshot: str
    seconds: float
    made: Made
