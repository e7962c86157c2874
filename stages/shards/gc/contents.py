"""What lies in one set of a store, and what of it goes: pure but for reading the documents.

The order of deletion is such that a kill in between leaves a set that opens, verifies and resumes. What vouches for
something goes before it: a manifest before its index, scores before their shard (scores of a shard that is not there
are an error), a shard's document before its plan (a finished shard without a plan would be planned again under a
number that is taken), the tar last. Embeddings go after all shards, since a rollout encodes only what it samples.
"""

from __future__ import annotations

import os
import re
import socket
import stat
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rats.pipeline.store.documents import read_sealed
from rats.pipeline.store.scores import reward_columns
from rats.pipeline.store.shard_set import ROLLOUT, ShardSet
from rats.schemas.manifest import RewardRecord, ShardDone, ShardPlan, Snapshot
from rats.stages.shards.gc.roots import Found, Held

HEX = "[0-9a-f]{64}"
SHARD = "rollout-[0-9]{6}"
OURS = re.compile(
    rf"recipe\.json|shards/{SHARD}\.(tar|done\.json|plan\.json)|(manifests|index)/[0-9]{{4}}\.(json|parquet)"
    rf"|embeddings/{HEX}\.safetensors|scores/{HEX}/(reward\.json|{SHARD}\.(parquet|done\.json))|locks/[^/]+\.lock"
)
LEFTOVER = re.compile(r"\..*\.(?P<host>.*)-(?P<pid>[0-9]+)-[0-9a-f]{8}\.tmp", re.DOTALL)
HOUR = 3600.0
DAY = 24 * HOUR


@dataclass(frozen=True)
class Removal:
    """Some files of a set that go together, in the order in which they are deleted; `shard`: whose claim it takes."""

    what: str
    why: str
    files: tuple[str, ...]
    size: int
    shard: str | None = None


@dataclass
class Contents:
    """A set's files by name below its folder, and its documents.

    Attributes:
        root: The set's folder.
        files: All of them, as they are themselves (no link is followed).
        strange: What is no file of a set, links included: such a set is left alone.
    """

    root: Path
    files: dict[str, os.stat_result] = field(default_factory=dict)
    strange: list[str] = field(default_factory=list)
    snapshots: dict[int, Snapshot] = field(default_factory=dict)
    plans: dict[str, ShardPlan] = field(default_factory=dict)
    done: dict[str, ShardDone] = field(default_factory=dict)
    columns: dict[str, RewardRecord] = field(default_factory=dict)

    def of(self, *prefixes: str) -> list[str]:
        """Names that begin like this, sorted."""
        return sorted(name for name in self.files if name.startswith(prefixes))

    def size(self, names: Iterable[str]) -> int:
        """Bytes."""
        return sum(self.files[name].st_size for name in names)

    def linked(self, names: Iterable[str]) -> bool:
        """Whether a file has another name elsewhere: in a published folder, or in DVC's cache."""
        return any(self.files[name].st_nlink > 1 for name in names)

    def young(self, names: Iterable[str], since: float) -> bool:
        """Whether a file was written after `since`; opening a lock counts as writing it, so locks do not."""
        return any(self.files[name].st_mtime > since for name in names if not name.startswith("locks/"))


def read_files(root: Path) -> Contents:
    """The files alone, which cannot fail over damage."""
    contents = Contents(root)
    for folder, below, names in os.walk(root, onerror=_raise):
        for name in [*below, *names]:
            path = Path(folder) / name
            about, place = path.lstat(), path.relative_to(root).as_posix()
            if stat.S_ISREG(about.st_mode) and (OURS.fullmatch(place) or LEFTOVER.fullmatch(name)):
                contents.files[place] = about
            elif not stat.S_ISDIR(about.st_mode):
                contents.strange.append(place)
    return contents


def read_documents(contents: Contents, shards: ShardSet) -> None:
    """Fill in what the documents say.

    Raises:
        DataError: a damaged one.
    """
    root = contents.root
    contents.snapshots = {number: shards.snapshot(number) for number in shards.snapshots()}
    contents.columns = reward_columns(shards)
    contents.plans = {plan.shard: plan for plan in shards.plans()}
    names = [name for name in contents.of("shards/") if name.endswith(".done.json")]
    documents = [read_sealed(root / name, ShardDone, ROLLOUT) for name in names]
    contents.done = {done.shard: done for done in documents}


def removals(contents: Contents, held: Held, found: Found, since: float) -> list[Removal]:
    """What goes of a set that is reached, in the order in which it goes.

    Args:
        contents: The set.
        held: What the experiments hold of it.
        found: What they name, and their parameter files.
        since: What was written after this time (seconds since 1970) stays.
    """
    if held.everything:
        return leftovers(contents, since)
    going = _snapshots(contents, found, since)
    kept = contents.snapshots.keys() - going.keys()
    columns = _columns(contents, found, since)
    scored = {name for removal in columns for name in removal.files}
    shards = _shards(contents, kept, held.keys, scored, since)
    return [
        *going.values(),
        *_loose(contents, since),
        *columns,
        *shards,
        *_embeddings(contents, {removal.shard for removal in shards}, since),
        *leftovers(contents, since),
    ]


