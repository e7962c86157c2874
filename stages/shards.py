"""What `rats shards ls` and `info` print: which sets there are, and what is in one."""

from __future__ import annotations

from typing import Any

from rats.pipeline.places import Place
from rats.pipeline.store import ShardSet
from rats.schemas.errors import ConfigError


def list_sets(folder: Place) -> list[dict[str, Any]]:
    """A row for every shard set below `folder`, which may be a store, a set or a published folder."""
    if not folder.is_dir():
        raise ConfigError(f"no folder {folder}: name a store or a published folder, such as data/teacher/train")
    roots = sorted((path.parent for path in folder.glob("**/recipe.json")), key=str)
    return [_row(ShardSet.open(root)) for root in roots]


def describe(folder: Place) -> dict[str, Any]:
    """Recipe, newest snapshot and columns of scores of one set.

    Raises:
        DataError: no shard set, or a damaged one.
    """
    shards = ShardSet.open(folder)
    recipe = shards.recipe
    steps = len(recipe.sigmas) - 1
    return _row(shards) | {
        "snapshots": shards.snapshots(),
        "family": recipe.family,
        "steps": steps,
        "horizons": list(recipe.horizons),
        "size": f"{recipe.height} x {recipe.width}",
        "seed": recipe.seed,
        "rewards": [f"{record.name} {column[:12]}" for column, record in shards.rewards().items()],
        "weights": [f"{name} {digest[:12]}" for name, digest in sorted(recipe.weights.items())],
    }


def _row(shards: ShardSet) -> dict[str, Any]:
    newest = shards.snapshot() if shards.snapshots() else None
    return {
        "path": str(shards.root),
        "fingerprint": shards.fingerprint,
        "snapshot": newest.number if newest else None,
        "samples": newest.samples if newest else 0,
        "shards": len(newest.shards) if newest else 0,
    }
