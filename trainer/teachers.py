"""Teachers that follow the student: an average of its weights, and a teacher that runs in every step.

B samples, H horizons (the noise first, the final last), T latent tokens, C channels, R rewards.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from rats.pipeline.protocols import Reward, Teacher
from rats.pipeline.solver import euler
from rats.pipeline.store.shards import as_stored
from rats.schemas.horizons import rows_of
from rats.trainer.data import Batch
from rats.trainer.distributed import copy_into, full_tensors
from rats.trainer.optim import Learner
from rats.trainer.scoring import score


class WeightAverage:
    """Moving average of a student's trained weights, by which `refresh` rolls out its next generation.

    It runs no network: batches keep their stored trajectories.
    """

    in_loop = False

    def __init__(self, learner: Learner, decay: float) -> None:
        """Starts with the present weights. `decay` per update: 0 is the student itself, 1 never changes."""
        self.weights: dict[str, Tensor] = {name: p.detach().clone() for name, p in learner.named.items()}
        self.decay = decay

    def trace(self, batch: Batch) -> Batch:
        """The batch unchanged."""
        return batch

    @torch.no_grad()
    def follow(self, learner: Learner) -> None:
        """Moves towards the student, once for each update (docs/design.md, equation 16)."""
        if self.decay < 1:
            students: list[Tensor] = [learner.named[name] for name in self.weights]
            torch._foreach_lerp_(list(self.weights.values()), students, 1.0 - self.decay)

    def tensors(self) -> dict[str, Tensor]:
        """Everything for a bit-exact resume, on the CPU. If sharded, all ranks must call this together."""
        return full_tensors(self.weights)

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Loads what `tensors` gave. Raises DataError if it is of another network."""
        copy_into(tensors, self.weights, "teacher")


class LiveTeacher(WeightAverage):
    """A second network in the loop, with the averaged weights. With `decay` 1 it is frozen, and runs each time.

    It starts from the batch's stored noise (rounded as the store keeps it; a rollout starts before that rounding).
    """

    in_loop = True

    def __init__(
        self,
        teacher: Teacher,
        learner: Learner,
        decay: float,
        grids: Sequence[Sequence[float]],
        decode: Callable[[Tensor], Tensor],
        rewards: Sequence[Reward],
    ) -> None:
        """`teacher.network` has the learner's parameters by name. `grids`: snapped sigmas, and those of kept states."""
        network = dict(teacher.network.named_parameters())
        self.weights = {name: network[name] for name in learner.named}
        self.decay = decay
        self.teacher, self.ranks = teacher, learner.ranks
        self.decode, self.rewards = decode, rewards
        self.sigmas, horizons = grids
        self.rows = rows_of(self.sigmas, horizons)

    @torch.no_grad()
    def trace(self, batch: Batch) -> Batch:
        """The batch with this teacher's states, predictions and scores, rounded as stored ones are."""
        with self.ranks.autocast():
            states, x0s = euler(self._velocity(batch), batch.noise, self.sigmas)
        x_HBTC = as_stored(torch.stack([states[row] for row in self.rows]))
        x0_HBTC = as_stored(torch.stack([x0s[row] for row in self.rows[:-1]]))
        images_B3HW = self.decode(x_HBTC[-1].float())
        scored = [score(reward, images_B3HW, batch.prompts) for reward in self.rewards]
        r_teacher_RB = torch.stack([one.scores_B for one in scored])
        good_B = torch.stack([one.good_B for one in scored]).all(0)
        return replace(batch, x_HBTC=x_HBTC, x0_HBTC=x0_HBTC, r_teacher_RB=r_teacher_RB, good_B=good_B)

    def _velocity(self, batch: Batch) -> Callable[[Tensor, float], Tensor]:
        return lambda x, sigma: self.teacher.guided_velocity(x, sigma, batch.conditioning)
