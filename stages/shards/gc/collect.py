"""`rats shards gc STORE`: shows what no experiment uses, and deletes it with --delete.

In use are:
- a set that a document below the roots names (a run's record, a checkpoint, a report, a published folder: `roots`),
  that a parameter file there would make, or one of whose files is linked from elsewhere (a published folder, DVC's
  cache);
- of such a set: the newest snapshot and every named or linked one with its shards, every shard that holds a sample of
  a parameter file's prompts, and the columns of scores that a parameter file, a record or a published folder has.

A set is deleted whole in one step: renamed, then removed. Lock files of a set that is kept stay: deleting one while
a process waits for it would let two hold it.
"""

from __future__ import annotations

import logging
import os
import shlex
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rats.pipeline.files.atomic import file_lock, remove, storage_errors, sync
from rats.pipeline.files.leftovers import is_dead, temporary_name
from rats.pipeline.files.places import open_place
from rats.pipeline.project import worktrees
from rats.pipeline.store import layout
from rats.pipeline.store.shard_set import ShardSet, is_set
from rats.schemas.errors import CannotCreateError, ConfigError, RetryLaterError
from rats.stages.progress import progress
from rats.stages.shards.gc.contents import Contents, Removal, read
from rats.stages.shards.gc.contents import removals as parts_of
from rats.stages.shards.gc.roots import References, Retained, retained, search

log = logging.getLogger(__name__)

HOUR = 3600.0


@dataclass
class SetDecision:
    """What is deleted of one set (`going`), and why the rest is kept. `whole`: the set is deleted in one step."""

    name: str
    going: list[Removal]
    why: str = ""
    whole: bool = False
    busy: bool = False


def collect(store: str, roots: Sequence[Path], delete: bool = False, older_than: float = 24.0) -> dict[str, Any]:
    """Finds what no experiment below `roots` uses; with `delete`, deletes it.

    Args:
        store: A local store (the folder of sets, not a set).
        roots: Folders below which experiments lie, besides all worktrees of the repository that the store is in.
        delete: Whether to delete. Without it nothing is changed.
        older_than: In hours. Whatever is younger is kept.

    Returns:
        Rows `remove` and `keep`; `files` and `bytes` of what is deleted; `busy`, the sets that another process works
        in, which are not changed; `command`, the command that would delete.

    Raises:
        ConfigError: no local store, no folder at a root, or nothing to be deleted by: no experiment at all.
        StorageError: something below a root cannot be read.
    """
    folder = _local_store(store)
    since = time.time() - older_than * HOUR
    sets = {path.name: read(path) for path in sorted(folder.iterdir()) if layout.is_fingerprint(path.name)}
    found, held = _reached(folder, roots, sets)
    verdicts = [_decide(name, contents, held.get(name), found, since) for name, contents in sets.items()]
    if delete:
        if verdicts and not found.params and all(verdict.whole for verdict in verdicts):
            raise ConfigError(
                f"no experiment below {_words(roots)} names a set of {store}: say where they lie (--root)"
            )
        verdicts = [_delete(folder, verdict, held, found, since) for verdict in verdicts]
    outside = _outside(folder, since)
    if delete:
        _delete_files(folder, outside)
    return _result(store, roots, verdicts, outside, delete, older_than)


def refuse_busy(result: dict[str, Any]) -> None:
    """After a deletion: refuses to succeed silently if sets were skipped because another process works in them.

    Raises:
        RetryLaterError: there is one.
    """
    if result["deleted"] and result["busy"]:
        raise RetryLaterError(
            f"set {result['busy'][0][:12]} is being worked on and was left alone; run the same command later"
        )


def _local_store(text: str) -> Path:
    place = open_place(text).local
    if place is None:
        raise ConfigError(f"{text} is remote: gc works on local stores only, where links and locks say what is in use")
    if not place.is_dir():
        raise ConfigError(f"no folder {text}: name the store, such as `store`")
    if is_set(place):
        raise ConfigError(f"{text} is one set or a published folder: name the store that holds the sets")
    return place


def _reached(folder: Path, roots: Sequence[Path], sets: dict[str, Contents]) -> tuple[References, dict[str, Retained]]:
    recipes = {name: contents.recipe for name, contents in sets.items() if contents.recipe}
    snapshots = {name: {snapshot.hash for snapshot in sets[name].snapshots.values()} for name in recipes}
    columns = {column for name in recipes for column in sets[name].columns}
    everywhere = [*roots, *worktrees(folder)]
    found = search(everywhere, folder, {*sets, *columns, *(word for words in snapshots.values() for word in words)})
    return found, retained(found, recipes, snapshots)


def _decide(name: str, contents: Contents, held: Retained | None, found: References, since: float) -> SetDecision:
    """What is deleted of one set."""
    if held is None:
        return SetDecision(name, [], f"left alone: {contents.problem}")
    if lock := _lock_held(contents):
        return SetDecision(name, [], f"left alone: somebody works in it now ({lock})", busy=True)
    why = [*held.by, *(["linked from elsewhere"] if contents.linked(contents.files) else [])]
    if why:
        return SetDecision(
            name, parts_of(contents, held, found, since), "; ".join(why[:2]) + ("; ..." if why[2:] else "")
        )
    if contents.young(contents.files, since):
        return SetDecision(name, [], "no experiment names it, but it was written to lately (--older-than)")
    files = tuple(contents.files)
    whole = Removal("the whole set", "no experiment names it", files, contents.size(files))
    return SetDecision(name, [whole], whole=True)


