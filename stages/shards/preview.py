"""`rats shards preview`: one offline HTML page that shows what a shard set holds. Runs the decoder only."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from rats.pipeline.families.models import FamilyDecoder
from rats.pipeline.families.open import Model
from rats.pipeline.files.atomic import atomic_write
from rats.pipeline.files.places import Place
from rats.pipeline.machine import threads
from rats.pipeline.store.shard_set import ShardSet
from rats.pipeline.store.shards import read_sample
from rats.schemas.errors import ConfigError
from rats.schemas.horizons import evenly
from rats.schemas.manifest import IndexRow
from rats.schemas.params import Params
from rats.schemas.recipe import Recipe
from rats.stages.measure.pictures import Picture, choose, to_picture
from rats.stages.progress import progress
from rats.stages.report import figures
from rats.stages.shards.describe import ScoreColumn, content_rows, counted, noises, read_columns, recipe_rows
from rats.stages.templates.render import PageData, plot, png, render

STRIPS = 4
STRIP_SIDE = 124
"""Twice the width at which a strip's pictures are shown."""
MOST_HORIZONS = 16
"""The most horizons in a strip: 50 would be too long to look at."""
EXTREMES = 6
BATCH = 8

Latents = NDArray[np.float16]


def preview(folder: Place, out: Path, params: Params, count: int, seed: int) -> dict[str, Any]:
    """Write the page of a set's newest snapshot to `out`.

    Args:
        folder: A shard set or a published folder.
        out: The page.
        params: Names the model, whose VAE is used, and the device. Resolution and horizons are those of the set.
        count: Number of samples, of as many prompts as possible; the first few are shown at all horizons.
        seed: Selects the samples.

    Raises:
        DataError: no shard set, no snapshot, or damage.
        ConfigError: the VAE of `params` is not the set's.
    """
    shards = ShardSet.open(folder)
    snapshot = shards.snapshot()
    rows = shards.index(snapshot)
    prompts = [row.prompt_id for row in rows]
    chosen = [rows[i] for i in choose(prompts, prompts, count, seed).side]
    columns = read_columns(shards, rows)
    decoder = _open(params, shards, rows[0])
    frames = decoder.settings.seen_frames
    with threads(params.compute.threads):
        gallery = _gallery(decoder, shards, chosen, columns)
    where = f"{noises(rows)} a prompt, {shards.recipe.width} x {shards.recipe.height} px"
    where += f", {frames} of {shards.recipe.frames} frames shown" if frames > 1 else ""
    context = {
        "title": f"Shard set {shards.fingerprint[:12]}",
        "lead": f"{counted(len(rows), 'sample')} of {counted(len(set(prompts)), 'prompt')}, {where}.",
        "note": f"{counted(len(chosen), 'sample')} drawn by lot (seed {seed}), one a prompt as far as they go.",
        "samples": [gallery.entry(row) for row in chosen],
        **_strips(gallery, shards.recipe, chosen),
        **_scores(gallery, columns, rows),
        "content": [*content_rows(shards, snapshot, rows), ("decoded with", params.model.path)],
        "recipe": recipe_rows(shards.recipe, None),
        "frames": frames,
        "width": shards.recipe.width * frames,
        "height": shards.recipe.height,
        "few": EXTREMES,
    }
    atomic_write(out, render("preview.html.j2", context).encode())
    return {"out": str(out), "samples": len(chosen), "pictures": gallery.count, "rewards": len(columns)}


@dataclass
class Gallery:
    """Decoded pictures by key: the final ones, and strips of predicted clean latents and of states."""

    columns: Sequence[ScoreColumn]
    finals: dict[str, Picture]
    strips: dict[str, tuple[list[Picture], list[Picture]]]

    @property
    def count(self) -> int:
        """Number of all pictures."""
        return len(self.finals) + sum(len(clean) + len(states) for clean, states in self.strips.values())

    def entry(self, row: IndexRow) -> PageData:
        """A sample for the page's template, with all its scores."""
        found = [(column.name, column.rows.get(row.key)) for column in self.columns]
        scores = [
            {"name": name, "failed": score.score is None, "value": _figure(score.score)}
            for name, score in found
            if score
        ]
        return {"source": png(self.finals[row.key]), "prompt": row.prompt, "noise": row.noise_index, "scores": scores}


def _figure(score: float | None) -> str:
    return "failed" if score is None else f"{score:.4g}"


