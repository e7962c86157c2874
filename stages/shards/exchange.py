"""`rats shards export` writes a snapshot as a folder for others; `rats shards import` adds such a folder to a store."""

from __future__ import annotations

import logging
import re
from collections import Counter
from pathlib import Path
from typing import Any

from rats.pipeline.files.atomic import atomic_folder
from rats.pipeline.files.places import Place
from rats.pipeline.store import layout
from rats.pipeline.store.publish import publish
from rats.pipeline.store.scores import reward_columns, scores_done
from rats.pipeline.store.shard_set import ROLLOUT, ShardSet
from rats.schemas.errors import CannotCreateError, ConfigError, DataError
from rats.schemas.manifest import Snapshot
from rats.stages.progress import progress
from rats.stages.shards.card import LicenseTerms, dataset_card
from rats.stages.shards.take_in import take_in
from rats.stages.shards.untrusted import plain_view, verify_untrusted

log = logging.getLogger(__name__)

EXPORTED = {
    "README.md",
    ".gitattributes",
    ".cache",  # where the Hub's client notes what it has uploaded
    *layout.TOPS,
}
"""Top-level names of an export. A folder with any other name is not replaced."""

GIT_ATTRIBUTES = "".join(
    f"*.{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in ("tar", "parquet", "safetensors")
)
HUB_ENTRIES, HUB_BYTES = 10_000, 50 * 10**9
"""The Hub's recommended number of files in a folder, and its limit of a file's size."""

NO_LICENSE = (
    "say under which licence the teacher's outputs may be shared: --license ID; outputs of a model can carry its own "
    "terms (for FLUX.1-dev: --license other --license-name NAME --license-link URL), and nobody can use a set without"
)


def export_set(folder: Place, out: Path, terms: LicenseTerms) -> dict[str, Any]:
    """Writes the newest snapshot of a set to `out`, with all complete columns of scores and a dataset card.

    Files are hardlinks, or copies if the file system differs. An older export at `out` is replaced.

    Raises:
        ConfigError: no licence, or one that the Hub does not take.
        DataError: the set is damaged or lacks embeddings.
        CannotCreateError: `out` holds something else than an export.
    """
    check_terms(terms)
    _check_out(out)
    shards = ShardSet.open(folder)
    snapshot = shards.snapshot()
    _check_embeddings(shards, snapshot)
    columns = _complete_columns(shards, snapshot)
    with atomic_folder(out) as target:
        publish(shards, snapshot, target, columns)
        (target / "README.md").write_text(dataset_card(shards, snapshot, columns, terms), encoding="utf-8")
        (target / ".gitattributes").write_text(GIT_ATTRIBUTES)
        sizes = {path: path.stat().st_size for path in target.rglob("*") if path.is_file()}
    _warn_of_limits(sizes)
    return {
        "out": str(out),
        "fingerprint": shards.fingerprint,
        "snapshot": snapshot.hash,
        "samples": snapshot.samples,
        "shards": len(snapshot.shards),
        "rewards": len(columns),
        "files": len(sizes),
        "bytes": sum(sizes.values()),
        "license": terms.license_name or terms.license,
        "push": f"hf upload USER/NAME {out} . --repo-type dataset",
    }


def check_terms(terms: LicenseTerms) -> None:
    """Refuses what the Hub would refuse, before anything is written."""
    if not terms.license:
        raise ConfigError(NO_LICENSE)
    if not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", terms.license):
        raise ConfigError(
            f"--license {terms.license!r} is no identifier of the Hub's: use one such as apache-2.0 or mit"
        )
    if terms.license == "other" and not (terms.license_name and terms.license_link):
        raise ConfigError("--license other says nothing by itself: add --license-name and --license-link")
    for name, value in (("--license-link", terms.license_link), ("--license-name", terms.license_name)):
        if value and len(value.split()) != 1:
            raise ConfigError(f"{name} {value!r} has spaces: the Hub takes one word")


def _check_out(out: Path) -> None:
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    names = {path.name for path in out.iterdir()} if out.is_dir() else set()
    if not {"README.md", layout.RECIPE.name(), layout.MANIFEST.folder} <= names <= EXPORTED:
        raise CannotCreateError(f"{out} holds something else than an export; choose another folder or empty it")


def _check_embeddings(shards: ShardSet, snapshot: Snapshot) -> None:
    prompts = {row.prompt_id for row in shards.index(snapshot)}
    if missing := sorted(prompts - shards.encoded()):
        raise DataError(
            f"{len(missing)} of {len(prompts)} prompts have no embedding, {missing[0][:12]} first; {ROLLOUT}"
        )


def _complete_columns(shards: ShardSet, snapshot: Snapshot) -> list[str]:
    complete = []
    for column, record in reward_columns(shards).items():
        if all(scores_done(shards, column, *shard) for shard in snapshot.shards.items()):
            complete.append(column)
        else:
            log.warning("the scores of %s are not complete and stay behind; run `rats stage score`", record.name)
    return complete


def _warn_of_limits(sizes: dict[Path, int]) -> None:
    for folder, count in Counter(path.parent for path in sizes).items():
        if count > HUB_ENTRIES:
            log.warning("%s has %d files, the Hub advises at most %d in a folder", folder.name, count, HUB_ENTRIES)
    if large := [path.name for path, size in sizes.items() if size > HUB_BYTES]:
        log.warning("the Hub takes no file of over 50 GB, such as %s; lower store.shard_samples", large[0])


def import_set(folder: Path, store: Place) -> dict[str, Any]:
    """Imports an exported or published folder into a store, after every byte of it was verified.

    After a kill, run it again. A second import changes nothing.

    Raises:
        DataError: the folder is damaged or hostile (nothing was imported), or the store has other bytes.
    """
    with plain_view(Path(folder)) as plain:
        with progress("verify", _count(plain), "samples") as advance:
            foreign = verify_untrusted(plain, advance)
        with progress("import", sum(len(part.rows) for part in foreign.parts), "samples") as advance:
            taken = take_in(foreign, store, advance)
    renamed = [f"{old} -> {new}" for old, new in taken.added.items() if old != new]
    return {
        "path": str(taken.shards.root),
        "fingerprint": taken.shards.fingerprint,
        "snapshot": taken.snapshot.number,
        "hash": taken.snapshot.hash,
        "samples": taken.snapshot.samples,
        "shards": len(foreign.parts),
        "shards_added": len(taken.added),
        "renamed": renamed,
        "embeddings_added": taken.embeddings,
        "scores_added": taken.scores,
    }


def _count(folder: Path) -> int:
    """Number of samples to verify, for the progress bar; 0 if the folder is damaged, which is reported later."""
    try:
        shards = ShardSet.open(folder)
        return sum(len(part.rows) for part in shards.finished())
    except DataError:
        return 0
