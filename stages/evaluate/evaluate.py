"""Stage evaluate: teacher, untrained base and students on the same test prompts and noises, by all metrics."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from rats.pipeline.files.atomic import atomic_write
from rats.pipeline.files.places import Place
from rats.pipeline.machine import on_its_threads
from rats.pipeline.protocols import Reward
from rats.pipeline.rewards.base import call_reward
from rats.pipeline.rewards.open import open_reward
from rats.pipeline.weights.loading import torch_device
from rats.schemas.errors import DataError
from rats.schemas.params import Params, with_variant
from rats.schemas.reports import EvaluateReport
from rats.stages.evaluate.before import Measured, open_measured
from rats.stages.evaluate.cells import Features, SystemResult, cells_by_system, values_csv
from rats.stages.evaluate.made import made_here
from rats.stages.evaluate.systems import Samples, System, systems
from rats.stages.measure.networks import Judge, open_network
from rats.stages.measure.pictures import (
    PICTURES_FILE,
    Choice,
    Pictures,
    choose,
    save_pictures,
    to_picture,
)
from rats.stages.measure.values import VALUES_FILE
from rats.stages.progress import progress
from rats.trainer.data import Batch


@dataclass(frozen=True)
class Evaluator:
    """The samples, rewards and judges that every system is measured by."""

    samples: Samples
    rewards: dict[str, Reward]
    stored: dict[str, dict[str, float]]
    """The teacher's scores as the shards hold them, by reward and key: a teacher sample is never scored here."""
    judges: dict[str, Judge]
    choice: Choice
    micro_batch: int
    device: torch.device


@on_its_threads
def evaluate_stage(params: Params, shards: Place, runs: Path, out: Path, command: str = "") -> EvaluateReport:
    """Writes `out` (all cells), and beside it every sample's scores and the pictures of the report.

    Args:
        params: The whole configuration.
        shards: The published shards of the test split.
        runs: The folder of the runs; every variant of `evaluate.variants` is looked up there.
        out: evaluate.json.
        command: What was typed, for the record.

    Raises:
        RatsError: what `open_measured` raises, before a network is loaded.
        DataError: a score that is not finite.
    """
    started = time.monotonic()
    what = open_measured(params, shards, runs, out)
    bench = open_evaluator(params, what)
    total = len(bench.samples.rows) * _system_count(params)
    measured = []
    with progress("evaluate", total, "samples") as advance, torch.no_grad():
        for system in systems(params, what.model, runs):
            measured.append(measure(system, bench, advance))
    report = EvaluateReport(
        cells=tuple(cell for _, cell in cells_by_system(params, bench.samples, measured)),
        snapshot=bench.samples.shards.snapshot().hash,
        seconds=time.monotonic() - started,
        students={name: record.student for name, record in what.records.items()},
        made=made_here(bench.device, command),
    )
    atomic_write(out.parent / VALUES_FILE, values_csv(bench.samples, measured).encode())
    save_pictures(out.parent / PICTURES_FILE, chosen_pictures(params, bench, measured))
    atomic_write(out, (report.model_dump_json(indent=1) + "\n").encode())
    return report


def _system_count(params: Params) -> int:
    """The largest possible number of systems, for the progress bar (an unguided teacher has one base less)."""
    grids = [with_variant(params, name).grid for name in params.evaluate.variants]
    bases = 2 * len({n for grid in grids for n in grid})
    return 1 + bases + sum(len(grid) for grid in grids)


def open_evaluator(params: Params, measured: Measured) -> Evaluator:
    """Loads rewards and judges, and decides which samples are shown."""
    samples, device = measured.samples, torch_device(params.compute.device)
    rewards = {reward.name: open_reward(reward, str(device)) for reward in params.rewards}
    prompts = [row.prompt_id for row in samples.rows]
    choice = choose(samples.concepts, prompts, params.evaluate.pictures, params.evaluate.seed)
    judges: dict[str, Judge] = {judge.name: open_network(judge.name, str(device)) for judge in params.evaluate.judges}
    return Evaluator(samples, rewards, measured.stored, judges, choice, params.compute.micro_batch, device)


def measure(system: System, bench: Evaluator, advance: Callable[[int], None]) -> SystemResult:
    """Draws, decodes, scores and judges all samples of one system."""
    result = SystemResult(system.column, {name: [] for name in bench.rewards})
    features: dict[str, list[Features]] = {name: [] for name in bench.judges}
    start = 0
    for batch in bench.samples.batches(bench.micro_batch, bench.device):
        with named(system):
            images = system.decode(system.draw(batch))
        for name in bench.rewards:
            scores = _scores(system, bench, name, batch, images)
            result.scores[name] += _finite(scores, name, system.column.id, batch.keys)
        for name, judge in bench.judges.items():
            features[name].append(judge.features(images).double().numpy())
        _show(result, images, start, bench.choice.rows())
        start += len(batch.keys)
        advance(len(batch.keys))
    result.features = {name: np.concatenate(parts) for name, parts in features.items()}
    return result


@contextmanager
def named(system: System) -> Iterator[None]:
    """Errors of what it draws begin with its name."""
    try:
        yield
    except DataError as error:
        raise DataError(f"{system.column.id}: {error.what}", error.remedy) from error


def _scores(system: System, bench: Evaluator, reward: str, batch: Batch, images: torch.Tensor) -> list[float]:
    """Scores by one reward. Those of the teacher are stored: its pictures are not scored again."""
    if system.column.system == "teacher":
        return [bench.stored[reward][key] for key in batch.keys]
    return call_reward(bench.rewards[reward], images, batch.prompts).tolist()


def _finite(scores: list[float], reward: str, column: str, keys: Sequence[str]) -> list[float]:
    for score, key in zip(scores, keys, strict=True):
        if not np.isfinite(score):
            raise DataError(f"{reward} gives {score} to sample {key} of {column}: look at that run's metrics.csv")
    return scores


def _show(result: SystemResult, images: torch.Tensor, start: int, wanted: set[int]) -> None:
    """Keeps the chosen pictures, and the size of a picture or frame."""
    result.size = (int(images.shape[-2]), int(images.shape[-1]))
    for offset in range(len(images)):
        if start + offset in wanted:
            result.pictures[start + offset] = to_picture(images[offset].float().cpu().numpy())


def chosen_pictures(params: Params, bench: Evaluator, measured: Sequence[SystemResult]) -> Pictures:
    """The chosen pictures of all systems, side by side."""
    rows, choice = bench.samples.rows, bench.choice
    pictures = Pictures(
        columns=[system.column for system in measured],
        prompts=[rows[i].prompt for i in choice.side],
        keys=[rows[i].key for i in choice.side],
        noise_prompts=[rows[group[0]].prompt for group in choice.noises],
        seed=params.evaluate.seed,
        size=measured[0].size,
    )
    for system in measured:
        name = system.column.id
        pictures.side[name] = np.stack([system.pictures[i] for i in choice.side])
        pictures.noises[name] = [np.stack([system.pictures[i] for i in group]) for group in choice.noises]
    return pictures
