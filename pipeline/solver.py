"""The Euler solver of flow matching on pure tensors: sigma in [0, 1], 1 = noise, v = eps - x0.

State and velocity are docs/design.md, equations 1 and 2. The solver knows no model: `velocity` may be a network,
a guided pair of networks or a formula in a test.
If a change here changes latents, increase `schemas.recipe.SOLVER_VERSION`; tests/stages/rollout/test_golden.py tells.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

Velocity = Callable[[Tensor, float], Tensor]


def step(x: Tensor, v: Tensor, sigma: float, sigma_next: float) -> Tensor:
    """State at `sigma_next`: x' = x + (sigma' - sigma) v (docs/design.md, equation 3), of the shape of `x` and `v`."""
    return x + (sigma_next - sigma) * v


def x0_hat(x: Tensor, v: Tensor, sigma: float) -> Tensor:
    """Predicted clean latent x - sigma v, of the shape of `x` (docs/design.md, equation 4)."""
    return x - sigma * v


def guide(cond: Tensor, uncond: Tensor, scale: float | Tensor) -> Tensor:
    """Classifier-free guidance, uncond + scale (cond - uncond), in FluxPipeline's order of operations.

    docs/design.md, equation 5.
    """
    return uncond + scale * (cond - uncond)


def euler(velocity: Velocity, x: Tensor, sigmas: Sequence[float]) -> tuple[list[Tensor], list[Tensor]]:
    """Integrates from sigmas[0] to sigmas[-1], one evaluation of `velocity` an interval.

    Returns the states at all `len(sigmas)` values, the given `x` first, and the predicted clean latents of the
    `len(sigmas) - 1` evaluations. Differentiable when `velocity` is.
    """
    states, predictions = [x], []
    for sigma, sigma_next in zip(sigmas[:-1], sigmas[1:], strict=True):
        v = velocity(states[-1], sigma)
        predictions.append(x0_hat(states[-1], v, sigma))
        states.append(step(states[-1], v, sigma, sigma_next))
    return states, predictions
