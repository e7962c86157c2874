"""`run.json`: the record of a training run, which lies beside its student."""

from __future__ import annotations

from typing import Any

from rats.schemas.record import Record
from rats.schemas.reports import TrainReport


class Generation(Record):
    """A generation of `teacher.mode: refresh`, rolled out at `step` (0: the teacher's own).

    `mean_reward` is the mean of the trained reward. `accepted` is false if it is lower than that of the generation
    in use, which then stays in use.
    """

    step: int
    fingerprint: str
    snapshot: str
    snapshot_number: int
    samples: int
    mean_reward: float
    accepted: bool
    shard_bytes: int
    network_bytes: int


class SettingChange(Record):
    """A setting that another took the place of when the run went on from `step`, by `--force`."""

    step: int
    field: str
    was: Any
    now: Any


class Owner(Record):
    """`owner.json`: the process that trains in the folder; `parent` ends it by ending, None: it outlives everybody."""

    process: int
    host: str
    since: str
    parent: int | None
    token: str


class RunRecord(TrainReport):
    """The result of `rats stage train`, with the hashes of everything that went into it.

    `recipe` is the fingerprint of the shards, `reward_column` the address of the teacher's scores, `base` the hash of
    the transformer that the student started from, `student` of the folder that it was saved to. `call` is what its
    pipeline is called with. `settings_values` are what `settings` is the hash of. `seconds`, forwards and calls are
    those of all steps, over all resumes; None where an older rats, which did not keep them, made some of the steps.
    """

    variant: str
    nfe: tuple[int, ...]
    recipe: str
    snapshot_number: int
    samples: int
    samples_unscored: int
    reward: str
    reward_fingerprint: str
    reward_column: str
    base: str
    vae: str
    student: str
    settings: str
    gate_form: str
    gate_mean: float | None
    gate_value: float | None
    tau: float
    student_forwards: int | None
    seconds_per_step: float
    threads: int
    call: dict[str, int | float] | None = None
    """None in records that an older rats has written; so are the four below."""
    sigmas: dict[int, tuple[float, ...]] | None = None
    """The scheduler's grid for each number of steps in `nfe`, shifted, down to 0."""
    diffusers: str | None = None
    """The version that made the grid."""
    saved_dtype: str | None = None
    movement_kept: float | None = None
    """Share of what training moved that `saved_dtype` keeps: |saved - start| / |trained - start| over all weights."""
    update_length: float = 1.0
    """The share of the way from the base to what was trained at which the student was saved."""
    clipped: float | None = None
    """Share of the steps whose gradient was longer than `train.clip_norm`."""
    ranks: int = 1
    micro_batch: int | None = None
    rewards_asked: int = 0
    rewards_bad: int = 0
    finished: str | None = None
    student_step: int | None = None
    teacher_mode: str = "frozen"
    """`live-ema` runs a teacher in every step: `teacher_forwards` and `teacher_reward_calls` are its own."""
    generations: tuple[Generation, ...] = ()
    settings_values: dict[str, Any] | None = None
    changes: tuple[SettingChange, ...] = ()
