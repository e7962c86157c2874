"""The contents of one set, and which parts of it are deleted. This module only reads.

`layout.DELETED` has the order of deletion: after a kill in between, the set still opens, verifies and resumes.
"""

from __future__ import annotations

import os
import stat
from collections import defaultdict
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from rats.pipeline.files.atomic import storage_errors
from rats.pipeline.files.leftovers import is_dead, is_temporary
from rats.pipeline.store import layout
from rats.pipeline.store.documents import read_document
from rats.pipeline.store.scores import reward_columns
from rats.pipeline.store.shard_set import ROLLOUT, ShardSet
from rats.schemas.errors import RatsError, remedy
from rats.schemas.manifest import RewardRecord, ShardDone, ShardPlan, Snapshot
from rats.schemas.recipe import Recipe
from rats.stages.shards.gc.roots import References, Retained


@dataclass(frozen=True)
class Removal:
    """Files of a set that are deleted together, in this order. `shard`: the shard that must be claimed for it."""

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
        files: All files; links are not followed.
        known: Kind and parts of each name, without temporary files.
        strange: Anything that is no file of a set, links included.
        recipe: None if the set cannot be read. Such a set is not changed, and `problem` says why.
    """

    root: Path
    files: dict[str, os.stat_result] = field(default_factory=dict)
    known: dict[str, layout.File] = field(default_factory=dict)
    strange: list[str] = field(default_factory=list)
    recipe: Recipe | None = None
    problem: str = ""
    snapshots: dict[int, Snapshot] = field(default_factory=dict)
    plans: dict[str, ShardPlan] = field(default_factory=dict)
    done: dict[str, ShardDone] = field(default_factory=dict)
    columns: dict[str, RewardRecord] = field(default_factory=dict)

    def of(self, kind: layout.Kind) -> list[str]:
        """Names of all files of a kind, sorted."""
        return sorted(name for name, file in self.known.items() if file.kind is kind)

    def grouped(self, part: str) -> dict[str, list[str]]:
        """Names grouped by one part, such as all files of each shard or of each column of scores."""
        groups: dict[str, list[str]] = defaultdict(list)
        for name, file in self.known.items():
            if part in file.parts:
                groups[file.parts[part]].append(name)
        return groups

    def size(self, names: Iterable[str]) -> int:
        """Size of these files in bytes."""
        return sum(self.files[name].st_size for name in names)

    def linked(self, names: Iterable[str]) -> bool:
        """Whether a file has another name elsewhere: in a published folder, or in DVC's cache."""
        return any(self.files[name].st_nlink > 1 for name in names)

    def young(self, names: Iterable[str], since: float) -> bool:
        """Whether a file was written after `since`. Locks do not count, since opening one counts as writing."""
        young = (name for name in names if self.files[name].st_mtime > since)
        return any(name not in self.known or self.known[name].kind is not layout.LOCK for name in young)

    def in_use(self, names: Collection[str], since: float) -> bool:
        """Whether a file has another link, or is young."""
        return self.linked(names) or self.young(names, since)

    def removal(self, what: str, why: str, names: Iterable[str], shard: str | None = None) -> Removal:
        """A removal of these files, in the order of deletion."""
        files = tuple(layout.to_delete(names))
        return Removal(what, why, files, self.size(files), shard)


def read(root: Path) -> Contents:
    """A set as far as it can be read."""
    if root.is_symlink() or not root.is_dir():
        return Contents(root, problem="it is a link or a file")
    with storage_errors(root):
        contents = read_files(root)
    if contents.strange:
        contents.problem = f"it holds {contents.strange[0]}, which is not rats' own"
        return contents
    try:
        _read_documents(contents, ShardSet.open(root))
    except RatsError as error:
        contents.problem = f"it cannot be read, see `rats shards verify`: {error}"
    return contents


def read_files(root: Path) -> Contents:
    """Lists the files of a set. Damaged documents do no harm here, since none is read."""
    contents = Contents(root)
    for folder, below, names in os.walk(root, onerror=_raise):
        for name in [*below, *names]:
            path = Path(folder) / name
            about = path.lstat()
            if not stat.S_ISDIR(about.st_mode):
                _note(contents, path.relative_to(root).as_posix(), about)
    return contents


def _note(contents: Contents, name: str, about: os.stat_result) -> None:
    file = layout.understand(name)
    if not stat.S_ISREG(about.st_mode) or (file is None and not is_temporary(Path(name).name)):
        contents.strange.append(name)
        return
    contents.files[name] = about
    if file is not None:
        contents.known[name] = file


