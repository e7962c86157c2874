"""RATS (arXiv 2604.14910): maximise the rewards, and follow the teacher's path where the teacher is better.

L = L_reward + alpha g L_shape, with g = stopgrad(sigmoid((R_T - R_S) / tau)): docs/design.md#the-method.
B samples, R rewards that train, N student steps, T latent tokens, C channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from rats.pipeline.protocols import Reward
from rats.pipeline.rewards.base import is_differentiable
from rats.schemas.horizons import rows_of
from rats.trainer.augment import RandomDraws, augment
from rats.trainer.black_box import with_estimated_gradient
from rats.trainer.data import Batch
from rats.trainer.gate import WeightedReward, gate_all, score_std, weighted_sum
from rats.trainer.losses import compared, reward_loss, shape_loss
from rats.trainer.objective import Losses, Moment, Objective, Settings, check_latents
from rats.trainer.randomness import generator
from rats.trainer.sampling import Trajectory, rounded_as_stored
from rats.trainer.scoring import Scored, score


def losses(objective: Objective, batch: Batch, moment: Moment) -> Losses:
    """Both losses and the gate of one micro-batch, from one path of the student and one decoding."""
    settings, train = objective.settings, objective.settings.train
    trajectory = objective.sample(batch, moment.nfe)
    verdicts = _reward_scores(objective, batch, trajectory, moment)
    r_student_RB = torch.stack([verdict.bare.scores_B.detach() for verdict in verdicts])
    gate_B = gate_all(train.gate, batch.r_teacher_RB, r_student_RB, settings.parts, settings.tau, settings.gate_value)
    climbed_B = weighted_sum(torch.stack([verdict.climbed.scores_B for verdict in verdicts]), settings.parts)
    shape_NB = shaping_losses(batch, trajectory, settings)
    return Losses(
        reward_B=reward_loss(climbed_B, train.reward_weight, train.margin),
        shape_B=gate_B * shape_NB.mean(0),
        weight=train.alpha_at(moment.nfe, moment.step),
        gate_B=gate_B,
        good_B=_good(verdicts, batch),
        logged={"loss_shape": shape_NB, **_compared(batch.r_teacher_RB, r_student_RB, settings.parts)},
        bridge=trajectory.bridge,
    )


@dataclass(frozen=True)
class RewardScores:
    """Scores by one reward: those for the reward loss, and R_S for the gate, which is computed as R_T was."""

    climbed: Scored
    bare: Scored


def _reward_scores(objective: Objective, batch: Batch, trajectory: Trajectory, moment: Moment) -> list[RewardScores]:
    """Scores by every reward. With augmentation, a reward with gradient scores twice."""
    train, final_BTC = objective.settings.train, rounded_as_stored(trajectory.final)
    check_latents(final_BTC, batch, moment.step)
    climbs = train.reward_weight > 0
    has_gradient = [climbs and is_differentiable(reward) for reward in objective.rewards]
    with torch.set_grad_enabled(any(has_gradient)):
        images_B3HW = objective.student.decode(final_BTC)
        augmented_B3HW = _augmented(images_B3HW, objective, moment) if any(has_gradient) else images_B3HW
    verdicts = []
    for reward, by_gradient in zip(objective.rewards, has_gradient, strict=True):
        if by_gradient:
            climbed = score(reward, augmented_B3HW, batch.prompts)
            # without augmentation both are one picture
            bare = _bare(reward, images_B3HW, batch.prompts) if train.augment else climbed
        else:
            bare = _bare(reward, images_B3HW, batch.prompts)
            climbed = _estimated(objective, reward, bare, final_BTC, batch, moment) if climbs else bare
        verdicts.append(RewardScores(climbed, bare))
    return verdicts


def _augmented(images_B3HW: Tensor, objective: Objective, moment: Moment) -> Tensor:
    train = objective.settings.train
    draws = RandomDraws(generator(train.seed, moment.step), moment.first, train.batch)
    return augment(images_B3HW, draws, train.augment)


@torch.no_grad()
def _bare(reward: Reward, images_B3HW: Tensor, prompts: list[str]) -> Scored:
    """Scores computed as R_T was: of the picture without augmentation, without gradient."""
    return score(reward, images_B3HW.detach(), prompts)


def _estimated(
    objective: Objective, reward: Reward, center: Scored, final_BTC: Tensor, batch: Batch, moment: Moment
) -> Scored:
    """Scores with an estimated gradient. Random numbers are those of each sample, whatever the micro-batch."""
    train, places = objective.settings.train, range(moment.first, moment.first + len(batch.keys))
    randoms = [generator(train.seed, moment.step, "black box", place) for place in places]
    decode, ask = objective.student.decode, partial(score, reward)
    return with_estimated_gradient(decode, ask, center, final_BTC, batch.prompts, train.black_box, randoms)


def _good(verdicts: Sequence[RewardScores], batch: Batch) -> Tensor:
    """Samples that all rewards could score, also those of a teacher that runs in the loop."""
    answers = [scored.good_B for verdict in verdicts for scored in (verdict.climbed, verdict.bare)]
    if batch.good_B is not None:
        answers.append(batch.good_B)
    return torch.stack(answers).all(0)


def shaping_losses(batch: Batch, trajectory: Trajectory, settings: Settings) -> Tensor:
    """Shaping loss (N, B) of the student's path against the stored one, at equal sigmas."""
    sigmas, space = trajectory.sigmas, settings.train.shape.space
    rows = rows_of(settings.horizons, sigmas)
    student = compared(space, trajectory.states, trajectory.x0s, sigmas)
    teacher = compared(space, [*batch.x_HBTC[rows]], [*batch.x0_HBTC[rows[:-1]]], sigmas)
    return shape_loss(student, teacher, settings.train.shape.l2, settings.train.shape.cos)


def _compared(r_teacher_RB: Tensor, r_student_RB: Tensor, parts: Sequence[WeightedReward]) -> dict[str, Tensor]:
    """The scores to log, (B,) each: weighted sums, and for several rewards also each one."""
    r_teacher_B, r_student_B = weighted_sum(r_teacher_RB, parts), weighted_sum(r_student_RB, parts)
    logged = {
        "reward_student": r_student_B,
        "reward_teacher": r_teacher_B,
        "gap": r_teacher_B - r_student_B,
        "teacher_beaten": (r_student_B >= r_teacher_B).float(),
    }
    if len(parts) > 1:
        for part, own_teacher_B, own_student_B in zip(parts, r_teacher_RB, r_student_RB, strict=True):
            logged |= {f"student_{part.name}": own_student_B, f"teacher_{part.name}": own_teacher_B}
    return logged


@torch.no_grad()
def gap_spread(objective: Objective, batch: Batch) -> float:
    """Standard deviation of R_T - R_S over a batch at each NFE of the student, for `gate.tau: gap`."""
    parts, gaps = objective.settings.parts, []
    for nfe in objective.settings.train.grid:
        images_B3HW = objective.student.decode(rounded_as_stored(objective.sample(batch, nfe).final))
        scored = [score(reward, images_B3HW, batch.prompts) for reward in objective.rewards]
        good_B = torch.stack([one.good_B for one in scored]).all(0)
        r_student_B = weighted_sum(torch.stack([one.scores_B for one in scored]), parts)
        gaps.append((weighted_sum(batch.r_teacher_RB, parts) - r_student_B)[good_B])
    found = objective.ranks.gather_objects(torch.cat(gaps).tolist())
    return score_std([gap for of_rank in found for gap in of_rank], "teacher's minus student's", "set train.gate.tau")
