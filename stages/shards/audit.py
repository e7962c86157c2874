"""What `verify` knows while it reads a set: the files that there are, the damage found, the bytes read."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import TypeVar

from rats.pipeline.files.places import Place
from rats.pipeline.store import layout
from rats.pipeline.store.shard_set import ShardSet
from rats.schemas.errors import DataError, StorageError, remedy

log = logging.getLogger(__name__)

MB = 1_000_000
Checked = TypeVar("Checked")


@dataclass
class Audit:
    """The state of a verification: what is read, and what was found.

    Attributes:
        shards: The set.
        files: Size by name below the set's folder.
        damage: What is damaged or missing, in the order found, each text once.
        unfinished: Work that is not finished.
        rows: Hashes of the index rows of all whole shards.
        read: Bytes.
    """

    shards: ShardSet
    files: dict[str, int]
    advance: Callable[[int], None] = lambda count: None
    damage: dict[str, None] = field(default_factory=dict)
    unfinished: list[str] = field(default_factory=list)
    rows: set[int] = field(default_factory=set)
    read: int = 0

    @cached_property
    def published(self) -> bool:
        """Whether it is a published folder: in a store shards have plans, and the folder's name is the fingerprint."""
        named = self.shards.root.name == self.shards.fingerprint
        return not named and not self.found(layout.PLAN, "shard")

    def found(self, kind: layout.Kind, part: str, **known: str) -> list[str]:
        """One part of the names of all files of a kind, sorted; only of those whose other parts are `known`."""
        values = []
        for name in self.files:
            parts = kind.parts_of_alike(name)
            if parts is not None and parts.items() >= known.items():
                values.append(parts[part])
        return sorted(values)

    def look(self, check: Callable[[], Checked], *names: str, way_out: str = "") -> Checked | None:
        """What `check` returns, or None after reporting damage. `names`: the files that it reads, for the progress."""
        try:
            with remedy(way_out):
                return check()
        except DataError as error:
            self.report(str(error))
        except StorageError as error:
            if self.shards.root.local is None:  # a network that is down is no damage
                raise
            self.report(str(error))
        finally:
            self._count(sum(self.files.get(name, 0) for name in names))
        return None

    def report(self, text: str) -> None:
        """Records one damaged or missing file."""
        if text not in self.damage:
            log.error("%s", text)
        self.damage[text] = None

    def missing(self, name: str, way_out: str) -> bool:
        """Whether the file is missing, which is then reported."""
        if name in self.files:
            return False
        self.report(f"{self.shards.root / name} is missing; {way_out}")
        return True

    def _count(self, size: int) -> None:
        """Progress is in whole MB; the rest counts with the next file."""
        before = self.read // MB
        self.read += size
        if step := self.read // MB - before:
            self.advance(step)


def listing(root: Place) -> dict[str, int]:
    """Sizes by name of all files to read. Hidden ones (temporary files of writers) and locks are left out."""
    found = {layout.RECIPE.name(): root.sizes()[layout.RECIPE.name()]}
    for folder in _folders(root):
        for name, size in (root / folder).sizes().items():
            if not name.startswith("."):
                found[f"{folder}/{name}"] = size
    return found


def _folders(root: Place) -> list[str]:
    """Folders of the files to read, with those of all columns of scores."""
    folders = {kind.folder for kind in layout.KINDS if kind not in (layout.RECIPE, layout.LOCK)}
    folders.remove(layout.REWARD.folder)  # a pattern: in its place the folders that there are
    scores = root / layout.REWARD.top
    if scores.is_dir():
        folders.update(f"{scores.name}/{path.name}" for path in scores.iterdir())
    return sorted(folders)
