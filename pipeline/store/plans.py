"""Plans, which say what samples a shard holds. They are made before the first sample of the shard."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rats.pipeline.store.layout import shard_name, shard_number
from rats.schemas.errors import ConfigError
from rats.schemas.manifest import PlannedSample, ShardDone, ShardPlan


def distinct_keys(wanted: Sequence[PlannedSample]) -> set[str]:
    """The keys of `wanted`. Raises ConfigError if one occurs twice."""
    keys: set[str] = set()
    for sample in wanted:
        if sample.key in keys:
            raise ConfigError(f"sample {sample.key} ({sample.prompt!r}) is wanted twice", "remove the repeated prompt")
        keys.add(sample.key)
    return keys


def new_plans(wanted: Sequence[PlannedSample], plans: Sequence[ShardPlan], size: int) -> list[ShardPlan]:
    """New plans of `size` samples each, for the wanted samples that are in no plan. Their numbers follow the last."""
    planned = {sample.key for plan in plans for sample in plan.samples}
    new = sorted((sample for sample in wanted if sample.key not in planned), key=lambda sample: sample.key)
    first = 1 + max((shard_number(plan.shard) for plan in plans), default=-1)
    parts = [tuple(new[start : start + size]) for start in range(0, len(new), size)]
    return [ShardPlan(shard=shard_name(first + i), samples=samples) for i, samples in enumerate(parts)]


def needed_plans(plans: Sequence[ShardPlan], done: Iterable[ShardDone], keys: set[str]) -> list[ShardPlan]:
    """The plans that hold these keys. After an import, the keys of an unfinished shard may all lie in other shards:
    such a plan is left out.
    """
    rows = {part.shard: {row.key for row in part.rows} for part in done}
    missing = keys.difference(*rows.values())

    def is_needed(plan: ShardPlan) -> bool:
        return any(sample.key in (keys if plan.shard in rows else missing) for sample in plan.samples)

    return [plan for plan in plans if is_needed(plan)]
