"""The losses against finite differences and closed forms, and the toy flow that shows what must be compared."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from rats.pipeline import solver
from rats.trainer.losses import SPACES, compared, reward_loss, shape_loss
from rats.trainer.sampling import rounded_as_stored, sample_trajectory
from tests.support.toy import ToyReward, ToyStudent, grid

patient = settings(deadline=None, max_examples=60)
SIGMAS = [1.0, 0.6, 0.25, 0.0]


def path(seed: int, dtype: torch.dtype = torch.float64) -> tuple[list[Tensor], list[Tensor]]:
    random = torch.Generator().manual_seed(seed)
    draw = [torch.randn(2, 3, 4, generator=random, dtype=dtype) for _ in range(7)]
    return draw[:4], draw[4:]


@patient
@given(st.integers(0, 2**31), st.sampled_from(sorted(SPACES)))
def test_the_shaping_loss_is_zero_exactly_where_student_and_teacher_agree(seed, space):
    states, x0s = path(seed, torch.float32)
    mine = compared(space, states, x0s, SIGMAS).requires_grad_()
    loss = shape_loss(mine, mine.detach().clone())
    assert torch.equal(loss, torch.zeros(3, 2))
    loss.sum().backward()
    assert torch.equal(mine.grad, torch.zeros_like(mine))


@patient
@given(st.integers(0, 2**31), st.sampled_from(sorted(SPACES)))
def test_the_shaping_loss_is_above_zero_elsewhere(seed, space):
    mine, other = (compared(space, *path(s), SIGMAS) for s in (seed, seed + 1))
    assert (shape_loss(mine, other) > 0).all()


def test_the_shaping_loss_is_a_mean_over_elements_plus_one_minus_the_cosine():
    a, b = torch.randn(3, 2, 4, 5), torch.randn(3, 2, 4, 5)
    mse = (a - b).square().flatten(2).mean(-1)
    cos = nn.functional.cosine_similarity(a.flatten(2), b.flatten(2), dim=-1)
    torch.testing.assert_close(shape_loss(a, b, l2=2.0, cos=3.0), 2 * mse + 3 * (1 - cos))


@pytest.mark.parametrize("space", sorted(SPACES))
def test_gradients_agree_with_finite_differences(space):
    states, x0s = path(3)
    teacher = compared(space, *path(4), SIGMAS)
    inputs = [x.requires_grad_() for x in (*states, *x0s)]

    def loss(*tensors: Tensor) -> Tensor:
        return shape_loss(compared(space, tensors[:4], tensors[4:], SIGMAS), teacher, l2=0.7, cos=1.3).mean()

    assert torch.autograd.gradcheck(loss, inputs)


def test_the_reward_loss_agrees_with_finite_differences():
    scores = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda s: reward_loss(s, 0.7), scores)
    assert torch.autograd.gradcheck(lambda s: reward_loss(s, 0.7, margin=0.6), scores)


def test_a_margin_stops_pushing_a_sample_that_has_reached_it():
    scores = torch.tensor([0.1, 0.7], requires_grad=True)
    reward_loss(scores, 2.0, margin=0.6).sum().backward()
    assert scores.grad.tolist() == [-2.0, 0.0]


def test_half_precision_is_compared_in_float32():
    a = torch.randn(1, 1, 4, 4).half()
    assert compared("state", [a, a], [a], [1.0, 0.0]).dtype == torch.float32
    assert shape_loss(a, a + 1).dtype == torch.float32


def test_the_teacher_gets_no_gradient():
    a, b = torch.randn(1, 1, 2, 2, requires_grad=True), torch.randn(1, 1, 2, 2, requires_grad=True)
    shape_loss(a, b).sum().backward()
    assert a.grad is not None and b.grad is None


class Turning(nn.Module):
    """One linear step v = x W: enough to reach any linear map of the noise."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(0.1 * torch.eye(4))  # not zero: that has no direction

    def velocity(self, x: Tensor, sigma: float, conditioning: dict) -> Tensor:
        return x @ self.w


def one_step_student_on_a_curved_flow(space: str) -> float:
    """RMS distance to the teacher's final after minimising L_shape; the flow turns by 1.5 radians."""
    turn = torch.zeros(4, 4)
    turn[0, 1], turn[2, 3] = 1.5, 1.5
    turn = turn - turn.T
    noise = torch.randn(32, 2, 4, generator=torch.Generator().manual_seed(0))
    states, x0s = solver.euler(lambda x, sigma: x @ turn, noise, grid(400))
    teacher = compared(space, [states[0], states[-1]], x0s[:1], [1.0, 0.0])
    student = Turning()
    optimizer = torch.optim.LBFGS(student.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        mine = sample_trajectory(student, noise, [1.0, 0.0], {})
        loss = shape_loss(compared(space, mine.states, mine.x0s, [1.0, 0.0]), teacher).mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    with torch.no_grad():
        return float((sample_trajectory(student, noise, [1.0, 0.0], {}).final - states[-1]).square().mean().sqrt())


@pytest.mark.parametrize("space", ["state", "velocity"])
def test_a_one_step_student_lands_on_the_teachers_final_of_a_curved_flow(space):
    assert one_step_student_on_a_curved_flow(space) < 1e-3


def test_x0_matching_before_the_step_misses_the_teachers_final_of_a_curved_flow():
    assert one_step_student_on_a_curved_flow("x0") > 0.5


def gradients(loss: Tensor, student: ToyStudent, **options: bool) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(student.network.parameters()), **options))


def test_the_rewards_gradient_reaches_the_last_k_steps_and_the_shaping_loss_all_of_them():
    student, noise, conditioning = ToyStudent(), torch.randn(2, 3, 4), {"c": torch.randn(2, 4)}
    full = sample_trajectory(student, noise, grid(3), conditioning)
    cut = sample_trajectory(student, noise, grid(3), conditioning, last_k=1)
    assert torch.equal(full.final, cut.final)
    shaped = [gradients(t.states[-1].square().sum(), student, retain_graph=True) for t in (full, cut)]
    torch.testing.assert_close(*shaped)
    with cut.bridge.closed():
        last = gradients(cut.final.sum(), student)
    x = full.states[2].detach()
    alone = solver.step(x, student.velocity(x, grid(3)[2], conditioning), grid(3)[2], 0.0)
    torch.testing.assert_close(last, gradients(alone.sum(), student))


def test_a_last_k_of_all_steps_needs_no_bridge():
    trajectory = sample_trajectory(ToyStudent(), torch.randn(1, 3, 4), grid(3), {"c": torch.zeros(1, 4)}, last_k=8)
    assert trajectory.bridge is None and len(trajectory.states) == 4 and len(trajectory.x0s) == 3


def test_the_student_is_scored_on_latents_rounded_as_the_store_rounds_them():
    x = torch.randn(2, 3, 4, requires_grad=True)
    assert torch.equal(rounded_as_stored(x), x.half().float())
    ToyReward().score(ToyStudent().decode(rounded_as_stored(x)), ["", ""]).sum().backward()
    assert x.grad.abs().min() > 0
