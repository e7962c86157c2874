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

from rats.schemas.evaluate_params import JudgeName, JudgeParams
from rats.schemas.params import Params, with_variant
from rats.schemas.reports import Cell, Role
from rats.stages.evaluate.systems import Samples
from rats.stages.measure.features import diversity_by_group
from rats.stages.measure.intervals import Interval, PairedEstimate, paired_estimate
from rats.stages.measure.kid import RealSet, open_real, paired_kid
from rats.stages.measure.pictures import (
    Picture,
    SystemLabel,
)
from rats.stages.measure.values import VALUE_COLUMNS

Features = NDArray[np.float64]


@dataclass
class SystemResult:
    """Results of one system: scores by reward and sample, features (N, F) by judge, the pictures to show."""

    column: SystemLabel
    scores: dict[str, list[float]]
    features: dict[str, Features] = field(default_factory=dict)
    pictures: dict[int, Picture] = field(default_factory=dict)
    size: tuple[int, int] = (0, 0)


def cells_by_system(
    params: Params, samples: Samples, measured: Sequence[SystemResult]
) -> Iterator[tuple[SystemLabel, Cell]]:
    """A cell for each system and metric, the teacher first, paired by sample (docs/design.md#reports)."""
    teacher = measured[0]
    views = [_view(judge, f" {judge.name}" if i else "", samples) for i, judge in enumerate(params.evaluate.judges)]
    for system in measured:
        for reward, scores in system.scores.items():
            result = paired_estimate(scores, teacher.scores[reward], samples.concepts)
            role = _role(params, system.column, reward)
            yield system.column, _cell(system.column, reward, role, samples, result)
        for view in views:
            for cell in _judged(view, samples, system, teacher):
                yield system.column, cell


def _role(params: Params, column: SystemLabel, reward: str) -> Role:
    """Whether the reward was trained on: by this variant, or for teacher and base by `params.train`."""
    train = with_variant(params, column.variant) if column.variant else params.train
    return "trained" if reward in train.reward_weights else "held_out"


@dataclass(frozen=True)
class View:
    """What one judge has to say: its own features, and if there are any, those of real pictures."""

    judge: JudgeName
    suffix: str
    """Of its metrics: none for the first judge."""
    real: RealSet | None


def _view(judge: JudgeParams, suffix: str, samples: Samples) -> View:
    if judge.real_features is None:
        return View(judge.name, suffix, None)
    features, concepts = open_real(Path(judge.real_features))
    return View(judge.name, suffix, RealSet(features, concepts, samples.concepts))


def _judged(view: View, samples: Samples, system: SystemResult, teacher: SystemResult) -> Iterator[Cell]:
    """KID, recognition (where the real pictures have all concepts) and diversity of one system, by one judge."""
    own, reference = system.features[view.judge], teacher.features[view.judge]
    if view.real is not None:
        result = _kid(view.real, samples, own, reference)
        yield _cell(system.column, f"kid{view.suffix}", "judge", samples, result)
    if view.real is not None and view.real.matched:
        seen, teachers = (view.real.recognised(features, samples.concepts).tolist() for features in (own, reference))
        result = paired_estimate(seen, teachers, samples.concepts)
        yield _cell(system.column, f"recognition{view.suffix}", "judge", samples, result)
    diversity = _diversity(samples, own, reference)
    if diversity is not None:
        kept, result = diversity
        yield _cell(system.column, f"diversity{view.suffix}", "judge", kept, result)


def _kid(real: RealSet, samples: Samples, features: Features, teachers: Features) -> PairedEstimate:
    own, reference = (real.distance(one, samples.concepts) for one in (features, teachers))
    return paired_kid(own, reference, samples.concepts)


def _diversity(samples: Samples, features: Features, teachers: Features) -> tuple[Samples, PairedEstimate] | None:
    """Diversity within a prompt, over prompts with several noises. None if these have fewer than two concepts."""
    prompts = [row.prompt_id for row in samples.rows]
    concept_of = dict(zip(prompts, samples.concepts, strict=True))
    own = diversity_by_group(features, prompts)
    reference = diversity_by_group(teachers, prompts)
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
