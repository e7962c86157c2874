"""A run under way: what learns, where it stands, what it writes, and who looks on."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Protocol

from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from torch import Tensor

from rats.schemas.errors import ConfigError, DataError
from rats.trainer import randomness
from rats.trainer.checkpoint import RNG, Checkpoints, Identity, Saved, State
from rats.trainer.data import Batch
from rats.trainer.distributed import Ranks
from rats.trainer.metrics import CsvLog, Row
from rats.trainer.optim import Learner

log = logging.getLogger(__name__)

METRICS = "metrics.csv"
WINDOW = 10
"""Steps over which the share of bad rewards is judged."""
QUICK = 2 * 2**30
"""Bytes of a checkpoint that is sure to be written in the few seconds after SIGTERM."""


class Live(Protocol):
    """A teacher that moves: one that runs in the loop, or the average that the next generation is rolled from."""

    in_loop: bool
    """Whether each batch's trajectories are made anew."""

    def trace(self, batch: Batch) -> Batch:
        """The batch with the live teacher's trajectory and scores in place of the stored ones."""
        ...

    def follow(self, learner: Learner) -> None:
        """One step of the moving average, after an update."""
        ...

    def tensors(self) -> dict[str, Tensor]:
        """All that a resume needs, whole, on the CPU."""
        ...

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Take back what `tensors` gave."""
        ...


@dataclass
class Run:
    """What `train` moves forward. `observers` are called after each step, on every rank, before a checkpoint is saved.

    `student_step`: of which step the student is left that an observer has chosen; None: of the last.
    `teacher_born`: the step at which the followed trajectories were made.
    """

    learner: Learner
    checkpoints: Checkpoints
    logs: dict[str, CsvLog]
    identity: Identity
    snapshot: int
    state: State = field(default_factory=State)
    ranks: Ranks = field(default_factory=Ranks)
    observers: list[Callable[[Run, Row], None]] = field(default_factory=list)
    stopping: Callable[[], bool] = lambda: False
    live: Live | None = None
    student_step: int | None = None
    teacher_born: int = 0
    recent: deque[tuple[int, int]] = field(default_factory=lambda: deque(maxlen=WINDOW))

    def advance(self, row: dict[str, float | int | None], gates: list[float], bad: int, position: int) -> None:
        """Write the step's row, count the step as done, let the observers see it."""
        if self.ranks.is_main:
            self.logs[METRICS].append(row)
        self.state = self.state.after(position, gates, bad, float(row["seconds"] or 0.0))
        self.recent.append((bad, len(gates) + bad))
        for observer in self.observers:
            observer(self, row)

    @property
    def teacher_age(self) -> int:
        """Steps since the followed trajectories were made."""
        return 0 if self.live is not None and self.live.in_loop else self.state.step - self.teacher_born

    def finish(self, reason: str) -> None:
        """End the run after this step, as if it were the last."""
        self.state = replace(self.state, finished=reason)

    def check_rewards(self, max_bad: float, last: bool) -> None:
        """Raise DataError when too many of the last ten steps' samples (at the end, of what there is) had no score."""
        bad, asked = (sum(counts) for counts in zip(*self.recent, strict=True)) if self.recent else (0, 0)
        if (last or len(self.recent) == WINDOW) and bad > max_bad * asked:
            raise DataError(
                f"the reward gave no score for {bad} of the last {asked} samples, more than train.max_bad = {max_bad}: "
                "mend it, then go on with --resume latest"
            )

    def shrink(self, error: Exception, size: int) -> int:
        """Half the micro-batch, for good, after `error`; any other error than an exhausted memory is raised again."""
        if not (should_reduce_batch_size(error) or isinstance(error, MemoryError)):
            raise error
        hint = "set train.gradient_checkpointing, train.lora or a smaller resolution"
        if size == 1 or self.ranks.world > 1:
            raise ConfigError(
                f"a micro-batch of {size} does not fit in memory: "
                + (hint if size == 1 else f"set train.micro_batch: {size // 2}")
            ) from error
        self.learner.forget()
        clear_device_cache(garbage_collection=True)
        self.state = replace(self.state, micro_batch=size // 2)
        log.warning("out of memory with micro-batches of %d: %d from here on", size, size // 2)
        return size // 2

    def save(self) -> None:
        """A checkpoint of this moment; all ranks must call, the main one writes, and all wait for it."""
        tensors = self.learner.tensors()
        if self.live is not None:
            tensors["teacher"] = self.live.tensors()
        for rank, states in enumerate(self.ranks.gather_objects(randomness.capture())):
            tensors[RNG.format(rank=rank)] = states
        if self.ranks.is_main:
            logs = {name: file.content() for name, file in self.logs.items()}
            self.checkpoints.save(self.state, tensors, logs, self.identity, self.snapshot)
        self.ranks.wait()

    def save_if_quick(self) -> None:
        """For a process that has seconds left: a large checkpoint is not begun, the last one stands."""
        if self.learner.size() <= QUICK:
            self.save()

    def restore(self, saved: Saved) -> None:
        """Go on from a checkpoint. Raises DataError when it lacks something that a bit-exact resume needs."""
        files = saved.tensors()
        self.learner.restore(files)
        if self.live is not None:
            self.live.restore(files.get("teacher", {}))
        self.state = saved.state
        name = RNG.format(rank=self.ranks.rank)
        if name in files or self.ranks.rank == 0:  # a rank that the saved run did not have keeps its own seed
            randomness.restore(files.get(name, {}))
