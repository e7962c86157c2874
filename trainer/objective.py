"""What one micro-batch costs: both losses, the gate between them, and what is written about them.

B samples, R rewards that train, N student steps, T latent tokens, C channels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial

import torch
from torch import Tensor

from rats.pipeline.ask import is_differentiable
from rats.pipeline.pixels import Draws, augment
from rats.pipeline.protocols import Reward, Student
from rats.schemas.errors import DataError
from rats.schemas.horizons import rows_of
from rats.schemas.train_params import TrainParams
from rats.trainer.batches import Batch
from rats.trainer.black_box import estimated
from rats.trainer.distributed import Ranks
from rats.trainer.gate import Part, gate_all, spread, total
from rats.trainer.losses import compared, reward_loss, shape_loss
from rats.trainer.randomness import generator
from rats.trainer.sampling import Trajectory, rounded, sample
from rats.trainer.scoring import Scored, score


@dataclass(frozen=True)
class Settings:
    """`params.train`, with what the shards decide: all that the loop's arithmetic depends on."""

    train: TrainParams
    horizons: tuple[float, ...]
    """Sigmas of the stored rows, from 1.0 (the noise) down to 0.0 (the final)."""
    tau: float
    gate_value: float | None = None
    parts: tuple[Part, ...] = (Part(),)
    """Weight and unit of each reward that trains."""

    def moment(self, step: int) -> Moment:
        """A step, counted from 0, before its batch is cut into micro-batches."""
        train = self.train
        nfe = train.nfe[step % len(train.nfe)]
        return Moment(step, nfe, split=step % train.log_gradients_every == 0)


@dataclass(frozen=True)
class Moment:
    """A step, and where a micro-batch lies in its global batch: all that its randomness is keyed by."""

    step: int
    nfe: int
    first: int = 0
    """Place of the micro-batch's first sample in the global batch."""
    split: bool = False
    """Whether the gradients of both terms are logged apart, which takes a backward pass for each."""


@dataclass(frozen=True)
class Objective:
    """What a training run is for: a student, the rewards that it climbs, and how; `ranks` share the work."""

    student: Student
    rewards: Sequence[Reward]
    settings: Settings
    ranks: Ranks

    def sample(self, batch: Batch, nfe: int) -> Trajectory:
        """The student's path from the batch's noise in `nfe` steps, in the ranks' precision, with gradient."""
        sigmas = self.student.stock_sigmas(nfe)
        with self.ranks.autocast():
            return sample(self.student, batch.noise, sigmas, batch.conditioning, self.settings.train.last_k)


@dataclass(frozen=True)
class Losses:
    """One micro-batch, before any mean is taken. Where `good_B` is false a reward gave no score: nothing counts."""

    reward_B: Tensor
    shape_NB: Tensor
    gate_B: Tensor
    r_student_RB: Tensor
    r_teacher_RB: Tensor
    good_B: Tensor

    def gathered(self, ranks: Ranks) -> Losses:
        """Those of all ranks, in the global order."""
        values = {f.name: getattr(self, f.name).detach() for f in fields(self)}
        # the batch is every tensor's last axis, and gathering is along the first
        return Losses(**{name: ranks.gather(value.movedim(-1, 0)).movedim(0, -1) for name, value in values.items()})

    @staticmethod
    def joined(parts: Sequence[Losses]) -> Losses:
        """Micro-batches side by side, without gradient."""
        return Losses(**{f.name: torch.cat([getattr(p, f.name).detach() for p in parts], -1) for f in fields(Losses)})


def evaluate(objective: Objective, batch: Batch, trajectory: Trajectory, moment: Moment) -> Losses:
    """Both losses and the gate of one micro-batch: one decoding; with augmentation, two scorings by each reward."""
    student, rewards, settings = objective.student, objective.rewards, objective.settings
    train, final_BTC = settings.train, rounded(trajectory.final)
    climbed = [train.reward_weight > 0 and is_differentiable(reward) for reward in rewards]
    with torch.set_grad_enabled(any(climbed)):
        images_B3HW = student.decode(final_BTC)
        if any(climbed):
            draws = Draws(generator(train.seed, moment.step), moment.first, train.batch)
            seen_B3HW = augment(images_B3HW, draws, train.augment)
    seen, bare = [], []
    for reward, own in zip(rewards, climbed, strict=True):
        if own:
            seen.append(score(reward, seen_B3HW, batch.prompts))
        # R_S is scored as R_T was: the bare picture
        bare.append(seen[-1] if own and not train.augment else scored_bare(reward, images_B3HW, batch.prompts))
        if not own:
            estimate = train.reward_weight > 0
            seen.append(
                _estimated(student, reward, bare[-1], final_BTC, batch, train, moment) if estimate else bare[-1]
            )
    return _losses(seen, bare, batch, shape(batch, trajectory, settings), settings)


@torch.no_grad()
def scored_bare(reward: Reward, images_B3HW: Tensor, prompts: list[str]) -> Scored:
    """Scored as R_T was: the picture as it is, without gradient."""
    return score(reward, images_B3HW.detach(), prompts)


def _estimated(
    student: Student,
    reward: Reward,
    center: Scored,
    final_BTC: Tensor,
    batch: Batch,
    train: TrainParams,
    moment: Moment,
) -> Scored:
    """What a reward without a gradient is climbed by; each sample's randomness is its own, whatever the cut."""
    randoms = [generator(train.seed, moment.step, "black box", moment.first + i) for i in range(len(batch.keys))]
    ask = partial(score, reward)
    return estimated(student.decode, ask, center, final_BTC, batch.prompts, train.black_box, randoms)


