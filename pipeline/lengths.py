"""Which prompts are longer than what the text encoders read of them. Most pipelines cut them without a word."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from rats.schemas.record import Record

AT_ONCE = 1000
"""Texts in one call of a tokenizer: that is fast, and takes little memory."""


@dataclass(frozen=True)
class Window:
    """How a text encoder reads a prompt: its first `tokens` tokens, with special ones and what a template adds."""

    tokenizer: Any
    tokens: int
    limit: str = "max_sequence_length"
    """The number's name."""
    rest: str = "the rest is not read"
    """What becomes of the tokens behind."""
    is_lost: bool = True
    """Whether no other encoder reads on."""
    written: Callable[[str], str] = str
    """The prompt as the pipeline hands it to the tokenizer."""
    before: int = 0
    """Tokens of the template before the prompt that are not among the `tokens`."""


class Cut(Record):
    """Of one limit: the prompts that are longer, and the tokens of the longest and of the negative prompt.

    `negative` is None where no negative prompt is used.
    """

    limit: str
    tokens: int
    rest: str
    is_lost: bool
    prompts: int
    longest: int
    negative: int | None

    @property
    def is_cut(self) -> bool:
        """Whether any of them is longer."""
        return self.prompts > 0 or (self.negative or 0) > self.tokens

    def text(self, total: int) -> str:
        """Which of `total` prompts are longer, and by how much."""
        found = []
        if self.prompts:
            who = "the prompt" if total == 1 else f"{self.prompts} of {total} prompts"
            are = "is" if self.prompts == 1 else "are"
            found.append(f"{who} {are} longer than {self.limit} {self.tokens} (longest {self.longest} tokens)")
        if (self.negative or 0) > self.tokens:
            than = "so is" if found else f"longer than {self.limit} {self.tokens} is"
            found.append(f"{than} the negative prompt ({self.negative} tokens)")
        return f"{', '.join(found)}: {self.rest}"


class Lengths(Record):
    """What text encoders read of some prompts. `cuts`: one a limit, at least one.

    `alike`: prompts that every encoder reads as the same tokens as another one: the model cannot tell them apart.
    """

    prompts: int
    cuts: tuple[Cut, ...]
    alike: int

    @property
    def text(self) -> str:
        """One line for a reader."""
        found = [cut.text(self.prompts) for cut in self.cuts if cut.is_cut]
        if not found:
            found = [f"all are read whole; the longest has {self.cuts[0].longest} of {self.cuts[0].tokens} tokens"]
        if self.alike:
            are = "is" if self.alike == 1 else "are"
            found.append(f"{self.alike} of {self.prompts} prompts {are} read as the same tokens as another one")
        return "; ".join(found)

    def tell(self, log: logging.Logger) -> None:
        """Logs the line if a prompt is cut: as a warning where its end is lost."""
        is_lost = self.alike > 0 or any(cut.is_cut and cut.is_lost for cut in self.cuts)
        if is_lost or any(cut.is_cut for cut in self.cuts):
            log.log(logging.WARNING if is_lost else logging.INFO, self.text)


def read_lengths(windows: Sequence[Window], prompts: Sequence[str], negative: str | None = None) -> Lengths:
    """Counts the tokens of different prompts, and of the negative prompt if one is used.

    `windows`: one for each text encoder. Those of one limit are counted together.
    """
    texts = [*prompts, *([] if negative is None else [negative])]
    read = [list(zip(*_read(window, texts), strict=True)) for window in windows]
    limits: dict[str, tuple[Window, list[int]]] = {}
    for window, (sizes, _) in zip(windows, read, strict=True):
        _, others = limits.get(window.limit, (window, sizes))
        limits[window.limit] = window, [max(pair) for pair in zip(sizes, others, strict=True)]
    cuts = [_cut(window, sizes, len(prompts)) for window, sizes in limits.values()]
    rows = set(zip(*(hashes[: len(prompts)] for _, hashes in read), strict=True))
    lost_first = tuple(sorted(cuts, key=lambda cut: not cut.is_lost))
    return Lengths(prompts=len(prompts), cuts=lost_first, alike=len(prompts) - len(rows))


def _cut(window: Window, sizes: Sequence[int], prompts: int) -> Cut:
    """`sizes`: tokens of all prompts, then of the negative one."""
    return Cut(
        limit=window.limit,
        tokens=window.tokens,
        rest=window.rest,
        is_lost=window.is_lost,
        prompts=sum(size > window.tokens for size in sizes[:prompts]),
        longest=max(sizes[:prompts], default=0),
        negative=next(iter(sizes[prompts:]), None),
    )


def _read(window: Window, texts: Sequence[str]) -> Iterator[tuple[int, int]]:
    """Of each text the number of its tokens, and a hash of those that are read."""
    most = window.before + window.tokens
    for start in range(0, len(texts), AT_ONCE):
        written = [window.written(text) for text in texts[start : start + AT_ONCE]]
        rows = _tokens(window, written)
        longer = [place for place, row in enumerate(rows) if len(row) > most]
        sizes = [len(row) - window.before for row in rows]
        # cut as the pipeline cuts: an end token may stay
        short = _tokens(window, [written[place] for place in longer], truncation=True, max_length=most)
        for place, row in zip(longer, short, strict=True):
            rows[place] = row
        yield from zip(sizes, map(hash, map(tuple, rows)), strict=True)


def _tokens(window: Window, texts: Sequence[str], **cut: Any) -> list[list[int]]:
    if not texts:
        return []
    # verbose: transformers would warn of the first that is long
    return list(window.tokenizer(texts, return_attention_mask=False, verbose=False, **cut)["input_ids"])