def _lock_held(contents: Contents) -> str | None:
    """The name of a lock that a process holds now, if any: it makes a shard, a plan or a snapshot."""
    for name in contents.of(layout.LOCK):
        with suppress(CannotCreateError), file_lock(contents.root / name, 0.0) as free:  # a read-only store has none
            if not free:
                return name
    return None


def _delete(
    folder: Path, verdict: SetDecision, held: dict[str, Retained], found: References, since: float
) -> SetDecision:
    """Deletes parts of one set. They are determined again under its locks, so that no plan or snapshot can be new."""
    if not verdict.going:
        return verdict
    root = folder / verdict.name
    shards = ShardSet.open(root)
    with ExitStack() as locks:
        for name in ("plan", "snapshot"):
            locks.enter_context(shards.lock(name))
        contents = read(root)
        if contents.problem or (verdict.whole and contents.in_use(contents.files, since)):
            return SetDecision(verdict.name, [], "left alone: it has changed since it was looked at")
        if verdict.whole:
            _delete_whole(root)
        else:
            verdict.going = parts_of(contents, held[verdict.name], found, since)
            verdict.busy = not _delete_parts(shards, verdict)
    return verdict


def _delete_whole(root: Path) -> None:
    """Renames the set, so that it is gone at once, then removes it. After a kill, the next gc removes the rest."""
    temporary = root.with_name(temporary_name(root.name))
    with storage_errors(root):
        os.rename(root, temporary)
        sync(root.parent)
        remove(temporary)


def _delete_parts(shards: ShardSet, verdict: SetDecision) -> bool:
    """Deletes the parts in order; returns whether all were. Stops at a shard that another process claims."""
    root = Path(str(shards.root))
    with progress(f"gc {verdict.name[:12]}", sum(len(part.files) for part in verdict.going), "files") as advance:
        for done, part in enumerate(verdict.going):
            with ExitStack() as claim:
                if part.shard and not claim.enter_context(shards.claim(part.shard)):
                    verdict.going = verdict.going[:done]
                    return False
                _delete_files(root, [part])
            advance(len(part.files))
    return True


def _delete_files(root: Path, parts: Sequence[Removal]) -> None:
    """Deletes the files one by one, synced, so that the disk sees them in this order."""
    for name in (name for part in parts for name in part.files):
        path = root / name
        with storage_errors(path):
            remove(path)
            sync(path.parent)
            if layout.REWARD.parts(name):  # the last of its column
                with suppress(OSError):
                    path.parent.rmdir()


def _outside(folder: Path, since: float) -> list[Removal]:
    """Remains of sets that a killed gc had begun to delete."""
    going = []
    for path in sorted(folder.glob(".*.tmp")):
        if not path.is_symlink() and is_dead(path.name, path.lstat().st_mtime, since):
            files = [file for file in path.rglob("*") if not file.is_dir()] if path.is_dir() else [path]
            size = sum(file.lstat().st_size for file in files)
            going.append(Removal(path.name[:20], "left by a killed process", (path.name,), size))
    return going


def _result(
    store: str,
    roots: Sequence[Path],
    verdicts: Sequence[SetDecision],
    outside: list[Removal],
    deleted: bool,
    hours: float,
) -> dict[str, Any]:
    rows = [row for verdict in verdicts for row in _rows(verdict.name, verdict.going)] + list(_rows("", outside))
    flags = [word for root in roots for word in ("--root", str(root))] + ["--older-than", f"{hours:g}"]
    return {
        "store": store,
        "remove": rows,
        "keep": [{"set": v.name, "why": v.why} for v in verdicts if not v.whole],
        "files": sum(row["files"] for row in rows),
        "bytes": sum(row["bytes"] for row in rows),
        "busy": [verdict.name for verdict in verdicts if verdict.busy],
        "deleted": deleted,
        "command": shlex.join(["rats", "shards", "gc", store, *flags, "--delete"]),
    }


def _rows(name: str, removals: Sequence[Removal]) -> Iterator[dict[str, Any]]:
    """One row for everything of a set that is deleted for the same reason."""
    for why in dict.fromkeys(removal.why for removal in removals):
        those = [removal for removal in removals if removal.why == why]
        what = those[0].what + (f" and {len(those) - 1} more" if len(those) > 1 else "")
        files, size = sum(len(removal.files) for removal in those), sum(removal.size for removal in those)
        yield {"set": name, "what": what, "why": why, "files": files, "bytes": size}


def result_lines(result: dict[str, Any]) -> list[str]:
    """The result as lines of text."""
    gone = "deleted" if result["deleted"] else "to delete"
    lines = [
        f"{gone}: {row['set'][:12]}  {row['what']}  ({row['why']})  {_size(row['bytes'])}" for row in result["remove"]
    ]
    lines += [f"keep: {row['set'][:12]}  ({row['why']})" for row in result["keep"]]
    lines.append(f"{gone}: {result['files']} files, {_size(result['bytes'])}")
    if not result["deleted"] and result["files"]:
        lines.append(f"nothing is deleted yet; this would: {result['command']}")
    return lines


def _size(count: float) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def _words(roots: Sequence[Path]) -> str:
    return ", ".join(map(str, roots))
