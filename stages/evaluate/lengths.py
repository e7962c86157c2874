"""How long a student's update should be: the way from the base to what was trained, at several shares of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean

import numpy as np
import torch
from numpy.typing import NDArray

from rats.pipeline.families.models import FamilyStudent
from rats.pipeline.families.open import Model
from rats.pipeline.files.atomic import atomic_write
from rats.pipeline.files.places import Place
from rats.pipeline.machine import on_its_threads
from rats.pipeline.weights.loading import load_component
from rats.pipeline.weights.lora import is_lora, shortened_lora
from rats.pipeline.weights.movement import shortened
from rats.schemas.errors import ConfigError
from rats.schemas.params import ComputeParams, Params, with_variant
from rats.schemas.reports import LengthCell, LengthsReport
from rats.stages.evaluate.before import open_measured
from rats.stages.evaluate.cells import SystemResult, cells_by_system
from rats.stages.evaluate.evaluate import Evaluator, measure, open_evaluator
from rats.stages.evaluate.made import made_here
from rats.stages.evaluate.systems import System, stored_final, teacher_label
from rats.stages.measure.intervals import paired_estimate, student_t
from rats.stages.measure.pictures import SystemLabel
from rats.stages.progress import progress
from rats.stages.train.record import read_record, student_folder
from rats.stages.train.source import reward_parts
from rats.trainer.gate import weighted_sum
from rats.trainer.sampling import few_steps


@on_its_threads
def lengths_stage(
    params: Params, shards: Place, runs: Path, out: Path, lengths: Sequence[float], command: str = ""
) -> LengthsReport:
    """Draws every variant's student at each length, and chooses one by `chosen_length`. Writes `out`.

    Args:
        params: The whole configuration.
        shards: The published shards of the validation split.
        runs: The folder of the runs; every variant of `evaluate.variants` is looked up there.
        out: The file of the report.
        lengths: Shares of the way from the base to what was trained, above 0 and at most 1.
        command: What was typed, for the record.

    Raises:
        ConfigError: shards of the test prompts; lengths outside that range or one alone; a run without a student.
        DataError: shards, scores, rewards or students that do not belong together, a score that is not finite.
    """
    started, what = time.monotonic(), open_measured(params, shards, runs, out)
    _check(lengths, what.samples.split, shards)
    bench = open_evaluator(params, what)
    with torch.no_grad():
        measured = _measured(params, what.model, runs, bench, sorted(lengths))
    by_id = {id_: length for (_, length), found in measured.items() for id_ in (one.column.id for one in found)}
    teacher, students = measured[TEACHER], [one for found in measured.values() for one in found]
    report = LengthsReport(
        cells=tuple(
            LengthCell(**cell.model_dump(), length=by_id[column.id])
            for column, cell in cells_by_system(params, bench.samples, students)
            if column.system == "student"
        ),
        chosen={
            name: chosen_length(_rewards(params, name, teacher[0], measured), bench.samples.concepts)
            for name in params.evaluate.variants
        },
        snapshot=bench.samples.shards.snapshot().hash,
        seconds=time.monotonic() - started,
        made=made_here(bench.device, command),
    )
    atomic_write(out, (report.model_dump_json(indent=1) + "\n").encode())
    return report


TEACHER = ("", 1.0)
"""Its place among the measured variants and lengths."""
Measured = dict[tuple[str, float], list[SystemResult]]


def _check(lengths: Sequence[float], split: str, shards: Place) -> None:
    if split == "test":
        raise ConfigError(
            f"{shards} has the test prompts, by which nothing may be chosen",
            "roll out the validation prompts, and name them by --split validation",
        )
    if len(set(lengths)) < 2 or not all(0 < length <= 1 for length in lengths):
        raise ConfigError("--update-lengths: two or more shares above 0 and at most 1 are meant, such as 0.5,0.75,1")


def _measured(params: Params, model: Model, runs: Path, bench: Evaluator, lengths: Sequence[float]) -> Measured:
    grids = {name: with_variant(params, name).grid for name in params.evaluate.variants}
    total = len(bench.samples.rows) * (1 + len(lengths) * sum(map(len, grids.values())))
    found: Measured = {}
    with progress("evaluate", total, "samples") as advance:
        for name, grid in grids.items():
            student = model.open_student(transformer=student_folder(runs / name))
            teacher = System(teacher_label(model), stored_final, student.decode)
            found = found or {TEACHER: [measure(teacher, bench, advance)]}
            for length in _at_lengths(model, student, runs / name, lengths):
                systems = [_system(student, name, nfe, length) for nfe in grid]
                found[name, length] = [measure(system, bench, advance) for system in systems]
    return found


def _system(student: FamilyStudent, name: str, nfe: int, length: float) -> System:
    label = SystemLabel(f"{name}-{nfe}-{length}", "student", name, nfe, nfe)
    return System(label, few_steps(student, nfe), student.decode)


def _at_lengths(model: Model, student: FamilyStudent, run: Path, lengths: Iterable[float]) -> Iterator[float]:
    """Each length in turn, while the student's network has that one."""
    saved_at, put = read_record(run).update_length, _putter(model, student, student_folder(run))
    for length in lengths:
        put(length / saved_at)
        yield length


def _putter(model: Model, student: FamilyStudent, folder: Path) -> Callable[[float], object]:
    """Gives the network a share of the update that is in `folder`."""
    put = student.network.load_state_dict
    if is_lora(folder):
        own = {name: tensor.clone() for name, tensor in student.network.state_dict().items() if ".lora_" in name}
        return lambda share: put(shortened_lora(own, share), strict=False)
    # in float32: rounded to bfloat16, an update would lose another share of itself than its half does
    wide = model.params.model_copy(update={"dtype": "float32"})
    trained = load_component(model.family.network_class, folder, wide, ComputeParams(device="cpu")).state_dict()
    start = model.base_network().state_dict()
    return lambda share: put(shortened(start, trained, share))


def _rewards(params: Params, name: str, teacher: SystemResult, measured: Measured) -> dict[float, list[float]]:
    """Each sample's trained reward by length: the mean over the numbers of steps, of several rewards their sum."""
    train = with_variant(params, name)
    rewards = list(train.reward_weights)
    columns = zip(*(teacher.scores[reward] for reward in rewards), strict=True)
    parts = reward_parts(train, {str(i): scores for i, scores in enumerate(columns)})

    def total(system: SystemResult) -> NDArray[np.float64]:
        scores_RB = torch.tensor([system.scores[reward] for reward in rewards], dtype=torch.float64)
        return weighted_sum(scores_RB, parts).numpy()

    return {
        length: np.mean([total(system) for system in found], axis=0).tolist()
        for (variant, length), found in measured.items()
        if variant == name
    }


def chosen_length(rewards: Mapping[float, Sequence[float]], concepts: Sequence[str]) -> float:
    """The shortest length whose reward is at most one standard error below the best one's, paired over concepts.

    That is Breiman's rule for the simplest of models that are equally good. A shorter update keeps more of the base's
    pictures, which no reward asks for. `rewards`: each sample's, by length.
    """
    best = max(rewards, key=lambda length: fmean(rewards[length]))
    return min(length for length, values in rewards.items() if _is_near(values, rewards[best], concepts))


def _is_near(values: Sequence[float], best: Sequence[float], concepts: Sequence[str]) -> bool:
    found = paired_estimate(values, best, concepts)
    error = (found.delta_ci[1] - found.delta) / student_t(len(set(concepts)) - 1)
    return found.delta + error >= 0
