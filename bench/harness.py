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
from functools import partial
from pathlib import Path

import torch

from rats.pipeline.families.models import FamilyStudent
from rats.pipeline.families.open import Model
from rats.schemas.params import Params, load_params
from rats.stages.train.generations import open_moving_teacher
from rats.stages.train.source import Source, open_source, read_settings
from rats.stages.train.train import open_rewards, open_trainable
from rats.trainer.checkpoint import RunIdentity, RunState
from rats.trainer.data import StoredSamples
from rats.trainer.distributed import Ranks
from rats.trainer.loop import one_step
from rats.trainer.methods import METHODS
from rats.trainer.objective import Objective
from rats.trainer.optim import Learner
from rats.trainer.run import MovingTeacher, Run, no_moving_teacher, open_run

UNSPLIT_EVERY = 1_000_000
UNSPLIT = f"train.log_gradients_every={UNSPLIT_EVERY}"
"""Steps that log the gradients of both terms apart take another backward pass."""


@dataclass(frozen=True)
class Bench:
    """A run under way, of which `step` takes one step."""

    params: Params
    model: Model
    objective: Objective
    source: Source
    student: FamilyStudent
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
    student, rewards = open_trainable(model, chosen, ranks), open_rewards(params, chosen, ranks)
    objective = Objective(student, rewards, read_settings(chosen, source), ranks, METHODS["rats"])

    def follower(learner: Learner) -> MovingTeacher | None:
        return open_moving_teacher(model, chosen, student, learner, source, rewards, student.decode)

    stream = StoredSamples(source.shards, source.snapshot, source.followed, chosen.seed, chosen.batch)
    with tempfile.TemporaryDirectory() as folder, closing(stream):
        run = fresh_run(objective, Path(folder), follower)
        step = partial(one_step, objective, stream, run)
        yield Bench(params, model, objective, source, student, run, step)


def fresh_run(
    objective: Objective, folder: Path, follower: Callable[[Learner], MovingTeacher | None] = no_moving_teacher
) -> Run:
    """A run that has taken a step already, so that the next one does not split its gradients."""
    return open_run(objective, folder, RunIdentity("", "", ""), 1, state=RunState(step=1), follower=follower)


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
