"""The solver on flows with known solutions."""

from __future__ import annotations

import math

import pytest
import torch

from rats.pipeline.solver import euler, guide, step, x0_hat

GRID = [1.0, 0.75, 0.4, 0.1, 0.0]


def test_a_straight_flow_lands_on_its_image_with_any_grid() -> None:
    noise, image = torch.randn(2, 4, 3), torch.randn(2, 4, 3)
    for sigmas in (GRID, [1.0, 0.0]):
        states, predictions = euler(lambda x, sigma: noise - image, noise, sigmas)
        assert len(states) == len(sigmas) and len(predictions) == len(sigmas) - 1
        for state, sigma in zip(states, sigmas, strict=True):
            torch.testing.assert_close(state, (1 - sigma) * image + sigma * noise)
        for prediction in predictions:
            torch.testing.assert_close(prediction, image)


def test_the_network_is_evaluated_once_an_interval_at_the_interval_s_first_sigma() -> None:
    seen: list[float] = []
    euler(lambda x, sigma: seen.append(sigma) or torch.zeros_like(x), torch.ones(1, 1, 1), GRID)
    assert seen == GRID[:-1]


@pytest.mark.parametrize("steps", [200, 400])
def test_the_error_on_a_curved_flow_falls_with_the_step(steps: int) -> None:
    sigmas = [1 - k / steps for k in range(steps + 1)]
    states, _ = euler(lambda x, sigma: x, torch.ones(1, dtype=torch.float64), sigmas)
    # dx/dsigma = x from sigma 1 to 0 multiplies by 1/e; Euler's error is 1/(2e) of a step.
    assert float(states[-1]) - 1 / math.e == pytest.approx(-1 / (2 * math.e * steps), rel=0.02)


def test_a_step_to_zero_gives_the_predicted_clean_latent() -> None:
    x, v = torch.randn(3, 2), torch.randn(3, 2)
    torch.testing.assert_close(step(x, v, 0.3, 0.0), x0_hat(x, v, 0.3), rtol=0, atol=0)


def test_guidance_of_one_is_the_conditional_velocity_and_of_two_twice_as_far() -> None:
    cond, uncond = torch.randn(3, 2), torch.randn(3, 2)
    torch.testing.assert_close(guide(cond, uncond, 1.0), cond)
    torch.testing.assert_close(guide(cond, uncond, 2.0), 2 * cond - uncond)


def test_gradients_reach_the_parameter_of_every_step() -> None:
    weight = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    states, _ = euler(lambda x, sigma: weight * x, torch.ones(1, dtype=torch.float64), GRID)
    states[-1].sum().backward()
    factors = [1 - (a - b) * 0.3 for a, b in zip(GRID, GRID[1:], strict=False)]
    expected = sum(-(a - b) / f for a, b, f in zip(GRID, GRID[1:], factors, strict=False)) * math.prod(factors)
    assert weight.grad is not None and float(weight.grad) == pytest.approx(expected)
