"""What an evaluation measures, and all that can be wrong with it before a network is loaded."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rats.pipeline.families.open import Model
from rats.pipeline.files.atomic import check_creatable
from rats.pipeline.files.places import Place
from rats.pipeline.rewards.open import examine_reward
from rats.pipeline.store.scores import read_scores
from rats.pipeline.store.shard_set import ShardSet
from rats.pipeline.weights.hashes import NETWORK
from rats.schemas.errors import DataError
from rats.schemas.params import Params
from rats.schemas.recipe import DECODER
from rats.schemas.run import RunRecord
from rats.stages.evaluate.systems import Samples, open_samples
from rats.stages.measure.kid import open_real
from rats.stages.measure.splits import check_concepts, shared_with_train
from rats.stages.rollout.columns import check_recipe, find_column
from rats.stages.train.record import checked_student, read_record

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Measured:
    """What is compared, and on which samples.

    Attributes:
        model: The teacher's.
        samples: Those that every reward could score.
        stored: The teacher's scores by reward and key: a teacher sample is never scored again.
        records: The runs by variant.
    """

    model: Model
    samples: Samples
    stored: dict[str, dict[str, float]]
    records: dict[str, RunRecord]


def open_measured(params: Params, shards: Place, runs: Path, out: Path) -> Measured:
    """Opens it without loading weights; the arguments are those of `evaluate_stage`.

    Raises:
        CannotCreateError: `out` cannot be written.
        ConfigError: a run without a student, fewer than two concepts, no real pictures where the parameters say.
        DataError: shards, scores, rewards or students that are damaged or do not belong together.
    """
    check_creatable(out)
    model, samples = Model.of(params), open_samples(params, shards)
    check_concepts(samples.concepts, shards)
    check_teacher(params, model, samples.shards)
    records = {name: read_record(runs / name) for name in params.evaluate.variants}
    for name, record in records.items():
        check_student(record, runs / name, samples.shards)
    samples, stored = scored_samples(params, samples, model.folder.hash_of(DECODER))
    for reward in params.rewards:
        examine_reward(reward)
    for judge in params.evaluate.judges:
        if judge.real_features is not None:
            open_real(Path(judge.real_features))
    model.examined()
    for said in shared_with_train(params.prompts):
        log.warning("%s", said)
    return Measured(model, samples, stored, records)


def plan_evaluate(params: Params, shards: Place, runs: Path, out: Path) -> dict[str, Any]:
    """What `evaluate_stage` would do, for --dry-run. Raises what it would raise first."""
    measured = open_measured(params, shards, runs, out)
    students = {name: str(runs / name / "student") for name in measured.records}
    counts = {"samples": len(measured.samples.rows), "concepts": len(set(measured.samples.concepts))}
    return {"shards": str(shards), "split": measured.samples.split, **counts, "students": students, "out": str(out)}


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


def scored_samples(params: Params, samples: Samples, vae: str) -> tuple[Samples, dict[str, dict[str, float]]]:
    """The samples with a stored score by every reward and the VAE of the hash `vae`, and those scores.

    A sample that a reward failed on has no stored score: it is left out for all systems.
    """
    keys = [row.key for row in samples.rows]
    columns = {reward.name: find_column(params, reward.name, samples.shards, vae) for reward in params.rewards}
    stored = {name: read_scores(samples.shards, column.address, keys) for name, column in columns.items()}
    complete = set(keys).intersection(*stored.values())
    if not complete:
        raise DataError(f"{samples.shards.root} has no sample that every reward could score: look at the rewards")
    samples = samples.keep(complete)
    check_concepts(samples.concepts, f"{samples.shards.root}, as far as every reward could score it,")
    return samples, stored
