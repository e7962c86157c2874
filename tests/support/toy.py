"""A family, a reward and a stream of a few numbers each: what the trainer's tests train in milliseconds."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor, nn

from rats.pipeline import solver
from rats.pipeline.noise import noise
from rats.pipeline.protocols import Conditioning
from rats.schemas.train_params import TrainParams
from rats.trainer.checkpoint import RunIdentity
from rats.trainer.data import Sample
from rats.trainer.distributed import Ranks
from rats.trainer.loop import train
from rats.trainer.methods import rats
from rats.trainer.objective import Method, Objective, Settings
from rats.trainer.optim import Learner
from rats.trainer.run import MovingTeacher, Run, checkpoints_in, no_moving_teacher, open_run

TOKENS, CHANNELS, PIXELS, SAMPLES = 3, 4, 4, 12
NFE = (2, 3)
IDENTITY = RunIdentity(snapshot="s" * 64, recipe="r" * 64, settings="t" * 64)


def grid(steps: int) -> list[float]:
    """A straight grid, k / steps."""
    return [1.0 - k / steps for k in range(steps)] + [0.0]


HORIZONS = tuple(sorted({sigma for steps in NFE for sigma in grid(steps)}, reverse=True))


class Network(nn.Module):
    """v = tanh(x W + c) U + b sigma."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        random = torch.Generator().manual_seed(seed)
        self.w = nn.Parameter(torch.randn(CHANNELS, CHANNELS, generator=random) * 0.7)
        self.u = nn.Parameter(torch.randn(CHANNELS, CHANNELS, generator=random) * 0.7)
        self.b = nn.Parameter(torch.zeros(CHANNELS))

    def forward(self, x: Tensor, sigma: float, c: Tensor) -> Tensor:
        return torch.tanh(x @ self.w + c[:, None]) @ self.u + self.b * sigma


class ToyStudent:
    """The protocol `Student` over `Network`; a picture is a clamped outer product of the latents."""

    def __init__(self, seed: int = 0) -> None:
        self.network = Network(seed)

    def velocity(self, x_BTC: Tensor, sigma: float, conditioning: Conditioning) -> Tensor:
        return self.network(x_BTC, sigma, conditioning["c"])

    def decode(self, x_BTC: Tensor) -> Tensor:
        return torch.sigmoid(x_BTC[..., None].expand(-1, -1, -1, PIXELS))

    def stock_sigmas(self, steps: int) -> list[float]:
        return grid(steps)


class ToyReward:
    """Likes bright pictures; `bad` scores are returned for the calls so numbered."""

    name = "bright"
    fingerprint = "f" * 64

    def __init__(self, bad: dict[int, float] | None = None) -> None:
        self.bad = bad or {}
        self.seen: list[Tensor] = []

    def score(self, images_B3HW: Tensor, prompts: list[str]) -> Tensor:
        scores_B = images_B3HW.float().flatten(1).mean(1)
        factor = self.bad.get(len(self.seen), 1.0)
        self.seen.append(images_B3HW.detach())
        return torch.cat([scores_B[:1] * factor, scores_B[1:]])


@lru_cache
@torch.no_grad()
def stored(i: int) -> Sample:
    """Sample `i` of a frozen teacher (other weights, 60 steps), as the store keeps it: float16 at the horizons."""
    teacher = ToyStudent(seed=7)
    start = noise(0, f"{i:064d}", 0, (TOKENS, CHANNELS))[None]
    conditioning = {"c": noise(1, f"{i:064d}", 0, (CHANNELS,))}
    batched = {"c": conditioning["c"][None]}
    fine = sorted({*HORIZONS, *grid(60)}, reverse=True)
    states, x0s = solver.euler(lambda x, sigma: teacher.velocity(x, sigma, batched), start, fine)
    rows = [fine.index(sigma) for sigma in HORIZONS]
    x = torch.cat([states[row] for row in rows]).half()
    x0 = torch.cat([x0s[row] for row in rows[:-1]]).half()
    score = float(ToyReward().score(teacher.decode(x[-1:].float()), [""]))
    return Sample(f"key-{i:04d}", f"prompt {i}", x, x0, conditioning, (score,))


class ToyStream:
    """Endless, and a function of the position alone."""

    def __init__(self, position: int = 0, batch: int = 4) -> None:
        self.position, self.batch = position, batch

    def take(self) -> list[Sample]:
        self.position += self.batch
        return [stored(i % SAMPLES) for i in range(self.position - self.batch, self.position)]


def settings(**changes: object) -> Settings:
    """Short and quick; `changes` to `TrainParams`."""
    values = {"nfe": NFE, "steps": 6, "batch": 4, "micro_batch": 4, "lr": 1e-2, "warmup": 2, "reward": "bright"}
    values |= {"augment": 0.0, "checkpoint_every": 2, "log_gradients_every": 3}
    train_params = TrainParams.model_validate(values | changes)
    return Settings(train_params, HORIZONS, tau=0.05, gate_value=train_params.gate.value)


def objective(
    chosen: Settings,
    student: ToyStudent | None = None,
    reward: ToyReward | None = None,
    ranks: Ranks | None = None,
    method: Method = rats.losses,
) -> Objective:
    """A toy student, a toy reward and these settings."""
    return Objective(student or ToyStudent(), [reward or ToyReward()], chosen, ranks or Ranks(), method)


def run_of(
    given: Objective,
    folder: Path,
    resume: bool = False,
    follower: Callable[[Learner], MovingTeacher | None] = no_moving_teacher,
) -> Run:
    """A run in `folder`, from its newest checkpoint with `resume`."""
    saved = checkpoints_in(folder, given.settings.train).newest() if resume else None
    return open_run(given, folder, IDENTITY, 1, saved, follower=follower)


def train_on(given: Objective, run: Run) -> Run:
    """Train on the toy stream from where the run stands, and return the finished run."""
    train(given, ToyStream(run.state.position, given.settings.train.batch), run)
    return run


def train_in(folder: Path, chosen: Settings, resume: bool = False, reward: ToyReward | None = None) -> Run:
    """Train a toy student in `folder` and return the finished run."""
    given = objective(chosen, reward=reward)
    return train_on(given, run_of(given, folder, resume))
