"""`rats shards diff A B`: lists the recipe fields, samples and scores in which two sets differ."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rats.pipeline.files.places import Place
from rats.pipeline.store.scores import reward_columns
from rats.pipeline.store.shard_set import ShardSet
from rats.schemas.manifest import IndexRow, RewardRecord, Snapshot
from rats.schemas.recipe import Recipe

GRIDS = ("sigmas", "horizons")
LISTED = 3
"""How many differing keys are listed; the rest is only counted."""


@dataclass(frozen=True)
class Difference:
    """One difference between A and B. A value is None if the set does not have it."""

    field: str
    a: Any
    b: Any
    words: str


def recipe_differences(a: Recipe, b: Recipe) -> list[Difference]:
    """All fields that differ, in the recipe's order; weights and the compute block one by one."""
    here, there = _flat(a), _flat(b)
    names = [*here, *(name for name in there if name not in here)]
    differing = [name for name in names if here.get(name) != there.get(name)]
    return [
        Difference(name, here.get(name), there.get(name), _in_words(name, here.get(name), there.get(name)))
        for name in differing
    ]


def sample_differences(a: Collection[IndexRow], b: Collection[IndexRow]) -> list[Difference]:
    """Samples by key and bytes, then prompts and noises; empty when both hold the same."""
    here, there = ({row.key: row for row in rows} for rows in (a, b))
    both = here.keys() & there.keys()
    other = sorted(key for key in both if here[key].blake3 != there[key].blake3)
    found = list(_only("samples", here.keys(), there.keys()))
    if other:
        words = f"{len(other)} of the {len(both)} samples in both have other bytes: {_few(other)}"
        in_a, in_b = ([{"key": key, "blake3": rows[key].blake3} for key in other] for rows in (here, there))
        found.append(Difference("bytes", in_a, in_b, words))
    prompts = [{row.prompt_id: row.prompt for row in rows} for rows in (a, b)]
    found += _only("prompts", prompts[0].keys(), prompts[1].keys(), prompts[0] | prompts[1])
    noises = [sorted({row.noise_index for row in rows}) for rows in (a, b)]
    if noises[0] != noises[1] and a and b:
        words = f"noises: {_span(noises[0])} in A, {_span(noises[1])} in B"
        found.append(Difference("noises", noises[0], noises[1], words))
    return found


def score_differences(a: Mapping[str, RewardRecord], b: Mapping[str, RewardRecord]) -> list[Difference]:
    """Columns of scores that only one set has, with the hashes that differ from the other's column of that name."""
    found = []
    for side, mine, others in (("A", a, b), ("B", b, a)):
        for column, record in sorted(mine.items(), key=lambda item: (item[1].name, item[0])):
            if column not in others:
                words = f"scores by {record.name} ({column[:12]}) only in {side}{_apart(record, others)}"
                value = {"column": column, **record.model_dump()}
                in_a, in_b = (value, None) if side == "A" else (None, value)
                found.append(Difference("scores", in_a, in_b, words))
    return found


def compare_sets(a: Place, b: Place, snapshot_a: int | None = None, snapshot_b: int | None = None) -> dict[str, Any]:
    """Compares two sets by their documents; no sample is read (`rats shards verify` does that).

    Args:
        a: A set, in a store or published.
        b: Another.
        snapshot_a: The number of A's snapshot that is compared, its newest by default.
        snapshot_b: The same of B.

    Returns:
        `same`; what `a` and `b` are; `differences`, each a `Difference`; `samples_in_both`.

    Raises:
        DataError: no shard set, no such snapshot, or a damaged one.
    """
    one, two = _Side.open(a, snapshot_a), _Side.open(b, snapshot_b)
    found = recipe_differences(one.shards.recipe, two.shards.recipe)
    found += _snapshots(one, two)
    found += sample_differences(one.rows, two.rows)
    found += score_differences(reward_columns(one.shards), reward_columns(two.shards))
    both = {row.key for row in one.rows} & {row.key for row in two.rows}
    return {
        "same": not found,
        "a": one.describe(),
        "b": two.describe(),
        "samples_in_both": len(both),
        "differences": [vars(difference) for difference in found],
    }


def diff_lines(result: Mapping[str, Any]) -> list[str]:
    """The result as lines of text."""
    lines = [
        "{}: {path}, recipe {}, {}".format(
            name, side["fingerprint"][:12], _snapshot_words(side["snapshot"], side["samples"]), **side
        )
        for name, side in (("A", result["a"]), ("B", result["b"]))
    ]
    if result["same"]:
        return [*lines, "they are the same: one recipe, the same samples byte for byte, the same columns of scores"]
    if result["a"]["fingerprint"] == result["b"]["fingerprint"]:
        lines.append("one recipe")
    return [*lines, *(difference["words"] for difference in result["differences"])]


