"""Prompts that leave much open: a name, sometimes with a designer's style, sometimes only keywords."""

from __future__ import annotations

import csv
import itertools
from collections import Counter
from pathlib import Path

import numpy as np

from mini.concepts import CONCEPTS, STYLES, Concept, is_held_out

BARE = {
    *("cherries", "grapes", "blueberries", "fries", "broccoli", "corn", "garlic", "bread", "popcorn", "candy"),
    *("honey", "coffee", "beer", "wine", "cheese", "bubble tea", "yarn", "sunglasses", "socks", "lightning"),
}
"""Names that take no article."""


def named(concept: Concept) -> str:
    """`a fox`, `an owl`, `cherries`."""
    if concept.name in BARE:
        return concept.name
    return f"{'an' if concept.name[0] in 'aeiou' else 'a'} {concept.name}"


def styled(concept: Concept, style: str) -> str:
    """`a fox, flat style`."""
    return f"{named(concept)}, {style} style"


def plain_captions(label: str) -> list[str]:
    """Of a thing outside our concepts: its name, then its name with each style."""
    plural = label.endswith("s") and not label.endswith("ss")
    name = label if plural else f"{'an' if label[0] in 'aeiou' else 'a'} {label}"
    return [name, *(f"{name}, {style} style" for style in STYLES)]


def keyword_prompts(tags: dict[str, list[str]]) -> dict[str, list[str]]:
    """By concept name: pairs of its keywords, without its name; `tags` is emojibase's list by label."""
    lists = {}
    for concept in CONCEPTS:
        words = [w for w in tags[concept.label] if w.isalpha() and len(w) > 2 and w not in concept.name.split()]
        lists[concept.name] = [f"{a}, {b}" for a, b in itertools.combinations(words, 2)]
    return lists


def captions_of(concept: int, style: int, keywords: dict[str, list[str]]) -> list[str]:
    """The 40 captions of one drawing: empty 10 % (for guidance), name 40 %, name and style 35 %, keywords 15 %."""
    thing = CONCEPTS[concept]
    words = keywords[thing.name] or [named(thing)]
    picked = np.random.default_rng([13, concept, style]).choice(words, 6)
    return [""] * 4 + [named(thing)] * 16 + [styled(thing, STYLES[style])] * 14 + [str(p) for p in picked]


def split_prompts(split: str, keywords: dict[str, list[str]]) -> list[dict[str, str]]:
    """Rows (prompt, concept, kind) of one split; kind: open | style | unseen-pair | keywords.

    A concept of the training has all styles and two pairs of keywords, a judged one a style and a pair, so that many
    concepts cost few samples. An unseen pair of concept and style is always there.
    """
    frequency = Counter(itertools.chain.from_iterable(keywords.values()))
    rows = []
    for index, concept in enumerate(CONCEPTS):
        if concept.split != split:
            continue
        rows.append({"prompt": named(concept), "concept": concept.name, "kind": "open"})
        for style in _styles(index, everything=split == "train"):
            kind = "unseen-pair" if is_held_out(index, style) else "style"
            rows.append({"prompt": styled(concept, STYLES[style]), "concept": concept.name, "kind": kind})
        # Only pairs that some caption of the training has, and that mean this concept alone.
        own = [
            words for words in keywords[concept.name] if frequency[words] == 1 and words in _learned(index, keywords)
        ]
        picked = np.random.default_rng([11, index]).permutation(own)[: 2 if split == "train" else 1]
        rows += [{"prompt": str(words), "concept": concept.name, "kind": "keywords"} for words in picked]
    return rows


def _styles(concept: int, everything: bool) -> list[int]:
    """Of a concept's prompts: all, or those that the teacher never saw and one that it did, in turn."""
    styles = range(len(STYLES))
    if everything:
        return list(styles)
    seen = [s for s in styles if not is_held_out(concept, s)]
    return [*(s for s in styles if is_held_out(concept, s)), seen[concept % len(seen)]]


def _learned(concept: int, keywords: dict[str, list[str]]) -> set[str]:
    """All captions of a concept's drawings that the teacher sees."""
    seen = [s for s in range(len(STYLES)) if not is_held_out(concept, s)]
    return {text for style in seen for text in captions_of(concept, style, keywords)}


def write_splits(folder: Path, keywords: dict[str, list[str]]) -> None:
    """Writes train.csv, validation.csv and test.csv."""
    folder.mkdir(parents=True, exist_ok=True)
    for split in ("train", "validation", "test"):
        with (folder / f"{split}.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, ["prompt", "concept", "kind"], lineterminator="\n")
            writer.writeheader()
            writer.writerows(split_prompts(split, keywords))
