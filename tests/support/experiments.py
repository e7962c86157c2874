"""A store, and beside it what experiments leave: for tests of what `rats shards gc` keeps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from rats.pipeline.store.shard_set import ShardSet
from rats.schemas.params import Params
from rats.stages.shards.gc.collect import collect
from tests.support import damage
from tests.support.shards import embed, params, score, wanted, write_samples, write_set


def write_grown(folder: Path) -> ShardSet:
    """A set whose snapshots hold 3, 6 and again 2 of its prompts, scored twice, and a work folder beside the store."""
    shards = write_set(folder / "store", wanted(3))
    for prompts in (6, 2):
        write_samples(shards, wanted(prompts))
    embed(shards, wanted(6))
    score(shards)
    score(shards, "old")
    (folder / "work").mkdir()
    return shards


def collected(shards: ShardSet, delete: bool = True, older_than: float = 0.0) -> dict[str, Any]:
    """What goes of the set's store by what lies in `work` beside it."""
    store = Path(shards.root).parent
    return collect(str(store), [store.parent / "work"], delete, older_than)


def name_it(shards: ShardSet, *words: str, file: str = "work/runs/rats/run.json") -> Path:
    """A document that names the set and these words."""
    path = Path(shards.root).parents[1] / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"recipe": shards.fingerprint, "words": words}, indent=1))
    return path


def write_params(shards: ShardSet, settings: Params, file: str = "work/params.yaml") -> None:
    path = Path(shards.root).parents[1] / file
    path.write_text(yaml.safe_dump(settings.model_dump(mode="json")))


def stranger(rewards: list[str]) -> Params:
    """Parameters that mean another set, with these rewards."""
    made = [{"name": name, "adapter": "hpsv2", "path": "nowhere"} for name in rewards]
    return Params.model_validate({**params(seed=7).model_dump(), "rewards": made})


def files(shards: ShardSet) -> set[str]:
    """Names of all files of the set but its locks."""
    root = Path(shards.root)
    return {path.relative_to(root).as_posix() for path in damage.files(root)}
