"""Steps of stage two outside of its stage, for bench.step and bench.memory: opened as the stage opens them."""

from __future__ import annotations

import contextlib
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from rats.pipeline.families.models import FamilyStudent
from rats.pipeline.families.open import Model
from rats.pipeline.protocols import Reward
from rats.pipeline.rewards.open import open_reward
from rats.schemas.params import Params, load_params
from rats.stages.rollout.columns import reward_params
from rats.stages.train.generations import open_follower
from rats.stages.train.source import Source, open_source, read_settings
from rats.stages.train.train import open_trainable
from rats.trainer.checkpoint import Checkpoints, Identity, State
from rats.trainer.data import StoredSamples
from rats.trainer.distributed import Ranks
from rats.trainer.loop import one_step
from rats.trainer.metrics import CsvLog, columns
from rats.trainer.objective import Settings
from rats.trainer.optim import Learner
from rats.trainer.run import METRICS, Run

UNSPLIT_EVERY = 1_000_000
UNSPLIT = f"train.log_gradients_every={UNSPLIT_EVERY}"
"""Steps that log the gradients of both terms apart take another backward pass."""


@dataclass(frozen=True)
class Bench:
    """A run under way, of which `step` takes one step."""

    params: Params
    model: Model
    settings: Settings
    source: Source
    student: FamilyStudent
    rewards: Sequence[Reward]
    run: Run
    step: Callable[[], None]


class OneRank(Ranks):
    """A single process on a device."""

    def __init__(self, device: str) -> None:
        """Nothing to join."""
        self.device = torch.device(device)


@contextmanager
def opened(path: Path, shards: Path, overrides: Sequence[str]) -> Iterator[Bench]:
    """The parameters of `path` with these changes, on the shards in a folder; what a step writes is thrown away."""
    params = load_params(path, [UNSPLIT, *overrides])
    chosen, ranks = params.train, OneRank(params.compute.device)
    model = Model.of(params)
    source = open_source(params, model, chosen, shards)
    settings, student = read_settings(chosen, source), open_trainable(model, chosen, ranks)
    rewards = [open_reward(reward_params(params, name), params.compute.device) for name in chosen.reward_weights]
    stream = StoredSamples(source.shards, source.snapshot, source.scores, chosen.seed, chosen.batch)
    with tempfile.TemporaryDirectory() as folder, closing(stream):
        run = fresh_run(student, settings, ranks, Path(folder))
        run.live = open_follower(model, chosen, student, run.learner, source, rewards, student.decode)
        yield Bench(
            *(params, model, settings, source, student, rewards, run),
            step=lambda: one_step(student, stream, rewards, settings, run),
        )


def fresh_run(student: FamilyStudent, settings: Settings, ranks: Ranks, folder: Path) -> Run:
    """A run that has taken a step already, so that the next one does not split its gradients."""
    log = CsvLog(folder / METRICS, columns(max(settings.train.nfe), [part.name for part in settings.parts]))
    learner, checkpoints = Learner(student.network, settings.train, ranks), Checkpoints(folder / "checkpoints")
    return Run(learner, checkpoints, {METRICS: log}, Identity("", "", ""), 1, State(step=1), ranks)


@dataclass(frozen=True)
class Cost:
    """Seconds by the clock, and of this process's processor time: the second tells what a busy machine hides."""

    wall: float
    cpu: float


def timed(work: Callable[[], object]) -> Cost:
    """What `work` takes, the device's queue included."""
    _wait()
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    _wait()
    return Cost(time.perf_counter() - wall, time.process_time() - cpu)


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def where() -> str:
    """The machine, in words."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} cores"
    with contextlib.suppress(OSError):
        return f"{device} ({platform.machine()}), load {os.getloadavg()[0]:.1f}, torch {torch.__version__}"
    return f"{device} ({platform.machine()}), torch {torch.__version__}"
