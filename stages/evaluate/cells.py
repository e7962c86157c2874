"""Cells of the comparison: what is kept of each system, and every mean and difference with its interval."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from rats.schemas.params import Params, with_variant
from rats.schemas.reports import Cell, Role
from rats.stages.evaluate.systems import Samples
from rats.stages.measure.intervals import Interval, PairedEstimate, paired_estimate
from rats.stages.measure.judge import diversity_by_group
from rats.stages.measure.kid import RealSet, open_real, paired_kid
from rats.stages.measure.pictures import (
    Picture,
    SystemLabel,
)
from rats.stages.measure.values import VALUE_COLUMNS

Features = NDArray[np.float64]


@dataclass
class SystemResult:
    """Results of one system: scores by reward and sample, the judge's features (N, F), the pictures to show."""

    column: SystemLabel
    scores: dict[str, list[float]]
    features: Features | None = None
    pictures: dict[int, Picture] = field(default_factory=dict)
    size: tuple[int, int] = (0, 0)


def cells_by_system(
    params: Params, samples: Samples, measured: Sequence[SystemResult]
) -> Iterator[tuple[SystemLabel, Cell]]:
    """A cell for each system and metric, the teacher first, paired by sample (docs/design.md#reports)."""
    teacher = measured[0]
    distances = _distances(params, samples, measured)
    for system in measured:
        column = system.column
        for reward, scores in system.scores.items():
            result = paired_estimate(scores, teacher.scores[reward], samples.concepts)
            yield column, _cell(column, reward, _role(params, column, reward), samples, result)
        if column.id in distances:
            own, reference = distances[column.id], distances[teacher.column.id]
            result = paired_kid(own, reference, samples.concepts)
            yield column, _cell(column, "kid", "judge", samples, result)
        diversity = _diversity(samples, system, teacher)
        if diversity is not None:
            kept, result = diversity
            yield column, _cell(column, "diversity", "judge", kept, result)


def _role(params: Params, column: SystemLabel, reward: str) -> Role:
    """Whether the reward was trained on: by this variant, or for teacher and base by `params.train`."""
    train = with_variant(params, column.variant) if column.variant else params.train
    return "trained" if reward in train.reward_weights else "held_out"


def _distances(params: Params, samples: Samples, measured: Sequence[SystemResult]) -> dict[str, NDArray[np.float64]]:
    """Each system's distances to the real pictures, by concept. Empty without a judge or real pictures."""
    if params.evaluate.real_features is None or measured[0].features is None:
        return {}
    features, concepts = open_real(Path(params.evaluate.real_features))
    real = RealSet(features, concepts, samples.concepts)
    return {m.column.id: real.distance(m.features, samples.concepts) for m in measured if m.features is not None}


def _diversity(samples: Samples, system: SystemResult, teacher: SystemResult) -> tuple[Samples, PairedEstimate] | None:
    """Diversity within a prompt, over prompts with several noises. None if these have fewer than two concepts."""
    if system.features is None or teacher.features is None:
        return None
    prompts = [row.prompt_id for row in samples.rows]
    concept_of = dict(zip(prompts, samples.concepts, strict=True))
    own = diversity_by_group(system.features, prompts)
    reference = diversity_by_group(teacher.features, prompts)
    # a prompt with a single noise has no diversity; sorted, since sums depend on the order
    names = sorted(prompt for prompt in concept_of if prompt in own)
    concepts = [concept_of[prompt] for prompt in names]
    if len(set(concepts)) < 2:
        return None
    result = paired_estimate([own[p] for p in names], [reference[p] for p in names], concepts)
    kept = {row.key for row in samples.rows if row.prompt_id in own}
    return samples.keep(kept), result


def _cell(column: SystemLabel, metric: str, role: Role, samples: Samples, result: PairedEstimate) -> Cell:
    is_teacher = column.system == "teacher"
    low, high = _known(result.ci)
    delta_low, delta_high = (None, None) if is_teacher else _known(result.delta_ci)
    return Cell(
        system=column.system,  # type: ignore[arg-type]
        variant=column.variant,
        nfe=column.nfe,
        evaluations=column.evaluations,
        metric=metric,
        role=role,
        split=samples.split,
        mean=result.mean,
        ci_low=low,
        ci_high=high,
        delta_vs_teacher=None if is_teacher else result.delta,
        delta_ci_low=delta_low,
        delta_ci_high=delta_high,
        num_prompts=len({row.prompt_id for row in samples.rows}),
        num_concepts=len(set(samples.concepts)),
    )


def _known(limits: Interval) -> Interval | tuple[None, None]:
    """JSON has no infinity."""
    return limits if math.isfinite(limits[0]) else (None, None)


def values_csv(samples: Samples, measured: Sequence[SystemResult]) -> str:
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
