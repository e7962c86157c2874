"""What the splits of a project must be to each other: a test split tells something new about at least two concepts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from rats.pipeline.prompts.read import Prompt, read_prompts
from rats.pipeline.prompts.select import exists
from rats.schemas.errors import ConfigError, RatsError, brief
from rats.schemas.params import PromptParams, Prompts

TRAIN, HELD_OUT = "train", ("validation", "test")


def check_concepts(concepts: Iterable[str], where: object) -> None:
    """Raises ConfigError for fewer than two concepts, over which an evaluation has no interval."""
    found = set(concepts)
    if len(found) < 2:
        raise ConfigError(
            f"{where} is about {brief(next(iter(found), 'nothing'))} alone: the intervals of an evaluation are over "
            "concepts and need two, add prompts about something else"
        )


def shared_with_train(prompts: PromptParams) -> list[str]:
    """A sentence for each split with prompts or concepts that the train split has too.

    A prompt without a concept of its own has none that is known. Only files are read, no data set of the hub; a split
    that cannot be read shares nothing that is known.
    """
    return [said for split in HELD_OUT for said in _shared(split, getattr(prompts, split), prompts.train)]


def _shared(split: str, source: Prompts | None, train: Prompts) -> Iterator[str]:
    with suppress(RatsError):
        held_out, trained = _read(source), _read(train)
        parts = [
            _part("prompts", {prompt.id for prompt in held_out}, {prompt.id for prompt in trained}),
            _part("concepts", _concepts(held_out), _concepts(trained)),
        ]
        if said := " and ".join(part for part in parts if part):
            yield f"{said} of prompts.{split} are in prompts.train too: what is measured on them is not held out"


def _read(source: Prompts | None) -> list[Prompt]:
    return read_prompts(source) if source is not None and exists(Path(str(source))) else []


def _concepts(prompts: Iterable[Prompt]) -> set[str]:
    return {prompt.concept for prompt in prompts if prompt.concept != prompt.text}


def _part(what: str, held_out: set[str], trained: set[str]) -> str:
    common = len(held_out & trained)
    return f"{common} of {len(held_out)} {what}" if common else ""