def _open(params: Params, shards: ShardSet, row: IndexRow) -> FamilyDecoder:
    """The decoder at the set's resolution."""
    size = {name: getattr(shards.recipe, name) for name in ("height", "width", "frames")}
    decoder = Model(params.model, params.teacher.model_copy(update=size), params.compute).open_decoder()
    stored, expected = read_sample(shards, row)["x"].shape[1:], decoder.latent_shape()
    if stored != expected:
        raise ConfigError(
            f"the latents of {shards.root} are {stored}, the VAE of {params.model.path} takes {expected}; "
            "name the model of this set with --params or --set model.path=..."
        )
    return decoder


def _gallery(
    decoder: FamilyDecoder, shards: ShardSet, chosen: Sequence[IndexRow], columns: Sequence[ScoreColumn]
) -> Gallery:
    gallery = Gallery(columns, {}, {})
    by_key = {row.key: row for row in shards.index(shards.snapshot())}
    extremes = [key for column in columns for keys in ends(column.scores, EXTREMES) for key in keys]
    keys = list(dict.fromkeys([row.key for row in chosen] + extremes))
    kept = kept_rows(len(shards.recipe.horizons))
    strips = [row.key for row in chosen[:STRIPS]]
    with progress("preview", len(keys) + len(strips) * (2 * len(kept) - 1), "pictures") as advance:
        for start in range(0, len(keys), BATCH):
            part = keys[start : start + BATCH]
            finals = np.stack([read_sample(shards, by_key[key])["x"][-1] for key in part])
            gallery.finals.update(zip(part, _decode(decoder, finals), strict=True))
            advance(len(part))
        for key in strips:
            arrays = read_sample(shards, by_key[key])
            frames = decoder.settings.seen_frames
            clean = [_shrunk(p, frames) for p in _decode(decoder, arrays["x0"][kept[:-1]])]
            states = [_shrunk(p, frames) for p in _decode(decoder, arrays["x"][kept])]
            gallery.strips[key] = ([*clean, states[-1]], states)
            advance(2 * len(kept) - 1)
    return gallery


@torch.no_grad()
def _decode(decoder: FamilyDecoder, latents_BTC: Latents) -> Iterator[Picture]:
    for start in range(0, len(latents_BTC), BATCH):
        x_BTC = torch.from_numpy(latents_BTC[start : start + BATCH]).float()
        yield from (to_picture(image) for image in decoder.decode(x_BTC).cpu().numpy())


def _shrunk(picture: Picture, frames: int) -> Picture:
    image = Image.fromarray(picture)
    image.thumbnail((STRIP_SIDE * frames, STRIP_SIDE), Image.Resampling.LANCZOS)
    return np.asarray(image)


def kept_rows(horizons: int) -> list[int]:
    """Rows of the horizons that a strip shows: all, or evenly spaced ones with both ends."""
    return evenly(horizons, MOST_HORIZONS)


def ends(scores: dict[str, float], count: int) -> tuple[list[str], list[str]]:
    """Keys of the best and of the worst samples, each at most half of all; the most extreme ones come first."""
    order = sorted(scores, key=lambda key: (-scores[key], key))
    few = min(count, len(order) // 2)
    return order[:few], order[::-1][:few]


def _strips(gallery: Gallery, recipe: Recipe, chosen: Sequence[IndexRow]) -> PageData:
    kept = kept_rows(len(recipe.horizons))
    left_out = len(recipe.horizons) - len(kept)
    strips = [
        {
            "prompt": row.prompt,
            "noise": row.noise_index,
            "clean": [png(picture) for picture in gallery.strips[row.key][0]],
            "states": [png(picture) for picture in gallery.strips[row.key][1]],
        }
        for row in chosen[:STRIPS]
    ]
    return {
        "strips": strips,
        "sigmas": [f"{recipe.horizons[row]:.3g}" for row in kept],
        "thinned": f"{left_out} of {len(recipe.horizons)} horizons are left out." if left_out else "",
    }


def _scores(gallery: Gallery, columns: Sequence[ScoreColumn], rows: Sequence[IndexRow]) -> PageData:
    by_key = {row.key: row for row in rows}
    entries = []
    for column in columns:
        best, worst = ([gallery.entry(by_key[key]) for key in keys] for keys in ends(column.scores, EXTREMES))
        absent = f"{len(rows) - len(column.rows):,}"
        entries.append(column.entry() | {"absent": absent, "best": best, "worst": worst})
    drawn = [(column.name, list(column.scores.values())) for column in columns if column.scores]
    if not drawn:
        return {"columns": entries, "histograms": None}
    panels = figures.histograms(drawn)
    return {"columns": entries, "histograms": plot(panels.svgs, panels.legend, "histograms of the scores")}
