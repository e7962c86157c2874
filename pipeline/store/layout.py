"""The files of a shard set: their names, which document holds their hash, and the order of writing and deleting.

A set is `<store>/<fingerprint>/`. It holds the kinds of file below and nothing else but the temporary files of writers
(`pipeline.files.leftovers`). This module only handles names; its callers read, write and delete.

    SHARD.name(shard="rollout-000003")             "shards/rollout-000003.tar"
    SHARD.parts("shards/rollout-000003.tar")       {"shard": "rollout-000003"}

A new kind of file needs a line here and a place in `KINDS` and `DELETED`. A test compares them with what a rollout
writes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from string import Formatter
from typing import NamedTuple

from rats.schemas.manifest import HASH_PATTERN, SHARD_PATTERN, Snapshot

_PARTS = {
    "shard": (SHARD_PATTERN, "rollout-*"),
    "number": ("[0-9]{4}", "[0-9]" * 4),
    "prompt": (HASH_PATTERN, "*"),
    "reward": (HASH_PATTERN, "*"),
    "lock": ("[^/]+", "*"),
}
"""The parts of names: each as a regular expression and as a file system's wildcard."""


@dataclass(frozen=True)
class Kind:
    """One kind of file.

    Attributes:
        template: Its name below the set's folder, with the varying parts in braces.
        published: Whether a published folder has it. The other kinds are of use only in a store.
        vouched_by: The kind of document that holds this file's hash. A kind without one has its own seal, or its name
            is its hash.
    """

    template: str
    published: bool = True
    vouched_by: Kind | None = None

    def name(self, **parts: str | int) -> str:
        """The name of the file with these parts."""
        return self.template.format(**parts)

    def parts(self, name: str) -> dict[str, str] | None:
        """The parts of such a file's name; None for any other name."""
        match = self._pattern.fullmatch(name)
        return match and match.groupdict()

    def parts_of_alike(self, name: str) -> dict[str, str] | None:
        """As `parts`, for every name in this folder with this ending, even a wrong one, which is damage."""
        match = self._alike.fullmatch(name)
        return match and match.groupdict()

    def wildcard(self, **parts: str | int) -> str:
        """A wildcard pattern for such files; `parts` are the known parts of the name."""
        return self.template.format(**{part: wildcard for part, (_, wildcard) in _PARTS.items()} | parts)

    @property
    def folder(self) -> str:
        """The template of its folder; empty for the set's own."""
        return self.template.rpartition("/")[0]

    @property
    def top(self) -> str:
        """The first part of its name's path."""
        return self.template.partition("/")[0]

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        return self._expression({part: expression for part, (expression, _) in _PARTS.items()})

    @cached_property
    def _alike(self) -> re.Pattern[str]:
        return self._expression(dict.fromkeys(_PARTS, "[^/]*"))

    def _expression(self, expressions: dict[str, str]) -> re.Pattern[str]:
        text = ""
        for literal, part, _, _ in Formatter().parse(self.template):
            text += re.escape(literal) + (f"(?P<{part}>{expressions[part]})" if part else "")
        return re.compile(text, re.DOTALL)


RECIPE = Kind("recipe.json")
LOCK = Kind("locks/{lock}.lock", published=False)
REWARD = Kind("scores/{reward}/reward.json")
PLAN = Kind("shards/{shard}.plan.json", published=False)
EMBEDDING = Kind("embeddings/{prompt}.safetensors")
DONE = Kind("shards/{shard}.done.json")
SHARD = Kind("shards/{shard}.tar", vouched_by=DONE)
SCORES_DONE = Kind("scores/{reward}/{shard}.done.json")
SCORES = Kind("scores/{reward}/{shard}.parquet", vouched_by=SCORES_DONE)
MANIFEST = Kind("manifests/{number:0>4}.json")
INDEX = Kind("index/{number:0>4}.parquet", vouched_by=MANIFEST)

KINDS = (
    RECIPE,
    REWARD,
    LOCK,
    # what a shard will hold is decided before its first sample is made
    PLAN,
    # a rollout encodes only the prompts of shards that it makes
    EMBEDDING,
    # whoever is killed between a file and the document that vouches for it leaves nothing that is believed
    SHARD,
    DONE,
    SCORES,
    SCORES_DONE,
    INDEX,
    MANIFEST,
)
"""All kinds, in the order in which a rollout writes them."""

DELETED = (
    # what vouches for something goes before it
    MANIFEST,
    INDEX,
    # scores of a shard that is not there are an error, so they go before their shard
    SCORES_DONE,
    SCORES,
    # a table of scores without its column's record is an error
    REWARD,
    # a finished shard without a plan would be planned again, under a number that is taken
    DONE,
    PLAN,
    SHARD,
    # after all shards: a rollout encodes only what it samples
    EMBEDDING,
)
"""The kinds that may be deleted from a set in use, in this order: after a kill in between, the set still opens,
verifies and resumes. Locks are kept: if one were deleted while a process waits for it, two could hold it."""

TOPS = tuple(dict.fromkeys(kind.top for kind in KINDS if kind.published))
"""Top-level names of a published folder."""

_BY_TOP = {top: tuple(kind for kind in KINDS if kind.top == top) for top in {kind.top for kind in KINDS}}
"""Kinds by folder. A set has many files, so a name is compared only with the few kinds of its folder."""


class File(NamedTuple):
    """A name with its kind and its parts."""

    kind: Kind
    parts: dict[str, str]


def understand(name: str) -> File | None:
    """Kind and parts of a name below a set's folder; None if it is no file of a set."""
    for kind in _BY_TOP.get(name.partition("/")[0], ()):
        if (parts := kind.parts(name)) is not None:
            return File(kind, parts)
    return None


def to_delete(names: Iterable[str]) -> list[str]:
    """Those names whose kind may be deleted, in the order of deletion."""
    found = [(DELETED.index(file.kind), name) for name in names if (file := understand(name))]
    return [name for _, name in sorted(found)]


def index_of(snapshot: Snapshot) -> str:
    """The name of a snapshot's index, which its manifest gives."""
    return f"{INDEX.folder}/{snapshot.index}"


def shard_name(number: int) -> str:
    """The name of the shard with this number."""
    return f"rollout-{number:06d}"


def is_shard(name: str) -> bool:
    """Whether this is a shard's name."""
    return re.fullmatch(SHARD_PATTERN, name) is not None


def shard_number(shard: str) -> int:
    """The number in a shard's name."""
    return int(shard.rpartition("-")[2])


def is_fingerprint(name: str) -> bool:
    """Whether this is the name of a set in a store: 64 hex digits."""
    return re.fullmatch(HASH_PATTERN, name) is not None
