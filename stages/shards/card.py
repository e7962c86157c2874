"""The dataset card of an exported shard set: what it is, under which license, and how to read it."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from huggingface_hub import DatasetCard, DatasetCardData

from rats.pipeline.store.shard_set import ShardSet
from rats.pipeline.store.shards import read_sample
from rats.schemas.errors import plain
from rats.schemas.manifest import IndexRow, Snapshot
from rats.stages.shards.describe import ScoreColumn, content_rows, noises, read_columns, recipe_rows
from rats.stages.templates.render import Markdown, code, render

_OF_LINKS = "%/:?#[]@!$&'()*+,;=~"
"""What an address is made of besides letters and digits (RFC 3986)."""
SHARDS = "shards/*.tar"
"""The data files, for `load_dataset`: without this pattern it would also read the Parquet files beside them."""


@dataclass(frozen=True)
class LicenseTerms:
    """What the user states on export: the Hub's identifier of a license, and for "other" its name and link."""

    license: str
    license_name: str | None = None
    license_link: str | None = None
    teacher: str | None = None
    title: str | None = None


def dataset_card(shards: ShardSet, snapshot: Snapshot, columns: Sequence[str], terms: LicenseTerms) -> str:
    """README.md of the exported folder.

    Args:
        shards: The set.
        snapshot: Its samples.
        columns: Fingerprints of the columns of scores that go with it.
        terms: Licence and names.
    """
    rows = shards.index(snapshot)
    title = terms.title or f"Teacher trajectories {shards.fingerprint[:12]}"
    context = {
        "card_data": Markdown(_data(title, len(rows), terms).to_yaml()),
        "title": title,
        "teacher": terms.teacher,
        "licence": terms.license_name or terms.license,
        "terms": _terms_link(terms),
        "columns": [_column_data(column) for column in read_columns(shards, rows) if column.fingerprint in columns],
        "recipe": _markdown(recipe_rows(shards.recipe, terms.teacher)),
        "content": _markdown(content_rows(shards, snapshot, rows)),
        **_numbers(shards, rows),
    }
    return str(DatasetCard(render("dataset_card.md.j2", context)))


def _data(title: str, samples: int, terms: LicenseTerms) -> DatasetCardData:
    named: dict[str, Any] = {"license_name": terms.license_name, "license_link": terms.license_link}
    return DatasetCardData(
        license=terms.license,
        pretty_name=title,
        size_categories=size_category(samples),
        task_categories=["text-to-image"],
        tags=["rats", "webdataset", "distillation", "diffusion", "latents"],
        configs=[{"config_name": "default", "data_files": [{"split": "train", "path": SHARDS}]}],
        **{name: value for name, value in named.items() if value},
    )


def _terms_link(terms: LicenseTerms) -> Markdown:
    """A link of angle brackets ends at the first of them, whatever else is in it."""
    url = quote(plain(terms.license_link or ""), safe=_OF_LINKS)
    return Markdown(f"[the terms](<{url}>)" if url else "them")


def size_category(samples: int) -> str:
    """The Hub's size category for a number of samples."""
    bounds = ["1K", "10K", "100K", "1M", "10M", "100M", "1B"]
    power = max(0, int(math.log10(max(samples, 1))) - 2)
    return "n<1K" if power == 0 else f"{bounds[power - 1]}<n<{bounds[power]}" if power < len(bounds) else "other"


def _numbers(shards: ShardSet, rows: Sequence[IndexRow]) -> dict[str, Any]:
    arrays = read_sample(shards, rows[0])
    return {
        "samples": len(rows),
        "prompts": len({row.prompt_id for row in rows}),
        "noises": noises(rows),
        "horizons": [f"{sigma:.6g}" for sigma in shards.recipe.horizons],
        "steps": len(shards.recipe.sigmas) - 1,
        "shape_x": arrays["x"].shape,
        "shape_x0": arrays["x0"].shape,
    }


def _column_data(column: ScoreColumn) -> dict[str, Any]:
    return column.entry() | {"hashes": [(name, code(digest)) for name, digest in sorted(column.hashes.items())]}


def _markdown(rows: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """Cells of a table. Hashes and the negative prompt are shown as code."""
    literal = re.compile(r"[0-9a-f]{40,}")
    return [
        (name, code(value) if literal.fullmatch(value) or name == "negative prompt" else value) for name, value in rows
    ]
