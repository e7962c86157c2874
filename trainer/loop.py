"""Stage two: the loop. It is handed its stream, its student and its rewards, and opens none of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from torch import Tensor

from rats.pipeline.protocols import Conditioning, Reward, Student
from rats.trainer.checkpoint import State
from rats.trainer.data import Sample, SampleStream, collate
from rats.trainer.objective import Losses, Moment, Settings, check, evaluate, refusal, row_of, terms
from rats.trainer.optim import rate
from rats.trainer.run import Run
from rats.trainer.sampling import sample


class Stopped(Exception):
    """Somebody asked the run to stop in the middle of a step, which is abandoned: no weight has changed."""


class Stoppable:
    """A student that is asked for nothing more once `stopping` is true: a micro-batch may take longer than is left."""

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


def train(student: Student, stream: SampleStream, rewards: Sequence[Reward], settings: Settings, run: Run) -> State:
    """Train until `settings.train.steps`; a checkpoint every so often, at the end, and when asked to stop.

    Raises DataError when a loss or a gradient is not finite or too many rewards fail, SystemExit(143) after a stop.
    """
    steps = settings.train.steps
    if run.ranks.world == 1:  # several ranks decide together, between micro-batches
        student = Stoppable(student, lambda: run.stopping())
    while run.state.step < steps and run.state.finished is None:
        try:
            one_step(student, stream, rewards, settings, run)
        except Stopped:
            run.save_if_quick()
            raise SystemExit(143) from None
        last = run.state.step == steps or run.state.finished is not None
        run.check_rewards(settings.train.max_bad, last)
        if last or run.state.step % settings.train.checkpoint_every == 0:
            run.save()
    return run.state


def one_step(student: Student, stream: SampleStream, rewards: Sequence[Reward], settings: Settings, run: Run) -> None:
    """One update: L = L_reward + alpha g L_shape over a batch, in micro-batches, on all ranks."""
    started, step, train = time.perf_counter(), run.state.step, settings.train
    moment = Moment(step, nfe=train.nfe[step % len(train.nfe)])
    split = step % train.log_gradients_every == 0
    samples = stream.take()
    losses = accumulate(student, samples, rewards, settings, run, moment, split).gathered(run.ranks)
    keys = [sample.key for sample in samples]
    norms = {}
    if losses.good_B.any():  # else nothing was learned: no update, and no step of the optimizer's averages
        norms = run.learner.update(step, split, refuse=lambda term: refusal(step, term, keys))
        if run.live is not None:
            run.live.follow(run.learner)
    run.learner.forget()
    row = row_of(losses, norms, settings, train.alpha_at(moment.nfe, step))
    row |= {"step": step, "nfe": moment.nfe, "lr": rate(train.lr, train.warmup, step), "position": stream.position}
    row |= {"teacher_age": run.teacher_age, "seconds": time.perf_counter() - started}
    gates = losses.gate_B[losses.good_B].tolist()
    run.advance(row, gates, len(losses.good_B) - len(gates), stream.position)


def accumulate(
    student: Student,
    samples: Sequence[Sample],
    rewards: Sequence[Reward],
    settings: Settings,
    run: Run,
    moment: Moment,
    split: bool,
) -> Losses:
    """The gradients of this rank's samples, in micro-batches that fit in memory; returns their losses."""
    size = run.state.micro_batch or settings.train.micro_batch
    while True:
        try:
            parts = []
            for start in range(0, len(samples), size):
                if run.ranks.any(run.stopping()):
                    raise Stopped
                part = samples[start : start + size]
                place = Moment(moment.step, moment.nfe, run.ranks.rank * len(samples) + start)
                parts.append(micro_step(student, part, rewards, settings, run, place, split))
            return Losses.joined(parts)
        except (RuntimeError, MemoryError) as error:
            size = run.shrink(error, min(size, len(samples)))


def micro_step(
    student: Student,
    samples: Sequence[Sample],
    rewards: Sequence[Reward],
    settings: Settings,
    run: Run,
    moment: Moment,
    split: bool,
) -> Losses:
    """Sample, decode, score, compare with the teacher, and add the gradients."""
    train, sigmas = settings.train, student.stock_sigmas(moment.nfe)
    batch = collate(samples, run.ranks.device)
    if run.live is not None:
        batch = run.live.trace(batch)
    with run.ranks.autocast():
        trajectory = sample(student, batch.noise, sigmas, batch.conditioning, train.last_k)
    losses = evaluate(student, rewards, batch, trajectory, sigmas, settings, moment)
    check(losses, batch.keys, moment.step)
    alpha = train.alpha_at(moment.nfe, moment.step)
    run.learner.accumulate(*terms(losses, train, alpha), split=split, bridge=trajectory.bridge)
    return losses