def _read_documents(contents: Contents, shards: ShardSet) -> None:
    """Reads the documents into `contents`, the recipe last. Raises DataError if one is damaged."""
    contents.snapshots = {number: shards.snapshot(number) for number in shards.snapshots()}
    contents.columns = reward_columns(shards)
    contents.plans = {plan.shard: plan for plan in shards.plans()}
    with remedy(ROLLOUT):
        # of a shard whose tar is gone too, so that its document can go as well
        documents = [read_document(shards.root / name, ShardDone) for name in contents.of(layout.DONE)]
    contents.done = {done.shard: done for done in documents}
    contents.recipe = shards.recipe


def removals(contents: Contents, held: Retained, found: References, since: float) -> list[Removal]:
    """The parts of a set in use that are deleted, in this order.

    Args:
        contents: The set.
        held: What the experiments keep of it.
        found: What they name, and their parameter files.
        since: What was written after this time (seconds since 1970) is kept.
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


def _snapshots(contents: Contents, found: References, since: float) -> dict[int, Removal]:
    """All snapshots that nothing names, except for the newest."""
    newest, going = max(contents.snapshots, default=0), {}
    for number, snapshot in contents.snapshots.items():
        names = (layout.MANIFEST.name(number=number), layout.index_of(snapshot))
        files = [name for name in names if name in contents.files]
        held = snapshot.hash in found.names or contents.in_use(files, since)
        if number != newest and not held:
            going[number] = contents.removal(f"snapshot {number}", "no experiment names it", files)
    return going


def _shards(
    contents: Contents, kept: Collection[int], keys: Collection[str], scored: Collection[str], since: float
) -> list[Removal]:
    """Finished shards that are in no kept snapshot, with their scores. Unfinished ones are kept: a rollout needs them.

    Shards with one of the `keys`, which a parameter file asks for, are kept. The files `scored` are deleted already.
    """
    used = {shard for number in kept for shard in contents.snapshots[number].shards}
    groups, going = contents.grouped("shard"), []
    for shard, done in sorted(contents.done.items()):
        files = [name for name in groups[shard] if name not in scored]
        held = shard in used or contents.in_use(files, since)
        if not held and not any(row.key in keys for row in done.rows):
            going.append(contents.removal(f"shard {shard}", "in no snapshot that is kept", files, shard))
    return going


def _columns(contents: Contents, found: References, since: float) -> list[Removal]:
    """Columns of rewards that no parameter file has; none without parameter files, since nothing is known then."""
    if not found.params or found.unreadable:
        return []
    named = {reward.name for _, params in found.params for reward in params.rewards}
    groups, going = contents.grouped("reward"), []
    for column, record in sorted(contents.columns.items()):
        held = column in found.names or contents.in_use(groups[column], since)
        if record.name not in named and not held:
            what = f"scores by {record.name} ({column[:12]})"
            going.append(contents.removal(what, "no parameter file has this reward", groups[column]))
    return going


def _embeddings(contents: Contents, going: Collection[str | None], since: float) -> list[Removal]:
    """Embeddings of prompts that are in no kept shard or plan."""
    rows = [row for shard, done in contents.done.items() if shard not in going for row in done.rows]
    samples = [sample for shard, plan in contents.plans.items() if shard not in going for sample in plan.samples]
    prompts = {row.prompt_id for row in rows} | {sample.prompt_id for sample in samples}
    encoded = {name: contents.known[name].parts["prompt"] for name in contents.of(layout.EMBEDDING)}
    files = [name for name, prompt in encoded.items() if prompt not in prompts and not contents.in_use([name], since)]
    what = f"{len(files)} embeddings"
    return [contents.removal(what, "of prompts that no shard is kept of", files)] if files else []


def _loose(contents: Contents, since: float) -> list[Removal]:
    """Files without the document that describes them: a killed writer or a killed deletion left them."""
    indexes = {layout.index_of(snapshot) for snapshot in contents.snapshots.values()}
    files = [name for name in contents.of(layout.INDEX) if name not in indexes]
    for name in contents.of(layout.SHARD):
        if layout.DONE.name(**contents.known[name].parts) not in contents.files:
            files.append(name)
    going = [name for name in files if not contents.in_use([name], since)]
    return [contents.removal(Path(name).name, "no document vouches for it", [name]) for name in going]


def leftovers(contents: Contents, since: float) -> list[Removal]:
    """Temporary files whose writers are dead."""
    going = []
    for name, about in sorted(contents.files.items()):
        short = Path(name).name
        if name not in contents.known and is_dead(short, about.st_mtime, since):
            going.append(Removal(short, "left by a killed writer", (name,), about.st_size))
    return going


def _raise(error: OSError) -> None:
    raise error
