"""Stage one: sample the teacher once, keep the states that students are aligned to, score the finals.

This is the driver: it names what is wanted, finds out what is missing, has it made, and names what is there.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rats.pipeline.flux import open_outline
from rats.pipeline.prompts import planned, read_prompts
from rats.pipeline.publish import publish
from rats.pipeline.registry import reward_fingerprint
from rats.pipeline.store import ShardSet
from rats.pipeline.weights import PIPELINE_PATTERNS, component_hashes, resolve, scheduler_hash
from rats.schemas.errors import ConfigError, DataError
from rats.schemas.horizons import snap, union
from rats.schemas.manifest import PlannedSample, ShardPlan
from rats.schemas.params import Params, Split
from rats.schemas.recipe import Recipe, fingerprint, make_recipe
from rats.schemas.reports import RolloutReport
from rats.stages.executor import run
from rats.stages.progress import progress
from rats.stages.rollout_worker import Made, Setup, Task, do_task
from rats.stages.score import reward_hashes

log = logging.getLogger(__name__)


def rollout_stage(
    params: Params,
    split: Split,
    out: Path | None = None,
    workers: int | None = None,
    scheduler_address: str | None = None,
) -> RolloutReport:
    """Make what is missing of a split's samples and scores, name them by a snapshot, publish it into `out`.

    Shards that are done are reused: a second call, and a call after a kill, runs no teacher for them.

    Raises:
        ConfigError: no prompts, model or reward where the parameters say.
        DataError: a damaged shard, or a reward none of whose scores is finite.
        NoWorkerError: nobody took the work.
    """
    start = time.monotonic()
    params = _absolute(params)
    wanted = _wanted(params, split)
    recipe, vae = read_recipe(params)
    hashes = {reward.name: reward_hashes(reward_fingerprint(reward), vae) for reward in params.rewards}
    shards = ShardSet.open_or_create(Path(params.store.path).absolute(), recipe)
    columns = {name: shards.record_reward(name, parts) for name, parts in hashes.items()}
    plans = shards.plan(wanted, params.store.shard_samples)
    reused = sum(shards.done(plan.shard) is not None for plan in plans)
    tasks = _missing(shards, plans, columns)
    _announce(shards, plans, reused, tasks)
    made = _make(params, shards, tasks, workers, scheduler_address)
    _check_scores(made, len(wanted) * len(columns))
    snapshot = shards.write_snapshot(sample.key for sample in wanted)
    if out is not None:
        publish(shards, snapshot, out, list(columns.values()))
    return RolloutReport(
        fingerprint=shards.fingerprint,
        snapshot=snapshot.hash,
        snapshot_number=snapshot.number,
        samples=snapshot.samples,
        samples_failed=sum(part.failed for part in made),
        shards_total=len(plans),
        shards_reused=reused,
        teacher_forwards=sum(part.teacher_forwards for part in made),
        seconds=time.monotonic() - start,
    )


def plan_rollout(params: Params, split: Split) -> dict[str, Any]:
    """What `rollout_stage` would do, without doing any of it."""
    wanted = _wanted(params, split)
    recipe, _ = read_recipe(params)
    root = Path(params.store.path) / fingerprint(recipe)
    shards = ShardSet.open(root) if root.exists() else None
    done = [done for plan in shards.plans() if (done := shards.done(plan.shard))] if shards else []
    there = {row.key for part in done for row in part.rows}
    missing = sum(sample.key not in there for sample in wanted)
    guided = 2 if params.teacher.true_cfg_scale > 1 else 1
    return {
        "fingerprint": fingerprint(recipe),
        "store": str(root),
        "samples": len(wanted),
        "samples_missing": missing,
        "evaluations": missing * params.teacher.steps * guided,
        "horizons": len(recipe.horizons),
    }


def read_recipe(params: Params) -> tuple[Recipe, str]:
    """The recipe of the weights that are on disk now, and the hash of the decoder. Loads no weights."""
    folder = resolve(params.model.path, params.model.revision, PIPELINE_PATTERNS)
    weights = component_hashes(folder)
    family = open_outline(params.model, params.teacher)
    students = [family.stock_sigmas(nfe) for nfe in params.teacher.nfe]
    sigmas = snap(family.stock_sigmas(params.teacher.steps), students)
    return make_recipe(params, weights, scheduler_hash(folder), sigmas, union(students)), weights["vae"]


def _wanted(params: Params, split: Split) -> list[PlannedSample]:
    path = getattr(params.prompts, split)
    if path is None:
        raise ConfigError(f"prompts.{split} is not set: name a .txt or .csv file in params.yaml")
    return planned(read_prompts(Path(path)), params.teacher.noises_per_prompt)


def _missing(shards: ShardSet, plans: Sequence[ShardPlan], columns: dict[str, str]) -> list[Task]:
    tasks = []
    for plan in plans:
        rest = {name: fp for name, fp in columns.items() if not shards.scores_done(fp, plan.shard)}
        if rest or shards.done(plan.shard) is None:
            tasks.append(Task(plan, rest))
    return tasks


def _announce(shards: ShardSet, plans: Sequence[ShardPlan], reused: int, tasks: Sequence[Task]) -> None:
    where = f"store {shards.fingerprint[:12]}"
    if not tasks:
        log.info("%s: all %d shards and their scores are there, no teacher forward is run", where, len(plans))
    else:
        log.info("%s: %d of %d shards are there, %d to do", where, reused, len(plans), len(tasks))


def _make(
    params: Params, shards: ShardSet, tasks: Sequence[Task], workers: int | None, address: str | None
) -> list[Made]:
    if not tasks:
        return []
    made = []
    count = min(params.store.workers if workers is None else workers, len(tasks))
    with progress("rollout", sum(len(task.plan.samples) for task in tasks), "samples") as advance:
        for part in run(do_task, tasks, Setup(params, shards.root), workers=count, scheduler_address=address):
            made.append(part)
            advance(part.samples)
    return made


def _check_scores(made: Sequence[Made], scores: int) -> None:
    failed = sum(part.failed for part in made)
    if failed:
        log.warning("%d scores are not finite and are left out", failed)
    if failed and failed >= scores:
        raise DataError(f"all {failed} scores are not finite: check the rewards' weights, delete scores/ and run again")


def _absolute(params: Params) -> Params:
    """Local model paths as absolute ones: a worker may stand in another folder."""
    model = params.model.model_copy(update={"path": _whole(params.model.path)})
    rewards = tuple(reward.model_copy(update={"path": _whole(reward.path)}) for reward in params.rewards)
    return params.model_copy(update={"model": model, "rewards": rewards})


def _whole(path: str) -> str:
    return str(Path(path).absolute()) if Path(path).exists() else path
