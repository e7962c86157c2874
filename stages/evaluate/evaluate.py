"""Stage evaluate: teacher, untrained base and students on the same test prompts and noises, by all metrics."""

from __future__ import annotations

import csv
import io
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from rats.pipeline.families.open import Model
from rats.pipeline.files.atomic import atomic_write
from rats.pipeline.files.places import Place
from rats.pipeline.protocols import Reward
from rats.pipeline.rewards.base import ask
from rats.pipeline.rewards.open import open_reward
from rats.pipeline.store.scores import read_scores
from rats.pipeline.store.shard_set import ShardSet
from rats.pipeline.weights.loading import torch_device
from rats.schemas.errors import DataError
from rats.schemas.params import Params, with_variant
from rats.schemas.recipe import DECODER
from rats.schemas.reports import Cell, EvaluateReport, Role
from rats.schemas.run import RunRecord
from rats.stages.evaluate.systems import Samples, System, open_samples, systems
from rats.stages.measure.bootstrap import Paired, paired
from rats.stages.measure.judge import Judge, diversity_by_group
from rats.stages.measure.kid import RealSet, open_real, paired_kid
from rats.stages.measure.pictures import PICTURES, Choice, Column, Picture, Pictures, choose, save_pictures, to_picture
from rats.stages.measure.values import VALUE_COLUMNS, VALUES
from rats.stages.progress import progress
from rats.stages.rollout.columns import NETWORK, check_recipe, find_column
from rats.stages.train.record import checked_student, read_record
from rats.trainer.data import Batch

Features = NDArray[np.float64]


@dataclass
class Measured:
    """Results of one system: scores by reward and sample, the judge's features (N, F), the pictures to show."""

    column: Column
    scores: dict[str, list[float]]
    features: Features | None = None
    pictures: dict[int, Picture] = field(default_factory=dict)
    size: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class Bench:
    """The samples, rewards and judge that every system is measured by."""

    samples: Samples
    rewards: dict[str, Reward]
    stored: dict[str, dict[str, float]]
    """The teacher's scores as the shards hold them, by reward and key: a teacher sample is never scored here."""
    judge: Judge | None
    choice: Choice
    micro_batch: int
    device: torch.device


def evaluate_stage(params: Params, shards: Place, runs: Path, out: Path) -> EvaluateReport:
    """Writes `out` (all cells), and beside it every sample's scores and the pictures of the report.

    Args:
        params: The whole configuration.
        shards: The published shards of the test split.
        runs: The folder of the runs; every variant of `evaluate.variants` is looked up there.
        out: evaluate.json.

    Raises:
        ConfigError: a run without a student, fewer than two concepts.
        DataError: shards, scores, rewards or students that do not belong together, a score that is not finite.
    """
    started = time.monotonic()
    model, samples = Model.of(params), open_samples(params, shards)
    check_teacher(params, model, samples.shards)
    records = {name: read_record(runs / name) for name in params.evaluate.variants}
    for name, record in records.items():
        check_student(record, runs / name, samples.shards)
    bench = open_bench(params, samples, model.folder.hash_of(DECODER))
    total = len(bench.samples.rows) * _columns(params)
    measured = []
    with progress("evaluate", total, "samples") as advance, torch.no_grad():
        for system in systems(params, model, runs):
            measured.append(measure(system, bench, advance))
    report = EvaluateReport(
        cells=tuple(cells(params, bench.samples, measured)),
        snapshot=samples.shards.snapshot().hash,
        seconds=time.monotonic() - started,
        students={name: record.student for name, record in records.items()},
    )
    atomic_write(out.parent / VALUES, values_csv(bench.samples, measured).encode())
    save_pictures(out.parent / PICTURES, collect(params, bench, measured))
    atomic_write(out, (report.model_dump_json(indent=1) + "\n").encode())
    return report


def _columns(params: Params) -> int:
    """The largest possible number of systems, for the progress bar (an unguided teacher has one base less)."""
    grids = [with_variant(params, name).grid for name in params.evaluate.variants]
    bases = 2 * len({n for grid in grids for n in grid})
    return 1 + bases + sum(len(grid) for grid in grids)


