"""Stage rollout: samples the teacher once, stores the states that students are aligned to, and scores the final ones.

This is the driver: it lists what is wanted, finds what is missing, lets workers make it, and writes a snapshot.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from rats.pipeline.families.open import Model
from rats.pipeline.files.places import Place, open_store
from rats.pipeline.machine import software
from rats.pipeline.prompts import planned_samples, read_prompts
from rats.pipeline.rewards.open import examine_reward, pin_reward
from rats.pipeline.store.publish import check_out, publish
from rats.pipeline.store.scores import MAX_BAD, record_reward
from rats.pipeline.store.shard_set import ShardSet
from rats.schemas.errors import ConfigError
from rats.schemas.manifest import PlannedSample, ShardDone, ShardPlan
from rats.schemas.params import Params, Split
from rats.schemas.recipe import DECODER, Recipe, make_recipe
from rats.schemas.reports import RolloutReport
from rats.schemas.train_params import check_dtype
from rats.stages.measure.splits import check_concepts, shared_with_train
from rats.stages.rollout.columns import check_failed, column_hashes
from rats.stages.rollout.makers import say_other_machines, say_other_software
from rats.stages.rollout.scorer import missing_columns
from rats.stages.rollout.worker import RolloutSetup, RolloutTask, do_task
from rats.stages.workers.run import WorkerTarget
from rats.stages.workers.tasks import TaskResult, run_tasks

log = logging.getLogger(__name__)


def rollout_stage(
    params: Params,
    split: Split,
    out: Path | None = None,
    where: WorkerTarget | None = None,
    max_bad: float = MAX_BAD,
    samples: Sequence[PlannedSample] | None = None,
) -> RolloutReport:
    """Makes the missing samples and scores of a split, writes a snapshot of them, and publishes it into `out`.

    Finished shards are reused: a second call, or a call after a kill, runs no teacher for them.

    Args:
        params: The whole configuration.
        split: Which prompts.
        out: A folder to publish into.
        where: Where tasks run; `params.store.workers` local processes if not given.
        max_bad: The share of samples, 0 to 1, on which a reward may fail.
        samples: These samples, instead of all samples of the split.

    Raises:
        ConfigError: no prompts, model or reward where the parameters say; a dtype that cannot be trained.
        DataError: a damaged shard, a picture that is not finite, or a reward that fails on more samples than `max_bad`.
        NoWorkerError: no worker accepted a task.
    """
    start = time.monotonic()
    check_dtype(params.model.dtype)
    params, model = pin_params(params)
    wanted = wanted_samples(params, split) if samples is None else samples
    for said in shared_with_train(params.prompts) if samples is None else ():
        log.warning("%s", said)
    recipe = read_recipe(params, model)
    hashes = column_hashes(params, model.folder.hash_of(DECODER))
    shards = ShardSet.open_or_create(open_store(params.store.path).absolute(), recipe)
    columns = {name: record_reward(shards, name, parts) for name, parts in hashes.items()}
    done = shards.finished()
    plans = shards.plan(wanted, params.store.shard_samples, done)
    finished = {part.shard: part for part in done}
    reused = sum(plan.shard in finished for plan in plans)
    tasks = _missing(shards, plans, finished, columns)
    if tasks:
        check_before(params, model, shards.root, out)
    _announce(shards, plans, reused, tasks)
    if tasks and samples is None:
        model.lengths(texts_of(wanted)).tell(log)
    made = _make(params, shards, tasks, where or WorkerTarget(workers=params.store.workers), done)
    done = shards.finished(done)
    snapshot = shards.write_snapshot((sample.key for sample in wanted), done)
    failed = check_failed(shards, columns, snapshot, {sample.key for sample in wanted}, max_bad)
    if out is not None:
        publish(shards, snapshot, out, list(columns.values()), done)
    return RolloutReport(
        fingerprint=shards.fingerprint,
        snapshot=snapshot.hash,
        snapshot_number=snapshot.number,
        samples=snapshot.samples,
        samples_failed=failed,
        shards_total=len(plans),
        shards_reused=reused,
        teacher_forwards=sum(part.teacher_forwards for part in made),
        seconds=time.monotonic() - start,
    )


def check_before(params: Params, model: Model, root: Place, out: Path | None) -> None:
    """Finds what would stop a rollout only after the teacher has run. Loads no weights.

    Raises:
        CannotCreateError: the set at `root` cannot be published into `out`.
        RatsError: a model or a reward that does not load, as far as its headers show.
    """
    if out is not None:
        check_out(root, out)
    model.examined()
    for reward in params.rewards:
        examine_reward(reward)


def read_recipe(params: Params, model: Model) -> Recipe:
    """The recipe for the model's weights as they are on disk. Loads no weights."""
    weights, scheduler, outline = model.hashes(), model.folder.scheduler_hash(), model.outline
    return make_recipe(params, weights, scheduler, *outline.grids(), outline.latent_shape(), outline.ignored)


