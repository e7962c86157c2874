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


def split_prompts(split: str, keywords: dict[str, list[str]], keyword_count: int = 2) -> list[dict[str, str]]:
    """Rows (prompt, concept, kind) of one split; kind: open | style | unseen-pair | keywords."""
    frequency = Counter(itertools.chain.from_iterable(keywords.values()))
    rows = []
    for index, concept in enumerate(CONCEPTS):
        if concept.split != split:
            continue
        rows.append({"prompt": named(concept), "concept": concept.name, "kind": "open"})
        for s, style in enumerate(STYLES):
            kind = "unseen-pair" if is_held_out(index, s) else "style"
            rows.append({"prompt": styled(concept, style), "concept": concept.name, "kind": kind})
        # Only pairs that some caption of the training has, and that mean this concept alone.
        known = {
            text for s in range(len(STYLES)) if not is_held_out(index, s) for text in captions_of(index, s, keywords)
        }
        own = [words for words in keywords[concept.name] if frequency[words] == 1 and words in known]
        picked = np.random.default_rng([11, index]).permutation(own)[:keyword_count]
        rows += [{"prompt": str(words), "concept": concept.name, "kind": "keywords"} for words in picked]
    return rows


def write_splits(folder: Path, keywords: dict[str, list[str]]) -> None:
    """Writes train.csv, validation.csv and test.csv."""
    folder.mkdir(parents=True, exist_ok=True)
    for split in ("train", "validation", "test"):
        with (folder / f"{split}.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, ["prompt", "concept", "kind"], lineterminator="\n")
            writer.writeheader()
            writer.writerows(split_prompts(split, keywords))
