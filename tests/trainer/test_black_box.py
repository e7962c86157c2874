"""The estimated gradient: unbiased, uphill without a gradient, the same in any micro-batch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from rats.schemas.train_params import BlackBoxParams
from rats.trainer.black_box import estimate_gradient, with_estimated_gradient
from rats.trainer.scoring import Scored, score

BATCH, TOKENS, CHANNELS = 3, 2, 4
SIZE = TOKENS * CHANNELS
PROMPTS = [f"picture {i}" for i in range(BATCH)]


class Function:
    """A reward that is a function of the latents: the decoder of these tests is the identity."""

    name, fingerprint, differentiable = "function", "f" * 64, False

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        self.function = function

    def score(self, images_B3HW: Tensor, prompts: list[str]) -> Tensor:
        return self.function(images_B3HW.flatten(1))


def decode(x_BTC: Tensor) -> Tensor:
    return x_BTC[:, None]


def randoms(count: int = BATCH) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(i) for i in range(count)]


def latents() -> Tensor:
    return torch.randn(BATCH, TOKENS, CHANNELS, generator=torch.Generator().manual_seed(5)).requires_grad_()


def asking(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor, list[str]], Scored]:
    return lambda images, prompts: score(Function(function), images, prompts)


def estimate(function: Callable[[Tensor], Tensor], x_BTC: Tensor, pairs: int, spread: float = 0.1) -> Tensor:
    settings = BlackBoxParams(pairs=pairs, spread=spread)
    return estimate_gradient(decode, asking(function), x_BTC.detach(), PROMPTS, settings, randoms())


WEIGHTS = torch.linspace(-1.0, 1.0, SIZE)


def linear(x_BD: Tensor) -> Tensor:
    return x_BD @ WEIGHTS + 3.0


def quadratic(x_BD: Tensor) -> Tensor:
    return linear(x_BD) - (x_BD * (1 + WEIGHTS.abs()) * x_BD).sum(1)


MANY = 8000


def estimates(function: Callable[[Tensor], Tensor], x_TC: Tensor, spread: float) -> Tensor:
    """`MANY` estimates (MANY, D) at one latent, a pair each."""
    given = [torch.Generator().manual_seed(100 + i) for i in range(MANY)]
    rows, settings = x_TC.expand(MANY, -1, -1), BlackBoxParams(pairs=1, spread=spread)
    return estimate_gradient(decode, asking(function), rows, ["p"] * MANY, settings, given).flatten(1)


@pytest.mark.parametrize("function", [linear, quadratic])
@pytest.mark.parametrize("spread", [0.05, 2.0])
def test_the_expected_estimate_is_the_gradient_of_a_linear_and_of_a_quadratic_reward(
    function: Callable[[Tensor], Tensor], spread: float
):
    x_BTC = latents()[:1]
    true_D = torch.autograd.grad(function(x_BTC.flatten(1)).sum(), x_BTC)[0].flatten()
    found_D = estimates(function, x_BTC[0].detach(), spread).mean(0)
    # a component of one estimate has the variance |g|^2 + g_i^2 (plus the rounding of R): five standard errors
    bound_D = 5 * ((true_D.square().sum() + true_D.square()) / MANY).sqrt()
    assert ((found_D - true_D).abs() < bound_D).all()
    assert bound_D.max() < 0.2 * true_D.abs().max()


def test_its_variance_is_what_the_formula_says_and_mirror_images_need_no_baseline():
    found = estimates(linear, latents()[0].detach(), 0.1)
    expected_D = WEIGHTS.square().sum() + WEIGHTS.square()  # Var[(w . e) e_i] = |w|^2 + w_i^2; the 3.0 adds nothing
    torch.testing.assert_close(found.var(0), expected_D, rtol=0.1, atol=0.0)


def test_the_generators_decide():
    x_BTC = latents()
    assert torch.equal(estimate(quadratic, x_BTC, 2), estimate(quadratic, x_BTC, 2))


def test_a_step_function_has_no_gradient_and_its_estimate_points_uphill():
    x_BTC = torch.full((BATCH, TOKENS, CHANNELS), 0.02).requires_grad_()
    found_BTC = estimate(lambda x_BD: (x_BD.sum(1) > 0.3).float(), x_BTC, pairs=400, spread=0.2)
    uphill_B = torch.nn.functional.cosine_similarity(found_BTC.flatten(1), torch.ones(BATCH, SIZE))
    assert (uphill_B > 0.9).all()
    assert not estimate(lambda x_BD: (x_BD.sum(1) > 99.0).float(), x_BTC, pairs=4).any()


def test_the_value_is_the_centres_and_the_gradient_the_estimate_times_what_comes_from_above():
    x_BTC, settings = latents(), BlackBoxParams(pairs=3)
    center = asking(quadratic)(decode(x_BTC), PROMPTS)
    scored = with_estimated_gradient(decode, asking(quadratic), center, x_BTC, PROMPTS, settings, randoms())
    assert torch.equal(scored.scores_B, center.scores_B)
    weights_B = torch.tensor([1.0, -2.0, 0.5])
    (found_BTC,) = torch.autograd.grad((weights_B * scored.scores_B).sum(), x_BTC)
    torch.testing.assert_close(found_BTC, weights_B.view(-1, 1, 1) * estimate(quadratic, x_BTC, 3))


def test_micro_batches_change_nothing():
    x_BTC, settings = latents(), BlackBoxParams(pairs=3)

    def part(rows: slice) -> Tensor:
        x, names, given = x_BTC.detach()[rows], PROMPTS[rows], randoms()[rows]
        return estimate_gradient(decode, asking(quadratic), x, names, settings, given)

    assert torch.equal(torch.cat([part(slice(0, 1)), part(slice(1, 3))]), part(slice(0, 3)))


class Failing:
    """Scores the sum; the calls of `bad` have no answer for picture 0."""

    def __init__(self, bad: set[int]) -> None:
        self.bad, self.calls = bad, 0

    def __call__(self, images_B3HW: Tensor, prompts: list[str]) -> Scored:
        good_B = torch.ones(len(prompts), dtype=torch.bool)
        good_B[0] = self.calls not in self.bad
        self.calls += 1
        return Scored(torch.where(good_B, images_B3HW.flatten(1).sum(1), 0.0), good_B)


def test_a_bad_half_drops_its_pair_and_no_other_samples():
    x_BTC, pairs = latents().detach(), 3
    whole = [
        estimate_gradient(decode, Failing(set()), x_BTC, PROMPTS, BlackBoxParams(pairs=p), randoms()) for p in (1, 2, 3)
    ]
    second = 2 * whole[1] - whole[0]  # of three pairs the second and third, alone
    third = 3 * whole[2] - 2 * whole[1]
    for call in (0, 1):  # either half of the first pair
        found = estimate_gradient(decode, Failing({call}), x_BTC, PROMPTS, BlackBoxParams(pairs=pairs), randoms())
        torch.testing.assert_close(found[0], (second + third)[0] / 2, rtol=1e-4, atol=1e-5)
        assert torch.equal(found[1:], whole[2][1:])


def test_without_a_good_pair_a_sample_has_its_score_and_no_gradient_and_a_bad_centre_has_neither():
    x_BTC, settings = latents(), BlackBoxParams(pairs=2)
    center = Scored(torch.tensor([1.5, 2.5, 0.0]), torch.tensor([True, True, False]))
    scored = with_estimated_gradient(decode, Failing({0, 1, 2, 3}), center, x_BTC, PROMPTS, settings, randoms())
    assert scored.scores_B.tolist() == [1.5, 2.5, 0.0] and torch.equal(scored.good_B, center.good_B)
    (found_BTC,) = torch.autograd.grad(scored.scores_B.sum(), x_BTC)
    assert found_BTC.flatten(1).any(1).tolist() == [False, True, False]