def check_teacher(params: Params, model: Model, shards: ShardSet) -> None:
    """Refuses shards of another teacher than the parameters name: the untrained base would be of another model."""
    check_recipe(params, model, shards)
    for name, there in shards.recipe.weights.items():
        if name != NETWORK and (here := model.folder.hash_of(name)) != there:
            raise DataError(
                f"{shards.root} was made with another {name}: {there[:12]} there, {here[:12]} in {model.folder.root}: "
                "run `rats stage rollout` with this model"
            )


def check_student(record: RunRecord, run: Path, shards: ShardSet) -> None:
    """Refuses a student that was trained on shards of another recipe, or that is not the one in the run's record."""
    if record.recipe != shards.fingerprint:
        raise DataError(
            f"{run} was trained on shards of recipe {record.recipe[:12]}, these are of recipe "
            f"{shards.fingerprint[:12]}: roll out the test prompts with the run's parameters, or train again"
        )
    checked_student(run, record)


def open_bench(params: Params, samples: Samples, vae: str) -> Bench:
    """Rewards, the teacher's stored scores with the VAE of the hash `vae`, the judge, and which samples are shown.

    A sample that a reward failed on has no stored score: it is left out for all systems.
    """
    device = torch_device(params.compute.device)
    keys = [row.key for row in samples.rows]
    columns = {reward.name: find_column(params, reward.name, samples.shards, vae) for reward in params.rewards}
    stored = {name: read_scores(samples.shards, column.address, keys) for name, column in columns.items()}
    complete = set(keys).intersection(*stored.values())
    if not complete:
        raise DataError(f"{samples.shards.root} has no sample that every reward could score: look at the rewards")
    samples = samples.keep(complete)
    rewards = {reward.name: open_reward(reward, str(device)) for reward in params.rewards}
    prompts = [row.prompt_id for row in samples.rows]
    choice = choose(samples.concepts, prompts, params.evaluate.pictures, params.evaluate.seed)
    judge = Judge(str(device)) if params.evaluate.judge else None
    return Bench(samples, rewards, stored, judge, choice, params.compute.micro_batch, device)


def measure(system: System, bench: Bench, advance: Callable[[int], None]) -> Measured:
    """Draws, decodes, scores and judges all samples of one system."""
    result = Measured(system.column, {name: [] for name in bench.rewards})
    features: list[Features] = []
    start = 0
    for batch in bench.samples.batches(bench.micro_batch, bench.device):
        images = system.decode(system.draw(batch))
        for name in bench.rewards:
            scores = _scores(system, bench, name, batch, images)
            result.scores[name] += _finite(scores, name, system.column.id, batch.keys)
        if bench.judge is not None:
            features.append(bench.judge.features(images).double().numpy())
        _show(result, images, start, bench.choice.rows())
        start += len(batch.keys)
        advance(len(batch.keys))
    result.features = np.concatenate(features) if features else None
    return result


def _scores(system: System, bench: Bench, reward: str, batch: Batch, images: torch.Tensor) -> list[float]:
    """Scores by one reward. Those of the teacher are stored: its pictures are not scored again."""
    if system.column.system == "teacher":
        return [bench.stored[reward][key] for key in batch.keys]
    return ask(bench.rewards[reward], images, batch.prompts).tolist()


def _finite(scores: list[float], reward: str, column: str, keys: Sequence[str]) -> list[float]:
    for score, key in zip(scores, keys, strict=True):
        if not np.isfinite(score):
            raise DataError(f"{reward} gives {score} to sample {key} of {column}: look at that run's metrics.csv")
    return scores


def _show(result: Measured, images: torch.Tensor, start: int, wanted: set[int]) -> None:
    """Keeps the chosen pictures, and the size of a picture or frame."""
    result.size = (int(images.shape[-2]), int(images.shape[-1]))
    for offset in range(len(images)):
        if start + offset in wanted:
            result.pictures[start + offset] = to_picture(images[offset].float().cpu().numpy())


