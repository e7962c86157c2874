"""The method `rats`, one micro-batch at a time: what enters its two terms, and what reaches which step."""

from __future__ import annotations

import pytest
import torch

from rats.trainer.data import Batch, collate
from rats.trainer.methods import rats
from rats.trainer.objective import Losses, Moment, Objective, loss_terms
from tests.support import toy


class BlackBox(toy.ToyReward):
    """Scores in steps, without a gradient."""

    differentiable = False

    def score(self, images_B3HW, prompts):
        return (super().score(images_B3HW, prompts) * 200).round() / 200


def batch_of(first: int, count: int) -> Batch:
    return collate([toy.stored(i) for i in range(first, first + count)], torch.device("cpu"))


def gradient(objective: Objective, loss: torch.Tensor, **options: bool) -> torch.Tensor:
    found = torch.autograd.grad(loss, list(objective.student.network.parameters()), **options)
    return torch.cat([part.flatten() for part in found])


def asked(given: Objective, first: int = 0, count: int = 4, nfe: int = 3) -> Losses:
    return rats.losses(given, batch_of(first, count), Moment(step=5, nfe=nfe, first=first))


def test_the_terms_are_those_of_the_formulas():
    given = toy.objective(toy.settings(alpha={2: 2.5, 3: 1.5}, reward_weight=0.7))
    losses, batch = asked(given), batch_of(0, 4)
    r_student_B = losses.logged["reward_student"]
    gate_B = torch.sigmoid((batch.r_teacher_RB[0] - r_student_B) / 0.05)
    torch.testing.assert_close(losses.gate_B, gate_B)
    torch.testing.assert_close(losses.shape_B, gate_B * losses.logged["loss_shape"].mean(0))
    torch.testing.assert_close(losses.reward_B, -0.7 * r_student_B)
    assert losses.weight == 1.5 and asked(given, nfe=2).weight == 2.5
    assert not losses.gate_B.requires_grad and losses.gate_B.std() > 0
    climbed, shaped = loss_terms(losses, given.settings.train)
    torch.testing.assert_close(shaped, 1.5 * losses.shape_B.mean())
    torch.testing.assert_close(climbed, losses.reward_B.mean())


def test_last_k_keeps_the_reward_from_the_first_steps_and_the_shaping_loss_from_none():
    given = toy.objective(toy.settings(last_k=1))
    losses, free = asked(given), asked(toy.objective(toy.settings(), student=given.student))
    assert losses.bridge is not None and free.bridge is None
    with losses.bridge.closed():
        last = gradient(given, losses.reward_B.sum(), retain_graph=True)
    everywhere = gradient(given, free.reward_B.sum(), retain_graph=True)
    assert last.any() and not torch.allclose(last, everywhere, rtol=1e-2)
    shaped = [gradient(given, one.shape_B.sum()) for one in (losses, free)]
    torch.testing.assert_close(*shaped)


@pytest.mark.parametrize("augment", [0.0, 0.6])
def test_a_sample_has_its_own_randomness_wherever_the_batch_is_cut(augment):
    given = toy.objective(toy.settings(augment=augment), reward=BlackBox())
    whole = gradient(given, asked(given).reward_B.sum())
    halves = sum(gradient(given, asked(given, first, 2).reward_B.sum()) for first in (0, 2))
    assert whole.any()
    torch.testing.assert_close(halves, whole, rtol=1e-4, atol=1e-6)