def _snapshots(contents: Contents, found: Found, since: float) -> dict[int, Removal]:
    """All that nothing names, but for the newest."""
    newest, going = max(contents.snapshots, default=0), {}
    for number, snapshot in contents.snapshots.items():
        files = [name for name in (f"manifests/{number:04d}.json", f"index/{snapshot.index}") if name in contents.files]
        held = snapshot.hash in found.names or contents.linked(files) or contents.young(files, since)
        if number != newest and not held:
            going[number] = _removal(contents, f"snapshot {number}", "no experiment names it", files)
    return going


def _shards(
    contents: Contents, kept: Collection[int], keys: Collection[str], scored: Collection[str], since: float
) -> list[Removal]:
    """Finished shards in no kept snapshot, with their scores; unfinished ones are somebody's plan.

    `keys` are wanted by a parameter file; the scores `scored` go with their column.
    """
    used = {shard for number in kept for shard in contents.snapshots[number].shards}
    going = []
    for shard, done in sorted(contents.done.items()):
        scores = [name for name in contents.of("scores/") if name.split("/")[2].startswith(f"{shard}.")]
        scores = [name for name in scores if name not in scored]
        own = [f"shards/{shard}{suffix}" for suffix in (".done.json", ".plan.json", ".tar")]
        files = [*scores, *(name for name in own if name in contents.files)]  # a column's .done.json sorts first
        held = shard in used or contents.linked(files) or contents.young(files, since)
        if not held and not any(row.key in keys for row in done.rows):
            going.append(_removal(contents, f"shard {shard}", "in no snapshot that is kept", files, shard))
    return going


def _columns(contents: Contents, found: Found, since: float) -> list[Removal]:
    """Scores by a reward that no parameter file has; without any parameter file, nobody can say."""
    if not found.params or found.unreadable:
        return []
    named, going = {reward.name for _, params in found.params for reward in params.rewards}, []
    for column, record in sorted(contents.columns.items()):
        files = [name for name in contents.of(f"scores/{column}/") if OURS.fullmatch(name)]
        files.sort(key=lambda name: name.endswith("reward.json"))
        held = column in found.names or contents.linked(files) or contents.young(files, since)
        if record.name not in named and not held:
            what = f"scores by {record.name} ({column[:12]})"
            going.append(_removal(contents, what, "no parameter file has this reward", files))
    return going


def _embeddings(contents: Contents, going: Collection[str | None], since: float) -> list[Removal]:
    """Those of prompts that no shard holds or will hold."""
    rows = [row for shard, done in contents.done.items() if shard not in going for row in done.rows]
    samples = [sample for shard, plan in contents.plans.items() if shard not in going for sample in plan.samples]
    prompts = {row.prompt_id for row in rows} | {sample.prompt_id for sample in samples}
    files = [name for name in contents.of("embeddings/") if Path(name).name.partition(".")[0] not in prompts]
    files = [name for name in files if OURS.fullmatch(name)]
    files = [name for name in files if not contents.linked([name]) and not contents.young([name], since)]
    what = f"{len(files)} embeddings"
    return [_removal(contents, what, "of prompts that no shard is kept of", files)] if files else []


def _loose(contents: Contents, since: float) -> list[Removal]:
    """What a killed writer, or a killed deletion, has left without the document that vouches for it."""
    indexes = {f"index/{snapshot.index}" for snapshot in contents.snapshots.values()}
    files = [name for name in contents.of("index/") if name not in indexes]
    for name in contents.of("shards/"):
        if name.endswith(".tar") and name.removesuffix(".tar") + ".done.json" not in contents.files:
            files.append(name)
    going = [name for name in files if OURS.fullmatch(name)]
    going = [name for name in going if not contents.linked([name]) and not contents.young([name], since)]
    return [_removal(contents, Path(name).name, "no document vouches for it", [name]) for name in going]


def leftovers(contents: Contents, since: float) -> list[Removal]:
    """Temporary files of writers that are dead."""
    files = [name for name in sorted(contents.files) if LEFTOVER.fullmatch(Path(name).name)]
    going = [name for name in files if is_dead(Path(name).name, contents.files[name].st_mtime, since)]
    return [_removal(contents, Path(name).name, "left by a killed writer", [name]) for name in going]


def leftover_name(name: str) -> str:
    """A name under which a dying process leaves what it was deleting."""
    return f".{name}.{socket.gethostname()}-{os.getpid()}-{os.urandom(4).hex()}.tmp"


def is_dead(name: str, written: float, since: float) -> bool:
    """Whether a temporary file's writer is gone; one on another machine is when it was silent for a day more."""
    match = LEFTOVER.fullmatch(name)
    if match is None or written > since:
        return False
    if match["host"] != socket.gethostname():
        return written < since - DAY
    try:
        os.kill(int(match["pid"]), 0)
    except ProcessLookupError:
        return True
    except (PermissionError, OverflowError):
        pass
    return False


def _removal(contents: Contents, what: str, why: str, files: Sequence[str], shard: str | None = None) -> Removal:
    return Removal(what, why, tuple(files), contents.size(files), shard)


def _raise(error: OSError) -> None:
    raise error
