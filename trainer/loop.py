"""Stage two: the loop. It is handed its stream, its student and its reward, and opens none of them.

B samples, H stored horizons, T latent tokens, C channels, N student steps.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rats.pipeline.pixels import augment
from rats.pipeline.protocols import Reward, Student
from rats.schemas.errors import DataError
from rats.schemas.horizons import rows_of
from rats.schemas.params import TrainParams
from rats.trainer.batches import Batch, SampleStream, take
from rats.trainer.checkpoint import Checkpoints, Identity, State
from rats.trainer.gate import gate
from rats.trainer.losses import compared, reward_loss, shape_loss
from rats.trainer.metrics import MetricsFile, Row
from rats.trainer.optim import Learner, rate
from rats.trainer.sampling import Trajectory, rounded, sample


@dataclass(frozen=True)
class Settings:
    """`params.train`, with what the shards decide: all that the loop's arithmetic depends on."""

    train: TrainParams
    horizons: tuple[float, ...]
    """Sigmas of the stored rows, from 1.0 (the noise) down to 0.0 (the final)."""
    tau: float
    gate_value: float | None = None


@dataclass
class Run:
    """A run under way: what learns, where it stands, where it writes, whether somebody asked it to stop."""

    learner: Learner
    checkpoints: Checkpoints
    metrics: MetricsFile
    identity: Identity
    snapshot: int
    state: State = field(default_factory=State)
    report: Callable[[Row], None] = lambda row: None
    stopping: Callable[[], bool] = lambda: False

    def advance(self, row: dict[str, float | int | None], gates: list[float], position: int, seconds: float) -> None:
        """Write the step's row, then count the step as done."""
        row |= {"seconds": seconds, "position": position}
        self.metrics.append(row)
        self.state = self.state.after(position, gates, seconds)
        self.report(row)

    def save(self) -> None:
        """A checkpoint of this moment."""
        tensors, metrics = self.learner.tensors(), self.metrics.content()
        self.checkpoints.save(self.state, tensors, metrics, self.identity, self.snapshot)


@dataclass(frozen=True)
class Losses:
    """One micro-batch, before any mean is taken."""

    reward_B: Tensor
    shape_NB: Tensor
    gate_B: Tensor
    r_student_B: Tensor
    r_teacher_B: Tensor


def train(student: Student, stream: SampleStream, reward: Reward, settings: Settings, run: Run) -> State:
    """Train until `settings.train.steps`; a checkpoint every so often, at the end, and when asked to stop.

    Raises DataError when a score, a loss or a gradient is not finite, and SystemExit(143) after a stop.
    """
    while run.state.step < settings.train.steps:
        one_step(student, stream, reward, settings, run)
        stop = run.stopping()
        if stop or run.state.step % settings.train.checkpoint_every == 0 or run.state.step == settings.train.steps:
            run.save()
        if stop:
            raise SystemExit(143)
    return run.state


def one_step(student: Student, stream: SampleStream, reward: Reward, settings: Settings, run: Run) -> None:
    """One update: L = L_reward + alpha g L_shape over a batch, in micro-batches."""
    started, step, train = time.perf_counter(), run.state.step, settings.train
    nfe = train.nfe[step % len(train.nfe)]
    sigmas = student.stock_sigmas(nfe)
    split = step % train.log_gradients_every == 0
    device = run.learner.parameters[0].device
    parts = []
    batches = take(stream, train.batch, train.micro_batch, device)
    for micro, batch in enumerate(batches):
        trajectory = sample(student, batch.noise, sigmas, batch.conditioning, train.last_k)
        losses = evaluate(student, reward, batch, trajectory, sigmas, settings, generator(train.seed, step, micro))
        check(losses, batch, step)
        share = len(batch.keys) / train.batch
        run.learner.accumulate(*terms(losses, train, share), split=split, bridge=trajectory.bridge)
        parts.append(losses)
    keys = [key for batch in batches for key in batch.keys]
    norms = run.learner.update(step, split, refuse=lambda term: refusal(step, term, keys))
    row = row_of(parts, norms, settings) | {"step": step, "nfe": nfe, "lr": rate(train.lr, train.warmup, step)}
    gates = torch.cat([losses.gate_B for losses in parts]).tolist()
    run.advance(row, gates, stream.position, time.perf_counter() - started)


