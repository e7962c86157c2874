"""What `rats shards ls` and `info` print: which sets there are, and what is in one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rats.pipeline.files.places import Place
from rats.pipeline.store.scores import finished_scores, reward_columns, score_rows, scores_done
from rats.pipeline.store.shard_set import ShardSet
from rats.schemas.errors import ConfigError
from rats.schemas.maker import Maker
from rats.schemas.manifest import IndexRow, ScoreRow, Snapshot
from rats.schemas.plugins import FAMILIES, load_plugin
from rats.schemas.recipe import Recipe


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
        "rewards": [f"{record.name} {column[:12]}" for column, record in reward_columns(shards).items()],
        "weights": [f"{name} {digest[:12]}" for name, digest in sorted(recipe.weights.items())],
        "compute": _compute(recipe),
        "made_by": makers(shards),
    }


def makers(shards: ShardSet) -> list[str]:
    """A line for every maker of finished shards and of their scores: how many of both, and what it is."""
    made = Counter(_text(part.maker) for part in shards.finished())
    scored = Counter(_text(part.maker) for part in finished_scores(shards))
    return [
        f"{counted(made[text], 'shard')}, {counted(scored[text], 'table')} of scores: {text}" for text in made | scored
    ]


def _text(maker: Maker | None) -> str:
    return maker.text if maker else "not recorded, by an older rats"


def _row(shards: ShardSet) -> dict[str, Any]:
    newest = shards.snapshot() if shards.snapshots() else None
    return {
        "path": str(shards.root),
        "fingerprint": shards.fingerprint,
        "snapshot": newest.number if newest else None,
        "samples": newest.samples if newest else 0,
        "shards": len(newest.shards) if newest else 0,
    }


def recipe_rows(recipe: Recipe, teacher: str | None) -> list[tuple[str, str]]:
    """Rows on how the samples were made. `teacher` is the teacher's name, if known; no recipe holds it."""
    steps = len(recipe.sigmas) - 1
    frames = f", {recipe.frames} frames" if recipe.frames > 1 else ""
    return [
        *([("teacher", teacher)] if teacher else []),
        ("family", recipe.family),
        ("steps", f"{steps}, {counted(recipe.evaluations, 'network evaluation')} a sample"),
        ("guidance", _guidance(recipe)),
        ("negative prompt", recipe.negative_prompt or "none"),
        ("resolution", f"{recipe.width} x {recipe.height} px{frames}"),
        ("text tokens", f"at most {recipe.max_sequence_length}"),
        ("numbers", f"{recipe.dtype} computed, {recipe.latent_dtype} stored"),
        ("seed", str(recipe.seed)),
        ("device", _compute(recipe)),
        *((f"weights: {name}", digest) for name, digest in sorted(recipe.weights.items())),
        ("scheduler", recipe.scheduler),
    ]


def _compute(recipe: Recipe) -> str:
    compute = recipe.compute
    return f"{compute.device}, {counted(compute.threads, 'thread')}, micro-batch {compute.micro_batch}"


def _guidance(recipe: Recipe) -> str:
    """Both kinds of guidance as text; the embedded one only for networks with such an input."""
    free = f"classifier-free {recipe.true_cfg_scale:g}"
    embeds = load_plugin(FAMILIES, recipe.family).embeds_guidance
    return f"embedded {recipe.guidance_scale:g}, {free}" if embeds else free


def content_rows(shards: ShardSet, snapshot: Snapshot, rows: Sequence[IndexRow]) -> list[tuple[str, str]]:
    """Rows on what a snapshot holds."""
    size = sum(shards.shard_path(shard).stat().st_size for shard in snapshot.shards)
    return [
        ("samples", f"{len(rows):,}"),
        ("prompts", f"{len({row.prompt_id for row in rows}):,}, {noises(rows)} a prompt"),
        ("shards", f"{counted(len(snapshot.shards), 'tar')}, {size / 1e6:,.1f} MB"),
        ("set (hash of the recipe)", shards.fingerprint),
        ("snapshot (hash of the samples)", snapshot.hash),
        ("format version", str(snapshot.format_version)),
    ]


def noises(rows: Sequence[IndexRow]) -> str:
    """Number of noises for each prompt, in words."""
    counts = sorted(set(Counter(row.prompt_id for row in rows).values()))
    most = counted(counts[-1], "noise")
    return most if len(counts) == 1 else f"{counts[0]} to {most}"


def counted(count: int, thing: str) -> str:
    """A number and its noun, in the plural where needed."""
    return f"{count:,} {thing}{'' if count == 1 else 's'}"


@dataclass(frozen=True)
class ScoreColumn:
    """A column of scores over a snapshot's samples; failed and missing ones have no score."""

    fingerprint: str
    name: str
    hashes: Mapping[str, str]
    rows: Mapping[str, ScoreRow]

    @property
    def scores(self) -> dict[str, float]:
        """Score by key, of the samples that have one."""
        return {key: row.score for key, row in self.rows.items() if row.score is not None}

    def entry(self) -> dict[str, str]:
        """Mean, spread (one standard deviation), range and counts as text."""
        values = np.array(list(self.scores.values()))
        shown = values if len(values) else np.full(1, np.nan)
        measured = {"mean": shown.mean(), "spread": shown.std(), "least": shown.min(), "most": shown.max()}
        figures = {name: "none" if np.isnan(value) else f"{value:.4g}" for name, value in measured.items()}
        counts = {"scored": f"{len(values):,}", "failed": f"{len(self.rows) - len(values):,}"}
        return {"name": self.name, "fingerprint": self.fingerprint, **figures, **counts}


def read_columns(shards: ShardSet, rows: Sequence[IndexRow]) -> list[ScoreColumn]:
    """All columns of scores, sorted by name, with the rows of these samples as far as they are scored."""
    keys, names = {row.key for row in rows}, sorted({row.shard for row in rows})
    found = []
    for fingerprint, record in reward_columns(shards).items():
        done = [shard for shard in names if scores_done(shards, fingerprint, shard)]
        scored = {row.key: row for shard in done for row in score_rows(shards, fingerprint, shard) if row.key in keys}
        found.append(ScoreColumn(fingerprint, record.name, record.hashes, scored))
    return sorted(found, key=lambda column: (column.name, column.fingerprint))
