"""What the splits of a project share, and that a test split is about two things."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rats.schemas.errors import ConfigError
from rats.schemas.params import PromptParams
from rats.stages.measure.splits import check_concepts, shared_with_train

TRAIN = "prompt,concept\na red fox,fox\na small fox,fox\na green frog,frog\na blue whale,whale\n"
OTHERS = "prompt,concept\na yellow star,star\na house at night,house\n"


def shared(folder: Path, test: str, **more: Any) -> list[str]:
    for name, text in (("train", TRAIN), ("test", test)):
        (folder / f"{name}.csv").write_text(text)
    files = {split: str(folder / f"{split}.csv") for split in ("train", "test")}
    return shared_with_train(PromptParams.model_validate(files | more))


def test_the_same_prompts_and_concepts_in_two_splits_are_counted(tmp_path: Path) -> None:
    test = OTHERS + "A  red fox,fox\na red  fox,fox\n".replace("A  red", "a large") + "a sad frog,frog\n"
    assert shared(tmp_path, test) == [
        "1 of 5 prompts and 2 of 4 concepts of prompts.test are in prompts.train too: what is measured on them is not "
        "held out"
    ]
    assert shared(tmp_path, OTHERS) == []


def test_a_prompt_that_is_its_own_concept_is_counted_once(tmp_path: Path) -> None:
    (said,) = shared(tmp_path, "prompt\na red fox\na yellow star\n")
    assert said.startswith("1 of 2 prompts of prompts.test are in")


def test_each_split_has_its_line_and_what_cannot_be_read_has_none(tmp_path: Path) -> None:
    (tmp_path / "seen.txt").write_text("a green frog\na blue whale\na yellow star\n")
    (said,) = shared(tmp_path, OTHERS, validation=str(tmp_path / "seen.txt"))
    assert said.startswith("2 of 3 prompts of prompts.validation are in")
    hub = {"path": "org/prompts", "revision": "abc"}
    for unknown in (hub, "nowhere.txt", str(tmp_path)):
        assert shared(tmp_path, OTHERS, validation=unknown) == []


def test_one_concept_is_refused_by_name() -> None:
    check_concepts(["fox", "frog", "fox"], "prompts.test")
    with pytest.raises(ConfigError, match=r"prompts\.test is about 'fox' alone: .* need two"):
        check_concepts(["fox", "fox"], "prompts.test")