def evaluate(
    student: Student,
    reward: Reward,
    batch: Batch,
    trajectory: Trajectory,
    sigmas: Sequence[float],
    settings: Settings,
    random: torch.Generator,
) -> Losses:
    """Both losses and the gate of one micro-batch: one decoding, one scoring with gradient, one without."""
    train = settings.train
    with torch.set_grad_enabled(train.reward_weight > 0):
        images_B3HW = student.decode(rounded(trajectory.final))
        seen_B3HW = augment(images_B3HW, random, train.augment) if train.augment else images_B3HW
        scores_B = reward.score(seen_B3HW, batch.prompts)
    r_student_B = scores_B.detach()
    if train.augment:  # R_S is scored as R_T was: the bare picture
        with torch.no_grad():
            r_student_B = reward.score(images_B3HW.detach(), batch.prompts)
    return Losses(
        reward_B=reward_loss(scores_B, train.reward_weight, train.margin),
        shape_NB=shape(batch, trajectory, sigmas, settings),
        gate_B=gate(train.gate.form, batch.r_teacher_B, r_student_B, settings.tau, settings.gate_value),
        r_student_B=r_student_B.float(),
        r_teacher_B=batch.r_teacher_B,
    )


def shape(batch: Batch, trajectory: Trajectory, sigmas: Sequence[float], settings: Settings) -> Tensor:
    """Shaping loss (N, B) of the student's path against the stored one, row by exact sigma."""
    rows, space = rows_of(settings.horizons, sigmas), settings.train.shape.space
    student = compared(space, trajectory.states, trajectory.x0s, sigmas)
    teacher = compared(space, [*batch.x_HBTC[rows]], [*batch.x0_HBTC[rows[:-1]]], sigmas)
    return shape_loss(student, teacher, settings.train.shape.l2, settings.train.shape.cos)


def terms(losses: Losses, train: TrainParams, share: float = 1.0) -> tuple[Tensor, Tensor]:
    """The two scalars whose sum is the loss, weighted by the micro-batch's share of the batch."""
    l_shape_B = losses.shape_NB.mean(0)
    shaped = share * train.alpha * (losses.gate_B * l_shape_B).mean()
    return share * losses.reward_B.mean(), shaped if train.alpha > 0 else shaped.detach()


def generator(seed: int, step: int, micro: int) -> torch.Generator:
    """Randomness of one micro-batch's augmentation, a function of its place in the run and of nothing else."""
    digest = hashlib.sha256(f"augment {seed} {step} {micro}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def check(losses: Losses, batch: Batch, step: int) -> None:
    """Raise DataError naming step, term and samples when something is NaN or infinite, before any backward pass."""
    named: Mapping[str, Tensor] = {
        "the teacher's score": losses.r_teacher_B,
        "the student's score": losses.r_student_B,
        "the reward loss": losses.reward_B,
        "the shaping loss": losses.shape_NB.sum(0),
    }
    for term, value_B in named.items():
        bad_B = ~torch.isfinite(value_B.detach())
        if bad_B.any():
            raise refusal(step, term, [key for key, bad in zip(batch.keys, bad_B.tolist(), strict=True) if bad])


def refusal(step: int, term: str, keys: Sequence[str]) -> DataError:
    """The error for a number that is not finite."""
    shown = ", ".join(keys[:4]) + (f" and {len(keys) - 4} more" if len(keys) > 4 else "")
    way_out = "no weight was changed: lower train.lr or look at the reward, then go on with --resume latest"
    return DataError(f"step {step}: {term} is not finite for {shown}; {way_out}")


def row_of(parts: Sequence[Losses], norms: Mapping[str, float], settings: Settings) -> dict[str, float | int | None]:
    """The step's means over the whole batch, for `metrics.csv`."""
    r_student, r_teacher = (torch.cat([getattr(p, name) for p in parts]) for name in ("r_student_B", "r_teacher_B"))
    gate_B, reward_B = (torch.cat([getattr(p, name) for p in parts]).detach() for name in ("gate_B", "reward_B"))
    shape_NB = torch.cat([p.shape_NB.detach() for p in parts], 1)
    total = reward_B.mean() + settings.train.alpha * (gate_B * shape_NB.mean(0)).mean()
    row: dict[str, float | int | None] = {
        "reward_student": float(r_student.mean()),
        "reward_teacher": float(r_teacher.mean()),
        "gap": float((r_teacher - r_student).mean()),
        "gate_mean": float(gate_B.mean()),
        "gate_std": float(gate_B.std(correction=0)),
        "loss_total": float(total),
        "loss_reward": float(reward_B.mean()),
        "loss_shape": float(shape_NB.mean()),
        "grad_reward": norms.get("reward"),
        "grad_shape": norms.get("shape"),
        "grad_total": norms["total"],
    }
    return row | {f"loss_shape_k{k}": float(loss) for k, loss in enumerate(shape_NB.mean(1), 1)}