@dataclass(frozen=True)
class _Side:
    shards: ShardSet
    snapshot: Snapshot | None
    rows: Sequence[IndexRow]

    @classmethod
    def open(cls, folder: Place, number: int | None) -> _Side:
        """The set with one snapshot. A set without snapshots can still be compared by its recipe."""
        shards = ShardSet.open(folder)
        there = number is not None or bool(shards.snapshots())
        snapshot = shards.snapshot(number) if there else None
        return cls(shards, snapshot, shards.index(snapshot) if snapshot else [])

    def describe(self) -> dict[str, Any]:
        return {
            "path": str(self.shards.root),
            "fingerprint": self.shards.fingerprint,
            "snapshot": self.snapshot.number if self.snapshot else None,
            "snapshot_hash": self.snapshot.hash if self.snapshot else None,
            "samples": len(self.rows),
        }


def _snapshots(one: _Side, two: _Side) -> list[Difference]:
    """A difference if just one set has no snapshot. Two snapshots are compared sample by sample elsewhere."""
    numbers = [side.snapshot.number if side.snapshot else None for side in (one, two)]
    missing = [name for name, number in zip("AB", numbers, strict=True) if number is None]
    words = f"{' and '.join(missing)} {'have' if len(missing) > 1 else 'has'} no snapshot yet"
    return [Difference("snapshot", numbers[0], numbers[1], words)] if len(missing) == 1 else []


def _snapshot_words(number: int | None, samples: int) -> str:
    return "no snapshot" if number is None else f"snapshot {number}, {samples} samples"


def _flat(recipe: Recipe) -> dict[str, Any]:
    """Field by dotted name: "guidance_scale", "weights.transformer", "compute.threads"."""
    found = {}
    for name, value in recipe.model_dump().items():
        found.update(
            {f"{name}.{key}": part for key, part in value.items()} if isinstance(value, dict) else {name: value}
        )
    return found


def _in_words(name: str, a: Any, b: Any) -> str:
    if name in GRIDS:
        return _grids(name, a, b)
    block, _, part = name.partition(".")
    label = {"weights": f"weights of {part}", "compute": f"compute: {part}"}.get(block, name)
    return f"{label}: {_short(a)} in A, {_short(b)} in B"


def _short(value: Any) -> str:
    """A hash by its first digits, a text in quotes."""
    if isinstance(value, str) and len(value) >= 40 and " " not in value:
        return value[:12]
    return "none" if value is None else repr(value) if isinstance(value, str) else str(value)


def _grids(name: str, a: Sequence[float], b: Sequence[float]) -> str:
    counts = [len(grid) - (name == "sigmas") for grid in (a, b)]  # n steps have n + 1 sigmas
    unit = " steps" if name == "sigmas" else ""
    if counts[0] != counts[1]:
        return f"{name}: {counts[0]}{unit} in A, {counts[1]} in B"
    places = [i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y]
    x, y = (f"{grid[places[0]]:.4f}" for grid in (a, b))
    if x == y:
        x, y = (repr(grid[places[0]]) for grid in (a, b))
    return f"{name}: {counts[0]}{unit} in both, {len(places)} differ, the first at {places[0]}: {x} in A, {y} in B"


def _only(
    what: str, a: Collection[str], b: Collection[str], names: Mapping[str, str] | None = None
) -> Iterator[Difference]:
    """What is only in one set: at most one difference for each side."""
    for side, here, there in (("A", a, b), ("B", b, a)):
        if only := sorted(set(here) - set(there)):
            shown = [repr(names[key]) for key in only] if names else only
            words = f"{len(only)} {what} only in {side}: {_few(shown)}"
            in_a, in_b = (only, []) if side == "A" else ([], only)
            yield Difference(what, in_a, in_b, words)


def _few(names: Sequence[str]) -> str:
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + more


def _span(numbers: Sequence[int]) -> str:
    """Noise indexes, "0 to 3" where none is left out."""
    if len(numbers) > 1 and len(numbers) == numbers[-1] - numbers[0] + 1:
        return f"{numbers[0]} to {numbers[-1]}"
    return _few([str(number) for number in numbers])


def _apart(record: RewardRecord, others: Mapping[str, RewardRecord]) -> str:
    """Names the hashes in which a column differs from the other set's column of that name; empty if it has none."""
    named = [other for other in others.values() if other.name == record.name]
    if not named:
        return ""
    parts = sorted({*record.hashes, *named[-1].hashes})
    other = [part for part in parts if record.hashes.get(part) != named[-1].hashes.get(part)]
    pairs = (f"{part} {_short(record.hashes.get(part))}, there {_short(named[-1].hashes.get(part))}" for part in other)
    return f": {'; '.join(pairs)}"
