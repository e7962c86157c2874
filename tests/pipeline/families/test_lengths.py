"""What is counted as cut is what the pipelines cut: their text encoders' own input shows it."""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from rats.pipeline.families.open import Model
from rats.pipeline.lengths import Cut
from rats.schemas.params import TeacherParams
from tests.support.model_fuzz import WRITERS, opened, write_all

LONG = "a red fox " * 30
PROMPTS = ["a red fox", "a green frog", f"{LONG}a frog", f"{LONG}a whale", f"a house {LONG}", "two red apples " * 4]
"""The third and fourth differ where no encoder reads on."""
HEADS = {"qwen-image": 34}
"""Tokens of the template that the pipeline takes off again."""
CLIP = {"flux": 8, "sd3": 77}
"""Tokens that the tiny folders' CLIP encoders read."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny folder of every family."""
    return write_all(tmp_path_factory.mktemp("folders"))


def model_of(family: str, folders: Path, **teacher: Any) -> Model:
    model = opened(family, folders / family)
    return model.using(teacher=TeacherParams.model_validate(model.teacher.model_dump(exclude_unset=True) | teacher))


def rows_seen(model: Model, prompts: list[str]) -> list[list[tuple[int, ...]]]:
    """For each prompt the tokens that each text encoder was given by the pipeline, without padding at the end."""
    text, seen = model.open_text(), []
    pipeline = text._pipeline

    def look(tokenizer: Any, module: Any, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        ids = (options["input_ids"] if "input_ids" in options else args[0])[0].tolist()
        while ids[-1] == tokenizer.pad_token_id:
            ids.pop()
        is_clip = tokenizer.bos_token_id is not None
        seen.append((*ids, tokenizer.eos_token_id) if is_clip else tuple(ids))  # CLIP pads by its end token

    for name in model.family.encoders:
        tokenizer = getattr(pipeline, name.replace("text_encoder", "tokenizer"))
        getattr(pipeline, name).register_forward_pre_hook(partial(look, tokenizer), with_kwargs=True)
    found = []
    for prompt in prompts:
        seen.clear()
        text.encode([prompt])
        found.append(list(seen))
    return found


def of_text(model: Model, prompts: list[str] = PROMPTS) -> Cut:
    """What is cut at `max_sequence_length`."""
    return next(cut for cut in model.lengths(prompts).cuts if cut.limit == "max_sequence_length")


@pytest.mark.parametrize("family", WRITERS)
def test_what_is_counted_is_what_the_text_encoders_are_given(family: str, folders: Path) -> None:
    whole, model = model_of(family, folders, max_sequence_length=200), model_of(family, folders)
    head, length = HEADS.get(family, 0), model.teacher.max_sequence_length
    sizes = [len(rows[-1]) - head for rows in rows_seen(whole, PROMPTS)]
    cut = of_text(model)
    assert (cut.tokens, cut.longest) == (length, max(sizes))
    assert cut.prompts == sum(size > length for size in sizes) > 0 and cut.is_lost
    assert not of_text(whole).is_cut and whole.lengths(PROMPTS).alike == 0
    read = [tuple(row[: head + length] if head else row for row in rows) for rows in rows_seen(model, PROMPTS)]
    assert model.lengths(PROMPTS).alike == len(PROMPTS) - len(set(read)) > 0


@pytest.mark.parametrize("family", WRITERS)
def test_a_prompt_that_just_fits_is_not_cut(family: str, folders: Path) -> None:
    longest = of_text(model_of(family, folders)).longest
    assert not of_text(model_of(family, folders, max_sequence_length=longest)).is_cut
    assert of_text(model_of(family, folders, max_sequence_length=longest - 1)).prompts > 0


@pytest.mark.parametrize("family", WRITERS)
def test_the_negative_prompt_counts_where_it_is_used(family: str, folders: Path) -> None:
    for scale in (2.5, 1.0):
        model = model_of(family, folders, negative_prompt=LONG, true_cfg_scale=scale)
        cut = of_text(model, PROMPTS[:2])
        assert cut.prompts == 0 and cut.is_cut == (scale > 1) == ("the negative prompt" in model.lengths(PROMPTS).text)
        assert not model.lengths(PROMPTS[:2], guided=False).cuts[0].is_cut


@pytest.mark.parametrize("family", CLIP)
def test_that_clip_is_short_is_said_once_and_is_no_loss(
    family: str, folders: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, log = model_of(family, folders, max_sequence_length=200), logging.getLogger("rats")
    tokenizer = model.open_text()._pipeline.tokenizer
    sizes = [len(tokenizer(prompt)["input_ids"]) for prompt in PROMPTS]
    count, longest = sum(size > CLIP[family] for size in sizes), max(sizes)
    said = (
        f"{count} of 6 prompts are longer than CLIP's {CLIP[family]} (longest {longest} tokens): by design, T5 reads on"
    )
    assert model.lengths(PROMPTS).text == said
    with caplog.at_level(logging.INFO, "rats"):
        for opened_with in (model, model_of(family, folders)):
            opened_with.lengths(PROMPTS).tell(log)
        model.lengths(PROMPTS[:2]).tell(log)
    assert [record.levelname for record in caplog.records] == ["INFO", "WARNING"]
    lost = caplog.records[1].message
    assert lost.index("max_sequence_length 8 (") < lost.index(said) and lost.count("CLIP") == 1


@pytest.mark.parametrize("family", WRITERS)
def test_the_libraries_say_nothing_of_their_own(family: str, folders: Path) -> None:
    said: list[str] = []

    class Listening(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    loggers, handler = [logging.getLogger(name) for name in ("diffusers", "transformers")], Listening()
    for logger in loggers:
        logger.addHandler(handler)
    model = model_of(family, folders)
    model.lengths(PROMPTS)
    model.open_text().encode(PROMPTS)
    for logger in loggers:
        logger.removeHandler(handler)
    assert said == []
