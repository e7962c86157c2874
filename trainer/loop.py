"""The training loop. Stream, student and rewards are passed to it; it opens none of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from torch import Tensor

from rats.pipeline.protocols import Conditioning, Student
from rats.schemas.errors import RetryLaterError
from rats.trainer.checkpoint import RunState
from rats.trainer.data import Sample, SampleStream, collate
from rats.trainer.objective import Losses, Moment, Objective, check_finite, loss_terms, metrics_row, not_finite_error
from rats.trainer.run import Run


class Stopped(Exception):
    """The run was told to stop in the middle of a step. The step is abandoned; no weight has changed."""


class Stoppable:
    """A student whose calls raise Stopped once `stopping` is true: a micro-batch may take too long to wait for."""

    def __init__(self, student: Student, stopping: Callable[[], bool]) -> None:
        """Does what `student` does, or raises Stopped."""
        self._student, self._stopping = student, stopping
        self.network, self.stock_sigmas = student.network, student.stock_sigmas

    def velocity(self, x_BTC: Tensor, sigma: float, conditioning: Conditioning) -> Tensor:
        """The student's own."""
        self._check()
        return self._student.velocity(x_BTC, sigma, conditioning)

    def decode(self, x_BTC: Tensor) -> Tensor:
        """The student's own."""
        self._check()
        return self._student.decode(x_BTC)

    def _check(self) -> None:
        if self._stopping():
            raise Stopped


def stoppable(objective: Objective, stopping: Callable[[], bool]) -> Objective:
    """The objective with a student and with remote rewards that raise once `stopping` is true."""
    for reward in objective.rewards:
        if hasattr(reward, "stopping"):
            reward.stopping = stopping
    return replace(objective, student=Stoppable(objective.student, stopping))


def train(objective: Objective, stream: SampleStream, run: Run) -> RunState:
    """Trains until `settings.train.steps`. Saves checkpoints regularly, at the end, and when told to stop.

    Raises DataError when a loss or a gradient is not finite or too many rewards fail, SystemExit(143) after a stop.
    """
    train = objective.settings.train
    alone = run.ranks.world == 1  # several ranks decide together, between micro-batches
    if alone:
        objective = stoppable(objective, lambda: run.stopping())
    while run.state.step < train.steps and run.state.finished is None:
        try:
            one_step(objective, stream, run)
        except (Stopped, RetryLaterError) as error:
            if isinstance(error, RetryLaterError) and not (alone and run.stopping()):
                raise  # nobody asked the run to stop: the reward's server is away
            run.save_if_quick()
            raise SystemExit(143) from None
        last = run.state.step == train.steps or run.state.finished is not None
        run.check_rewards(train.max_bad, last)
        if last or run.state.step % train.checkpoint_every == 0:
            run.save()
    return run.state


def one_step(objective: Objective, stream: SampleStream, run: Run) -> None:
    """One update by the method's loss over a batch, in micro-batches, on all ranks."""
    started, step = time.perf_counter(), run.state.step
    moment = objective.settings.moment(step)
    samples = stream.take()
    losses = accumulate(objective, samples, run, moment).gathered(run.ranks)
    norms = {}
    if losses.good_B.any():  # else nothing was learned: no update, and no step of the optimizer's averages
        keys = [sample.key for sample in samples]
        norms = run.learner.update(step, moment.split, refuse=lambda term: not_finite_error(step, term, keys))
        if run.moving_teacher is not None:
            run.moving_teacher.follow(run.learner)
    run.learner.forget()
    row = metrics_row(losses, norms)
    row |= {"step": step, "nfe": moment.nfe, "position": stream.position}
    row |= {"lr": run.learner.schedule.at(step), "teacher_age": run.teacher_age}
    row |= {"seconds": time.perf_counter() - started}
    gates = losses.gate_B[losses.good_B].tolist()
    run.advance(row, gates, len(losses.good_B) - len(gates), stream.position)


def accumulate(objective: Objective, samples: Sequence[Sample], run: Run, moment: Moment) -> Losses:
    """The gradients of this rank's samples, in micro-batches that fit in memory; returns their losses."""
    size = run.state.micro_batch or objective.settings.train.micro_batch
    while True:
        try:
            return _in_micro_batches(objective, samples, run, moment, size)
        except (RuntimeError, MemoryError) as error:
            size = run.shrink(error, min(size, len(samples)))


def _in_micro_batches(objective: Objective, samples: Sequence[Sample], run: Run, moment: Moment, size: int) -> Losses:
    parts = []
    rank_start = run.ranks.rank * len(samples)
    for start in range(0, len(samples), size):
        if run.ranks.any(run.stopping()):
            raise Stopped
        place = replace(moment, first=rank_start + start)
        parts.append(micro_step(objective, samples[start : start + size], run, place))
    return Losses.joined(parts)


def micro_step(objective: Objective, samples: Sequence[Sample], run: Run, moment: Moment) -> Losses:
    """Computes the method's losses of a micro-batch and adds their gradients."""
    batch = collate(samples, run.ranks.device)
    if run.moving_teacher is not None:
        batch = run.moving_teacher.trace(batch)
    losses = objective.method(objective, batch, moment)
    check_finite(losses, batch, moment.step)
    loss_reward, loss_shape = loss_terms(losses, objective.settings.train)
    run.learner.accumulate(loss_reward, loss_shape, moment.split, losses.bridge)
    return losses
