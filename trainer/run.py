"""A run in progress: its learner, state, logs, checkpoints and observers."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from torch import Tensor

from rats.schemas.errors import ConfigError, DataError
from rats.schemas.train_params import TrainParams
from rats.trainer import randomness
from rats.trainer.checkpoint import RNG, Change, Checkpoints, RunIdentity, RunState, SavedCheckpoint, read_checkpoint
from rats.trainer.data import Batch
from rats.trainer.distributed import Ranks
from rats.trainer.metrics import CsvLog, MetricsRow, metrics_columns
from rats.trainer.objective import Objective
from rats.trainer.optim import Learner
from rats.trainer.replaced import set_aside

log = logging.getLogger(__name__)

METRICS = "metrics.csv"
BAD_SHARE_STEPS = 10
"""Number of last steps over which the share of failed scores is checked."""
QUICK = 2 * 2**30
"""The largest checkpoint in bytes that is still written in the few seconds after SIGTERM."""


class MovingTeacher(Protocol):
    """A teacher that follows the student: one that runs in the loop, or the average for the next generation."""

    in_loop: bool
    """Whether it makes new trajectories for each batch."""

    def trace(self, batch: Batch) -> Batch:
        """The batch with the live teacher's trajectory and scores in place of the stored ones."""
        ...

    def follow(self, learner: Learner) -> None:
        """Updates it after each update of the student."""
        ...

    def tensors(self) -> dict[str, Tensor]:
        """Everything that a resume needs: full tensors on the CPU."""
        ...

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Loads what `tensors` gave."""
        ...


@dataclass
class Run:
    """The state that `train` advances. Read its attributes; only its methods change them.

    `student_step`: the step whose student is saved, if it is not the last one.
    """

    learner: Learner
    checkpoints: Checkpoints
    identity: RunIdentity
    snapshot: int
    state: RunState = field(default_factory=RunState)
    moving_teacher: MovingTeacher | None = None
    logs: dict[str, CsvLog] = field(default_factory=dict)
    """By file name; on the main rank only."""
    student_step: int | None = None
    stopping: Callable[[], bool] = lambda: False
    callbacks: list[Callback] = field(default_factory=list)
    counts: Callable[[], Mapping[str, int]] = dict
    check_owner: Callable[[], None] = lambda: None
    recent: deque[tuple[int, int]] = field(default_factory=lambda: deque(maxlen=BAD_SHARE_STEPS))
    """Numbers of bad and of all samples in each of the last steps."""

    @property
    def ranks(self) -> Ranks:
        """The processes that train together."""
        return self.learner.ranks

    @property
    def teacher_age(self) -> int:
        """Steps since the followed trajectories were made."""
        is_new = self.moving_teacher is not None and self.moving_teacher.in_loop
        return 0 if is_new else self.state.step - self.state.generation

    def open_log(self, log: CsvLog) -> None:
        """Adds a log, of which every later checkpoint has a copy."""
        self.logs[log.path.name] = log

    def stop_when(self, stopping: Callable[[], bool]) -> None:
        """Makes the run stop in the middle of a step as soon as `stopping` returns true."""
        self.stopping = stopping

    def counted_by(self, counts: Callable[[], Mapping[str, int]]) -> None:
        """Keep the counters of `RunState` by what `counts` says was done since it was asked last."""
        self.counts = counts

    def owned_by(self, check: Callable[[], None]) -> None:
        """Call `check` before each write; it raises where the folder belongs to somebody else."""
        self.check_owner = check

    @contextmanager
    def with_callbacks(self, *observers: Callback) -> Iterator[None]:
        """In this block, calls `observers` after each step, in order, on every rank, before a checkpoint is saved."""
        before = self.callbacks
        self.callbacks = [*before, *observers]
        try:
            yield
        finally:
            self.callbacks = before

    def advance(self, row: dict[str, float | int | None], gates: list[float], bad: int, position: int) -> None:
        """Writes the step's row, updates the state, and calls the observers."""
        if self.ranks.is_main:
            self.check_owner()
            self.logs[METRICS].append(row)
        self.state = self.state.after(position, gates, bad, float(row["seconds"] or 0.0)).counted(self.counts())
        self.recent.append((bad, len(gates) + bad))
        for observer in self.callbacks:
            observer(self, row)
        self.state = self.state.counted(self.counts())  # what the observers have evaluated

    def follow_generation(self, step: int) -> None:
        """Continues with the shards of the generation of `step`, from their first sample."""
        self.state = replace(self.state, generation=step, position=0)

    def keep_tau(self, tau: float) -> None:
        """Stores the measured tau for resumed runs."""
        self.state = replace(self.state, tau=tau)

    def keep_changes(self, changes: tuple[Change, ...]) -> None:
        """Settings that differ from here on."""
        self.state = replace(self.state, changes=self.state.changes + changes)

    def finish(self, reason: str) -> None:
        """End the run after this step, as if it were the last."""
        self.state = replace(self.state, finished=reason)

    def go_back_to(self, step: int) -> None:
        """Loads the student of this step's checkpoint, which is then saved instead of the last one."""
        self.learner.restore(read_checkpoint(self.checkpoints.path(step)).tensors())
        self.student_step = step

    def check_rewards(self, max_bad: float, last: bool) -> None:
        """Raises DataError if too many scores of the last ten steps failed; at the end, also of fewer steps."""
        bad = sum(count for count, _ in self.recent)
        asked = sum(count for _, count in self.recent)
        if (last or len(self.recent) == BAD_SHARE_STEPS) and bad > max_bad * asked:
            raise DataError(
                f"the reward gave no score for {bad} of the last {asked} samples, more than train.max_bad = {max_bad}: "
                "mend it, then go on with --resume latest"
            )

    def gradient_norms(self) -> list[float]:
        """The norm of every update's gradient so far, before clipping. On the main rank only."""
        return [float(row["grad_total"]) for row in self.logs[METRICS].rows() if row["grad_total"]]

    def shrink(self, error: Exception, size: int) -> int:
        """Halves the micro-batch for the rest of the run if `error` says out of memory; else raises it again."""
        if not (should_reduce_batch_size(error) or isinstance(error, MemoryError)):
            raise error
        if size == 1 or self.ranks.world > 1:  # several ranks would have to shrink together
            hint = f"set train.micro_batch: {size // 2}"
            if size == 1:
                hint = "set train.gradient_checkpointing, train.lora or a smaller resolution"
            raise ConfigError(f"a micro-batch of {size} does not fit in memory: {hint}") from error
        self.learner.forget()
        clear_device_cache(garbage_collection=True)
        self.state = replace(self.state, micro_batch=size // 2)
        log.warning("out of memory with micro-batches of %d: %d from here on", size, size // 2)
        return size // 2

    def save(self) -> None:
        """Saves a checkpoint. All ranks must call this; the main one writes, and all wait for it."""
        tensors = self.learner.tensors()
        if self.moving_teacher is not None:
            tensors["teacher"] = self.moving_teacher.tensors()
        for rank, states in enumerate(self.ranks.gather_objects(randomness.capture())):
            tensors[RNG.format(rank=rank)] = states
        if self.ranks.is_main:
            self.check_owner()
            logs = {name: file.content() for name, file in self.logs.items()}
            self.checkpoints.save(self.state, tensors, logs, self.identity, self.snapshot)
        self.ranks.wait()

    def save_if_quick(self) -> None:
        """Saves a checkpoint unless it is too large for the few seconds after SIGTERM."""
        if self.learner.size() <= QUICK:
            self.save()

    def restore(self, saved: SavedCheckpoint) -> None:
        """Resumes from a checkpoint. Raises DataError if it lacks something for a bit-exact resume."""
        files = saved.tensors()
        self.learner.restore(files)
        if self.moving_teacher is not None:
            self.moving_teacher.restore(files.get("teacher", {}))
        self.state = saved.state
        name = RNG.format(rank=self.ranks.rank)
        if name in files or self.ranks.rank == 0:  # a rank that the saved run did not have keeps its own seed
            randomness.restore(files.get(name, {}))


Callback = Callable[[Run, MetricsRow], None]


def checkpoints_in(out: Path, settings: TrainParams) -> Checkpoints:
    """The checkpoints of the run in `out`; there may be none yet."""
    return Checkpoints(out / "checkpoints", settings.checkpoints_total_limit)


def no_moving_teacher(learner: Learner) -> None:
    """The follower for a stored teacher: None."""


def open_run(
    objective: Objective,
    out: Path,
    identity: RunIdentity,
    snapshot: int,
    saved: SavedCheckpoint | None = None,
    state: RunState | None = None,
    follower: Callable[[Learner], MovingTeacher | None] = no_moving_teacher,
) -> Run:
    """A run of `objective` in the folder `out`; later checkpoints of an earlier run are set aside.

    All ranks must call this. The run resumes from the checkpoint `saved`; without one it starts at `state` (None: at
    the first step). `follower` makes the teacher that follows the student.

    Raises DataError if the checkpoint is of another network or incomplete.
    """
    train, ranks = objective.settings.train, objective.ranks
    learner = Learner(objective.student.network, train, ranks)
    checkpoints = checkpoints_in(out, train)
    run = Run(learner, checkpoints, identity, snapshot, state or RunState(), follower(learner))
    if saved:
        run.restore(saved)
        log.info("going on from %s", saved.path)
    ranks.wait()  # nobody reads any more what is moved now
    if ranks.is_main:
        header = metrics_columns(max(train.nfe), [part.name for part in objective.settings.parts])
        run.open_log(CsvLog(out / METRICS, header, saved.log(METRICS) if saved else None))
        set_aside(out, checkpoints.after(run.state.step))
    return run
