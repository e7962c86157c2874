"""`rats plan`: estimates the cost of a rollout, and what stored trajectories save compared with a live teacher."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rats.pipeline.families.open import Model
from rats.pipeline.files.places import Place, open_store
from rats.pipeline.store.plans import needed_plans, new_plans
from rats.pipeline.store.shard_set import ShardSet, is_set
from rats.pipeline.weights.loading import torch_dtype
from rats.schemas.errors import ConfigError
from rats.schemas.manifest import PlannedSample
from rats.schemas.params import Params, Split
from rats.schemas.recipe import Recipe, fingerprint
from rats.schemas.train_params import check_dtype
from rats.stages.plan.flops import conditioning_shapes, decode_flops, evaluation_flops, measured_rate
from rats.stages.plan.memory import rollout_memory, train_memory
from rats.stages.plan.meta import if_countable
from rats.stages.plan.result import Comparison, Expense, Plan, RolloutWork
from rats.stages.plan.sizes import embedding_bytes, latents_bytes, shard_bytes
from rats.stages.rollout.rollout import check_before, read_recipe, texts_of, wanted_samples

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Survey:
    """What is wanted and what exists. `groups` are the samples of each shard that must still be made."""

    recipe: Recipe
    root: Place
    wanted: list[PlannedSample]
    missing: int
    shards: int
    groups: list[tuple[PlannedSample, ...]]
    prompts_to_encode: int

    @property
    def to_make(self) -> list[PlannedSample]:
        """Samples of all shards that are to be made."""
        return [sample for group in self.groups for sample in group]


def survey(params: Params, model: Model, split: Split) -> Survey:
    """Finds what a rollout would have to make. Writes nothing and loads no weights.

    Raises:
        ConfigError: no prompts or model where the parameters say; a dtype that cannot be trained.
        DataError: a damaged shard set.
    """
    check_dtype(params.model.dtype)
    wanted = wanted_samples(params, split)
    recipe = read_recipe(params, model)
    root = open_store(params.store.path) / fingerprint(recipe)
    shards = ShardSet.open(root) if is_set(root) else None
    plans, done = (shards.plans(), shards.finished()) if shards else ([], [])
    encoded = shards.encoded() if shards else set()
    keys, finished = {sample.key for sample in wanted}, {part.shard for part in done}
    used = needed_plans([*plans, *new_plans(wanted, plans, params.store.shard_samples)], done, keys)
    return Survey(
        recipe=recipe,
        root=root,
        wanted=wanted,
        missing=len(keys - {row.key for part in done for row in part.rows}),
        shards=len(used),
        groups=[plan.samples for plan in used if plan.shard not in finished],
        prompts_to_encode=len({sample.prompt_id for plan in used for sample in plan.samples} - encoded),
    )


def rollout_work(found: Survey, params: Params) -> RolloutWork:
    """The numbers of a survey."""
    per_sample = params.teacher.evaluations
    batches = sum(math.ceil(len(group) / params.compute.micro_batch) for group in found.groups)
    return RolloutWork(
        fingerprint=fingerprint(found.recipe),
        store=str(found.root),
        samples=len(found.wanted),
        samples_missing=found.missing,
        samples_to_make=len(found.to_make),
        shards=found.shards,
        shards_missing=len(found.groups),
        embeddings_to_make=found.prompts_to_encode,
        horizons=len(found.recipe.horizons),
        evaluations=len(found.to_make) * per_sample,
        forwards=batches * per_sample,
    )


def plan_rollout(params: Params, split: Split, out: Path | None = None) -> dict[str, Any]:
    """What `rollout_stage` would do, for --dry-run: the fields of `RolloutWork`. Raises what it would raise first."""
    model = Model.of(params)
    found = survey(params, model, split)
    if found.groups:
        check_before(params, model, found.root, out)
    model.lengths(texts_of(found.wanted)).tell(log)
    return rollout_work(found, params).model_dump()


def plan_stage(
    params: Params,
    split: Split,
    experiments: int | None = None,
    price: float | None = None,
    workers: int | None = None,
    rate: float | None = None,
) -> Plan:
    """The cost of a rollout of the split.

    Args:
        params: The parameters.
        split: Which prompts.
        experiments: For the comparison with a live teacher; as many as `evaluate.variants` if not given.
        price: USD an hour of one worker.
        workers: As many as `store.workers` if not given.
        rate: FLOP/s of one worker; measured on this machine's device if not given.

    Raises:
        ConfigError: no prompts or model where the parameters say, or no such device here and no rate.
        DataError: a damaged shard set.
    """
    model = Model.of(params)
    found = survey(params, model, split)
    work, outline = rollout_work(found, params), model.outline
    flops = if_countable(lambda: evaluation_flops(outline))
    workers = max(1, params.store.workers if workers is None else workers)
    given, rate = rate is not None, _measured(model) if rate is None and flops is not None else rate
    seconds = None if flops is None or rate is None else flops / rate
    total = None if flops is None else work.forwards * params.compute.micro_batch * flops
    worker_seconds = None if seconds is None else work.forwards * params.compute.micro_batch * seconds
    latents = latents_bytes(found.recipe)
    embedding = embedding_bytes(conditioning_shapes(outline), torch_dtype(params.model.dtype))
    return Plan(
        split=split,
        loras=tuple(map(str, params.model.loras)),
        work=work,
        lengths=model.lengths(texts_of(found.wanted)),
        evaluation_flops=flops,
        decode_flops=if_countable(lambda: decode_flops(outline)),
        flops=total,
        rate=rate,
        rate_measured=not given,
        device=params.compute.device,
        workers=workers,
        worker_seconds=worker_seconds,
        seconds=None if worker_seconds is None else worker_seconds / workers,
        price=price,
        usd=_usd(worker_seconds, price),
        bytes_to_write=_bytes(found, latents, len(params.rewards)) + work.embeddings_to_make * embedding,
        bytes_per_sample=latents,
        bytes_per_prompt=embedding,
        bytes_free=found.root.free(),
        rollout_memory=if_countable(lambda: rollout_memory(params, model)),
        train_memory=if_countable(lambda: train_memory(params, model)),
        comparison=compare_costs(params, len(found.wanted), experiments, seconds, price),
    )


def compare_costs(
    params: Params,
    samples: int,
    experiments: int | None,
    seconds_per_evaluation: float | None,
    price: float | None = None,
) -> Comparison:
    """Stored trajectories against a teacher that is run in every training step. Seconds are None where unknown."""
    count = len(params.evaluate.variants) if experiments is None else experiments
    live = params.train.steps * params.train.batch

    def expense(rollouts: int) -> Expense:
        evaluations = rollouts * params.teacher.evaluations
        seconds = None if seconds_per_evaluation is None else evaluations * seconds_per_evaluation
        return Expense(evaluations=evaluations, worker_seconds=seconds, usd=_usd(seconds, price))

    return Comparison(
        experiments=count,
        steps=params.train.steps,
        batch=params.train.batch,
        pays_from=pays_from(samples, live),
        stored=expense(samples),
        live=expense(count * live),
    )


def pays_from(samples: int, live_samples: int) -> int:
    """The first number of experiments for which sampling `samples` once costs less than `live_samples` in each."""
    return samples // live_samples + 1


def _bytes(found: Survey, latents: int, columns: int) -> int:
    return sum(shard_bytes(found.recipe, latents, group, columns) for group in found.groups)


def _measured(model: Model) -> float:
    try:
        return measured_rate(model)
    except ConfigError as error:
        raise ConfigError(f"{error}, or give the rate of the machine that is meant with --rate TFLOPS") from error


def _usd(worker_seconds: float | None, price: float | None) -> float | None:
    return None if price is None or worker_seconds is None else worker_seconds / 3600 * price
