"""The student's few steps, with gradient. B samples, T latent tokens, C channels, N steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from rats.pipeline import solver
from rats.pipeline.protocols import Conditioning, Student
from rats.pipeline.store.shards import as_stored
from rats.trainer.data import Batch


@dataclass
class Bridge:
    """A place in the autograd graph that stops gradients while it is closed."""

    open: bool = True

    @contextmanager
    def closed(self) -> Iterator[None]:
        """No gradient passes the bridge inside this block."""
        self.open = False
        try:
            yield
        finally:
            self.open = True


class _Cross(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bridge: Bridge) -> Tensor:
        ctx.bridge = bridge
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None]:
        # None is an undefined gradient: autograd skips the arithmetic of all steps before it
        return (grads[0] if ctx.bridge.open else None), None


@dataclass(frozen=True)
class Trajectory:
    """A student's path: N + 1 states (the noise first) and the N clean latents predicted before each step.

    `sigmas`: those of the N + 1 states. `bridge` lies before the last k steps; None if the reward's gradient passes
    through all steps.
    """

    states: list[Tensor]
    x0s: list[Tensor]
    sigmas: Sequence[float]
    bridge: Bridge | None = field(default=None)

    @property
    def final(self) -> Tensor:
        """The clean latents (B, T, C) after the last step."""
        return self.states[-1]


def sample_trajectory(
    student: Student,
    noise_BTC: Tensor,
    sigmas: Sequence[float],
    conditioning: Conditioning,
    last_k: int | None = None,
) -> Trajectory:
    """Euler steps of the student along `sigmas` (N + 1 values), one evaluation a step, differentiable throughout.

    Each step is docs/design.md, equation 3, and its prediction before it equation 4.

    The gradient of the shaping loss reaches every step, that of the reward only the last `last_k` (None: all). For
    that, a bridge lies before those steps and is closed in the reward's backward pass; the forward pass is the same.
    """
    steps = len(sigmas) - 1
    cut = steps - min(last_k or steps, steps)  # steps that the reward does not reach
    bridge = Bridge() if cut else None
    x = noise_BTC
    states, x0s = [x], []
    for k in range(steps):
        if bridge and k == cut:
            x = _Cross.apply(x, bridge)
        v = student.velocity(x, sigmas[k], conditioning).to(x.dtype)
        x0s.append(solver.x0_hat(x, v, sigmas[k]))
        x = solver.step(x, v, sigmas[k], sigmas[k + 1])
        states.append(x)
    return Trajectory(states, x0s, sigmas, bridge)


def rounded_as_stored(x_BTC: Tensor) -> Tensor:
    """The latents rounded as in the store, with the gradient of the unrounded ones.

    So the gate's R_S is computed exactly as R_T was, and the reward term uses the same decoding (docs/design.md,
    equation 11).
    """
    return x_BTC + (as_stored(x_BTC.detach()).to(x_BTC.dtype) - x_BTC.detach())


FinalSampler = Callable[[Batch], Tensor]


def few_steps(
    model: Student, nfe: int, velocity: Callable[[Tensor, float, Conditioning], Tensor] | None = None
) -> FinalSampler:
    """Euler steps over the family's stock grid, rounded as the store rounds the teacher's final."""
    sigmas, field = model.stock_sigmas(nfe), velocity or model.velocity

    def draw(batch: Batch) -> Tensor:
        states, _ = solver.euler(lambda x, sigma: field(x, sigma, batch.conditioning), batch.noise, sigmas)
        return as_stored(states[-1]).float()

    return draw
