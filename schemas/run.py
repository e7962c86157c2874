"""`run.json`: what a training run was, and what it found. It lies beside the student."""

from __future__ import annotations

from rats.schemas.reports import TrainReport


class RunRecord(TrainReport):
    """`rats stage train`'s report, with all that is needed to say later what was trained on what.

    `recipe` is the fingerprint of the shards, `reward_column` the address of the teacher's scores, `base` the hash of
    the transformer that the student started from, `student` of the folder that it was saved to. `seconds` counts the
    steps of all resumes; the forwards and calls are those of the last process.
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
    student_forwards: int
    seconds_per_step: float
    threads: int