def cells(params: Params, samples: Samples, measured: Sequence[Measured]) -> Iterator[Cell]:
    """A cell for each system and metric, the teacher first, paired by sample (docs/design.md#reports)."""
    n, seed = params.evaluate.bootstrap, params.evaluate.seed
    teacher = measured[0]
    distances = _distances(params, samples, measured)
    for system in measured:
        column = system.column
        for reward, scores in system.scores.items():
            result = paired(scores, teacher.scores[reward], samples.concepts, n, seed)
            yield _cell(column, reward, _role(params, column, reward), samples, result)
        if column.id in distances:
            own, reference = distances[column.id], distances[teacher.column.id]
            result = paired_kid(own, reference, samples.concepts, n, seed)
            yield _cell(column, "kid", "judge", samples, result)
        diversity = _diversity(samples, system, teacher, n, seed)
        if diversity is not None:
            kept, result = diversity
            yield _cell(column, "diversity", "judge", kept, result)


def _role(params: Params, column: Column, reward: str) -> Role:
    """Whether the reward was trained on: by this variant, or for teacher and base by `params.train`."""
    train = with_variant(params, column.variant) if column.variant else params.train
    return "trained" if reward in train.reward_weights else "held_out"


def _distances(params: Params, samples: Samples, measured: Sequence[Measured]) -> dict[str, NDArray[np.float64]]:
    """Each system's distances to the real pictures, by concept. Empty without a judge or real pictures."""
    if params.evaluate.real_features is None or measured[0].features is None:
        return {}
    features, concepts = open_real(Path(params.evaluate.real_features))
    real = RealSet(features, concepts, samples.concepts)
    return {m.column.id: real.distance(m.features, samples.concepts) for m in measured if m.features is not None}


def _diversity(
    samples: Samples, system: Measured, teacher: Measured, n: int, seed: int
) -> tuple[Samples, Paired] | None:
    """Diversity within a prompt, over prompts with several noises. None if these have fewer than two concepts."""
    if system.features is None or teacher.features is None:
        return None
    prompts = [row.prompt_id for row in samples.rows]
    concept_of = dict(zip(prompts, samples.concepts, strict=True))
    own = diversity_by_group(system.features, prompts)
    reference = diversity_by_group(teacher.features, prompts)
    # a prompt with a single noise has no diversity; sorted, since the bootstrap depends on the order
    names = sorted(prompt for prompt in concept_of if prompt in own)
    concepts = [concept_of[prompt] for prompt in names]
    if len(set(concepts)) < 2:
        return None
    result = paired([own[p] for p in names], [reference[p] for p in names], concepts, n, seed)
    kept = {row.key for row in samples.rows if row.prompt_id in own}
    return samples.keep(kept), result


def _cell(column: Column, metric: str, role: Role, samples: Samples, result: Paired) -> Cell:
    is_teacher = column.system == "teacher"
    return Cell(
        system=column.system,  # type: ignore[arg-type]
        variant=column.variant,
        nfe=column.nfe,
        evaluations=column.evaluations,
        metric=metric,
        role=role,
        split=samples.split,
        mean=result.mean,
        ci_low=result.ci[0],
        ci_high=result.ci[1],
        delta_vs_teacher=None if is_teacher else result.delta,
        delta_ci_low=None if is_teacher else result.delta_ci[0],
        delta_ci_high=None if is_teacher else result.delta_ci[1],
        num_prompts=len({row.prompt_id for row in samples.rows}),
        num_concepts=len(set(samples.concepts)),
    )


def values_csv(samples: Samples, measured: Sequence[Measured]) -> str:
    """Every sample's scores as CSV, one row each, in full precision."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(VALUE_COLUMNS)
    about = list(zip(samples.rows, samples.concepts, samples.kinds, strict=True))
    for system in measured:
        for metric, scores in system.scores.items():
            for (row, concept, kind), score in zip(about, scores, strict=True):
                writer.writerow([system.column.id, row.key, row.prompt_id, concept, kind, metric, repr(score)])
    return buffer.getvalue()


def collect(params: Params, bench: Bench, measured: Sequence[Measured]) -> Pictures:
    """The chosen pictures of all systems, side by side."""
    rows, choice = bench.samples.rows, bench.choice
    pictures = Pictures(
        columns=[system.column for system in measured],
        prompts=[rows[i].prompt for i in choice.side],
        noise_prompts=[rows[group[0]].prompt for group in choice.noises],
        seed=params.evaluate.seed,
        size=measured[0].size,
    )
    for system in measured:
        name = system.column.id
        pictures.side[name] = np.stack([system.pictures[i] for i in choice.side])
        pictures.noises[name] = [np.stack([system.pictures[i] for i in group]) for group in choice.noises]
    return pictures