def wanted_samples(params: Params, split: Split) -> list[PlannedSample]:
    """Every prompt of a split with every noise.

    Raises ConfigError where the split has no prompt file, or is the test split and could not be evaluated.
    """
    path = getattr(params.prompts, split)
    if path is None:
        raise ConfigError(f"prompts.{split} is not set: name a .txt or .csv file in params.yaml")
    prompts = read_prompts(path)
    if split == "test":
        check_concepts((prompt.concept for prompt in prompts), f"prompts.test ({path})")
    return planned_samples(prompts, params.teacher.noises_per_prompt)


def texts_of(samples: Sequence[PlannedSample]) -> list[str]:
    """Their prompts, each once."""
    return list({sample.prompt_id: sample.prompt for sample in samples}.values())


def _missing(
    shards: ShardSet, plans: Sequence[ShardPlan], finished: Mapping[str, ShardDone], columns: dict[str, str]
) -> list[RolloutTask]:
    """A task for every shard that lacks samples, scores, or a prompt's embeddings."""
    encoded = shards.encoded()

    def complete(plan: ShardPlan) -> bool:
        if plan.shard not in finished or not encoded.issuperset(sample.prompt_id for sample in plan.samples):
            return False
        return not missing_columns(shards, finished[plan.shard], columns)

    there = shards.root.concurrently(complete, plans)
    return [
        RolloutTask(shard=p.shard, plan=p, columns=columns) for p, done in zip(plans, there, strict=True) if not done
    ]


def _announce(shards: ShardSet, plans: Sequence[ShardPlan], reused: int, tasks: Sequence[RolloutTask]) -> None:
    where = f"store {shards.fingerprint[:12]}"
    if not tasks:
        log.info("%s: all %d shards and their scores are there, no teacher forward is run", where, len(plans))
    else:
        log.info("%s: %d of %d shards are there, %d to do", where, reused, len(plans), len(tasks))


def _make(
    params: Params, shards: ShardSet, tasks: Sequence[RolloutTask], where: WorkerTarget, there: Sequence[ShardDone]
) -> list[TaskResult]:
    """Runs the tasks. Says where the shards that are `there`, or the new ones, are of another kind."""
    if not tasks:
        return []
    driver = software(params)
    say_other_software(driver, there)
    samples = sum(len(task.plan.samples) for task in tasks)
    made = run_tasks(do_task, tasks, RolloutSetup(params, shards.root, driver), where, "rollout", samples)
    say_other_machines(shards.finished(there))
    return made


def pin_params(params: Params, decoder_alone: bool = False) -> tuple[Params, Model]:
    """Makes local paths absolute and fixes hub commits: a worker may run in another folder, or start later.

    Returns the model of these parameters too. `decoder_alone`: of a hub's model only the decoder is fetched.
    """
    model = Model.of(params).pinned(decoder_alone)
    pinned = {"model": model.params, "rewards": tuple(map(pin_reward, params.rewards))}
    return params.model_copy(update=pinned), model