def _losses(
    seen: Sequence[Scored], bare: Sequence[Scored], batch: Batch, shape_NB: Tensor, settings: Settings
) -> Losses:
    train, parts = settings.train, settings.parts
    r_student_RB = torch.stack([scored.scores_B.detach() for scored in bare])
    answers = [scored.good_B for scored in (*seen, *bare)] + ([] if batch.good_B is None else [batch.good_B])
    scores_B = total(torch.stack([scored.scores_B for scored in seen]), parts)
    return Losses(
        reward_B=reward_loss(scores_B, train.reward_weight, train.margin),
        shape_NB=shape_NB,
        gate_B=gate_all(train.gate, batch.r_teacher_RB, r_student_RB, parts, settings.tau, settings.gate_value),
        r_student_RB=r_student_RB,
        r_teacher_RB=batch.r_teacher_RB,
        good_B=torch.stack(answers).all(0),
    )


def shape(batch: Batch, trajectory: Trajectory, settings: Settings) -> Tensor:
    """Shaping loss (N, B) of the student's path against the stored one, row by exact sigma."""
    sigmas, space = trajectory.sigmas, settings.train.shape.space
    rows = rows_of(settings.horizons, sigmas)
    student = compared(space, trajectory.states, trajectory.x0s, sigmas)
    teacher = compared(space, [*batch.x_HBTC[rows]], [*batch.x0_HBTC[rows[:-1]]], sigmas)
    return shape_loss(student, teacher, settings.train.shape.l2, settings.train.shape.cos)


def terms(losses: Losses, train: TrainParams, alpha: float) -> tuple[Tensor, Tensor]:
    """The two scalars whose sum is the loss: sums over the good samples, as shares of the whole global batch."""
    good = losses.good_B
    shaped = alpha * ((losses.gate_B * losses.shape_NB.mean(0))[good].sum() / train.batch)
    return losses.reward_B[good].sum() / train.batch, shaped if alpha > 0 else shaped.detach()


def check(losses: Losses, keys: Sequence[str], step: int) -> None:
    """Raise DataError naming step, term and samples when something of ours is NaN or infinite, before it is used.

    A reward's bad scores are none of ours: their samples are left out.
    """
    named = {"the teacher's score": losses.r_teacher_RB.sum(0), "the shaping loss": losses.shape_NB.sum(0)}
    for term, value_B in named.items():
        bad_B = ~torch.isfinite(value_B.detach())
        if bad_B.any():
            raise refusal(step, term, [key for key, bad in zip(keys, bad_B.tolist(), strict=True) if bad])


def refusal(step: int, term: str, keys: Sequence[str]) -> DataError:
    """The error for a number that is not finite."""
    shown = ", ".join(keys[:4]) + (f" and {len(keys) - 4} more" if len(keys) > 4 else "")
    way_out = "no weight was changed: lower train.lr or look at the reward, then go on with --resume latest"
    return DataError(f"step {step}: {term} is not finite for {shown}; {way_out}")


@torch.no_grad()
def gap_spread(objective: Objective, batch: Batch) -> float:
    """Standard deviation of R_T - R_S over a batch sampled at each of the student's NFE: `gate.tau: gap`."""
    parts, gaps = objective.settings.parts, []
    for nfe in objective.settings.train.grid:
        images_B3HW = objective.student.decode(rounded(objective.sample(batch, nfe).final))
        scored = [score(reward, images_B3HW, batch.prompts) for reward in objective.rewards]
        good_B = torch.stack([one.good_B for one in scored]).all(0)
        r_student_B = total(torch.stack([one.scores_B for one in scored]), parts)
        gaps.append((total(batch.r_teacher_RB, parts) - r_student_B)[good_B])
    found = objective.ranks.gather_objects(torch.cat(gaps).tolist())
    return spread([gap for of_rank in found for gap in of_rank])


Value = float | int | None


def row_of(losses: Losses, norms: Mapping[str, float], settings: Settings, alpha: float) -> dict[str, Value]:
    """The step's means over the good samples of the whole batch, for `metrics.csv`; empty where there is none."""
    good, parts = losses.good_B, settings.parts
    row: dict[str, Value] = {"alpha": alpha, "bad": int((~good).sum())}
    row |= {f"grad_{term}": norms.get(term) for term in ("reward", "shape", "total")}
    if not good.any():
        return row
    r_student_RB, r_teacher_RB = losses.r_student_RB[:, good], losses.r_teacher_RB[:, good]
    r_student, r_teacher = total(r_student_RB, parts), total(r_teacher_RB, parts)
    gate_B, reward_B, shape_NB = losses.gate_B[good], losses.reward_B[good], losses.shape_NB[:, good]
    row |= {
        "reward_student": float(r_student.mean()),
        "reward_teacher": float(r_teacher.mean()),
        "gap": float((r_teacher - r_student).mean()),
        "gate_mean": float(gate_B.mean()),
        "gate_std": float(gate_B.std(correction=0)),
        "loss_total": float(reward_B.mean() + alpha * (gate_B * shape_NB.mean(0)).mean()),
        "loss_reward": float(reward_B.mean()),
        "loss_shape": float(shape_NB.mean()),
        "teacher_beaten": float((r_student >= r_teacher).float().mean()),
    }
    if len(parts) > 1:
        row |= {f"student_{part.name}": float(r.mean()) for part, r in zip(parts, r_student_RB, strict=True)}
        row |= {f"teacher_{part.name}": float(r.mean()) for part, r in zip(parts, r_teacher_RB, strict=True)}
    return row | {f"loss_shape_k{k}": float(loss) for k, loss in enumerate(shape_NB.mean(1), 1)}
