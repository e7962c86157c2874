"""The objective of a run, and the losses that a method computes for one micro-batch.

B samples, R rewards that train, K values a sample of what is logged.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from rats.pipeline.protocols import Reward, Student
from rats.schemas.errors import DataError
from rats.schemas.train_params import TrainParams
from rats.trainer.data import Batch
from rats.trainer.distributed import Ranks
from rats.trainer.gate import WeightedReward
from rats.trainer.sampling import Bridge, Trajectory, sample_trajectory


@dataclass(frozen=True)
class Settings:
    """`params.train` and values that follow from the shards: everything that the loop's arithmetic depends on."""

    train: TrainParams
    horizons: tuple[float, ...]
    """Sigmas of the stored rows, from 1.0 (the noise) down to 0.0 (the final)."""
    tau: float
    gate_value: float | None = None
    parts: tuple[WeightedReward, ...] = (WeightedReward(),)
    """Weight and unit of each reward that trains."""

    def moment(self, step: int) -> Moment:
        """A step, counted from 0, before its batch is cut into micro-batches."""
        train = self.train
        turns = len(train.nfe)
        stride = train.log_gradients_every
        while math.gcd(stride, turns) > 1:  # else some numbers of steps would never be met
            stride += 1
        return Moment(step, train.nfe[step % turns], split=step % stride == 0)


@dataclass(frozen=True)
class Moment:
    """A step, and the position of a micro-batch in its global batch. They decide all its random numbers."""

    step: int
    nfe: int
    first: int = 0
    """Place of the micro-batch's first sample in the global batch."""
    split: bool = False
    """Whether the gradients of both terms are logged apart, which takes a backward pass for each."""


@dataclass(frozen=True)
class Losses:
    """The losses of one micro-batch: one value for each sample, before any mean.

    The step minimises the sum of `reward_B + weight * shape_B` over the good samples, as a share of the global batch.
    """

    reward_B: Tensor
    """The reward term. Its gradient stops at `bridge`; that of the shaping term does not."""
    shape_B: Tensor
    """The shaping term, with the gate, before its weight."""
    weight: float
    """Weight of the shaping term in this step: alpha."""
    gate_B: Tensor
    """Weight of the shaping loss for each sample; ones in a method without a gate."""
    good_B: Tensor
    """False where a reward failed: such a sample counts nowhere."""
    logged: Mapping[str, Tensor]
    """More columns of metrics.csv, (B,) or (K, B): the mean over good samples under its name, of K values also each
    one's under name_k1, name_k2, ..."""
    bridge: Bridge | None = None

    def gathered(self, ranks: Ranks) -> Losses:
        """Those of all ranks, in the global order."""
        # the batch is every tensor's last axis, and gathering is along the first
        return self._with({name: ranks.gather(x.movedim(-1, 0)).movedim(0, -1) for name, x in self._tensors().items()})

    @staticmethod
    def joined(parts: Sequence[Losses]) -> Losses:
        """Micro-batches of one step side by side, without gradient."""
        tensors = [part._tensors() for part in parts]
        return parts[0]._with({name: torch.cat([found[name] for found in tensors], -1) for name in tensors[0]})

    def of_good(self) -> Losses:
        """The good samples alone."""
        return self._with({name: value[..., self.good_B] for name, value in self._tensors().items()})

    def _tensors(self) -> dict[str, Tensor]:
        own = {name: getattr(self, name) for name in _PER_SAMPLE}
        return {name: value.detach() for name, value in {**own, **self.logged}.items()}

    def _with(self, tensors: Mapping[str, Tensor]) -> Losses:
        own: dict[str, Any] = {name: tensors[name] for name in _PER_SAMPLE}
        return replace(self, **own, logged={name: tensors[name] for name in self.logged}, bridge=None)


_PER_SAMPLE = ("reward_B", "shape_B", "gate_B", "good_B")


@dataclass(frozen=True)
class Objective:
    """What a run trains: a student, the rewards to maximise, and the method. `ranks` share the work."""

    student: Student
    rewards: Sequence[Reward]
    settings: Settings
    ranks: Ranks
    method: Method

    def sample(self, batch: Batch, nfe: int) -> Trajectory:
        """The student's path from the batch's noise in `nfe` steps, in the ranks' precision, with gradient."""
        sigmas = self.student.stock_sigmas(nfe)
        with self.ranks.autocast():
            return sample_trajectory(self.student, batch.noise, sigmas, batch.conditioning, self.settings.train.last_k)


Method = Callable[[Objective, Batch, Moment], Losses]
"""A few-step method: see `trainer.methods`."""


def loss_terms(losses: Losses, train: TrainParams) -> tuple[Tensor, Tensor]:
    """The two scalars whose sum is the loss: sums over the good samples, as shares of the whole global batch.

    docs/design.md, equation 14.
    """
    good = losses.good_B
    climbed = losses.reward_B[good].sum() / train.batch
    shaped = losses.weight * (losses.shape_B[good].sum() / train.batch)
    return climbed, shaped if losses.weight > 0 else shaped.detach()


def check_finite(losses: Losses, batch: Batch, step: int) -> None:
    """Raises DataError with step, term and samples if a loss or teacher score is NaN or infinite, before it is used.

    Failed scores of a reward are no error here: their samples are left out.
    """
    named = {"the teacher's score": batch.r_teacher_RB.sum(0), "the shaping loss": losses.shape_B}
    for term, value_B in named.items():
        bad_B = ~torch.isfinite(value_B.detach())
        if bad_B.any():
            raise not_finite_error(
                step, term, [key for key, bad in zip(batch.keys, bad_B.tolist(), strict=True) if bad]
            )


def check_latents(final_BTC: Tensor, batch: Batch, step: int) -> None:
    """Raises DataError with step and samples for final latents that are not finite, before they are decoded."""
    bad_B = ~torch.isfinite(final_BTC.detach()).flatten(1).all(1)
    if bad_B.any():
        bad = [key for key, is_bad in zip(batch.keys, bad_B.tolist(), strict=True) if is_bad]
        raise not_finite_error(step, "the student's final latent", bad)


def not_finite_error(step: int, term: str, keys: Sequence[str]) -> DataError:
    """The error for a number that is not finite."""
    shown = ", ".join(keys[:4]) + (f" and {len(keys) - 4} more" if len(keys) > 4 else "")
    way_out = "no weight was changed: lower train.lr or look at the reward, then go on with --resume latest"
    return DataError(f"step {step}: {term} is not finite for {shown}; {way_out}")


Value = float | int | None


def metrics_row(losses: Losses, norms: Mapping[str, float]) -> dict[str, Value]:
    """The step's means over the good samples of the whole batch, for `metrics.csv`; empty where there is none."""
    row: dict[str, Value] = {"alpha": losses.weight, "bad": int((~losses.good_B).sum())}
    row |= {f"grad_{term}": norms.get(term) for term in ("reward", "shape", "total")}
    if not losses.good_B.any():
        return row
    good = losses.of_good()
    row |= {
        "gate_mean": float(good.gate_B.mean()),
        "gate_std": float(good.gate_B.std(correction=0)),
        "loss_total": float(good.reward_B.mean() + good.weight * good.shape_B.mean()),
        "loss_reward": float(good.reward_B.mean()),
    }
    for name, value in good.logged.items():
        row[name] = float(value.mean())
        if value.ndim == 2:
            row |= {f"{name}_k{k}": float(mean) for k, mean in enumerate(value.mean(1), 1)}
    return row
