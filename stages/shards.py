"""What `rats shards` prints: which sets there are, what is in one, whether every byte is as recorded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rats.pipeline.embeddings import has_embedding, read_embedding
from rats.pipeline.reader import verify_shard
from rats.pipeline.store import ShardSet
from rats.schemas.errors import ConfigError


def list_sets(folder: Path) -> list[dict[str, Any]]:
    """A row for every shard set below `folder`, which may be a store, a set or a published folder."""
    if not folder.is_dir():
        raise ConfigError(f"no folder {folder}: name a store or a published folder, such as data/teacher/train")
    roots = sorted(path.parent for path in folder.glob("**/recipe.json"))
    return [_row(ShardSet.open(root)) for root in roots]


def describe(folder: Path) -> dict[str, Any]:
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


def verify(folder: Path) -> dict[str, Any]:
    """Reads all that the newest snapshot needs and compares every hash.

    Raises:
        DataError: at the first difference, naming the file and the way out.
    """
    shards = ShardSet.open(folder)
    snapshot = shards.snapshot()
    rows = shards.index(snapshot)
    size = sum(verify_shard(shards, shard, digest) for shard, digest in snapshot.shards.items())
    prompts = {row.prompt_id for row in rows}
    for prompt in sorted(prompts):
        if has_embedding(shards, prompt):
            read_embedding(shards, prompt)
    columns = shards.rewards()
    for column in columns:
        shards.read_scores(column, (row.key for row in rows))
    return {"samples": len(rows), "shards": len(snapshot.shards), "bytes": size, "rewards": len(columns), "ok": True}


def _row(shards: ShardSet) -> dict[str, Any]:
    newest = shards.snapshot() if shards.snapshots() else None
    return {
        "path": str(shards.root),
        "fingerprint": shards.fingerprint,
        "snapshot": newest.number if newest else None,
        "samples": newest.samples if newest else 0,
        "shards": len(newest.shards) if newest else 0,
    }
