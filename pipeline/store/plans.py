"""Which shard holds which sample: decided once, before the first of them is made."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rats.pipeline.store.layout import shard_name, shard_number
from rats.schemas.errors import ConfigError
from rats.schemas.manifest import PlannedSample, ShardDone, ShardPlan


def distinct(wanted: Sequence[PlannedSample]) -> set[str]:
    """The keys of `wanted`; ConfigError when one is there twice."""
    keys: set[str] = set()
    for sample in wanted:
        if sample.key in keys:
            raise ConfigError(f"sample {sample.key} ({sample.prompt!r}) is wanted twice", "remove the repeated prompt")
        keys.add(sample.key)
    return keys


def packed(wanted: Sequence[PlannedSample], plans: Sequence[ShardPlan], size: int) -> list[ShardPlan]:
    """Plans of `size` samples for those that no plan names, numbered on from the last."""
    planned = {sample.key for plan in plans for sample in plan.samples}
    new = sorted((sample for sample in wanted if sample.key not in planned), key=lambda sample: sample.key)
    first = 1 + max((shard_number(plan.shard) for plan in plans), default=-1)
    parts = [tuple(new[start : start + size]) for start in range(0, len(new), size)]
    return [ShardPlan(shard=shard_name(first + i), samples=samples) for i, samples in enumerate(parts)]


def needed(plans: Sequence[ShardPlan], done: Iterable[ShardDone], keys: set[str]) -> list[ShardPlan]:
    """Plans of these keys; an unfinished one whose keys all lie in other shards, after an import, is not needed."""
    rows = {part.shard: {row.key for row in part.rows} for part in done}
    missing = keys.difference(*rows.values())

    def is_needed(plan: ShardPlan) -> bool:
        return any(sample.key in (keys if plan.shard in rows else missing) for sample in plan.samples)

    return [plan for plan in plans if is_needed(plan)]
