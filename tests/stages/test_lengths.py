"""Prompts that are cut are told in one line, the same in plan, rollout, doctor and generate."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from rats.schemas.params import load_params
from rats.stages.generate import generate
from tests.support.project import rats, write_project

LONG = "two red apples and a yellow star at night"
SAID = (
    "2 of 3 prompts are longer than max_sequence_length 7 (longest 14 tokens), so is the negative prompt (8 tokens): "
    "the rest is not read (teacher.max_sequence_length may be 512); "
    "2 of 3 prompts are longer than CLIP's 8 (longest 15 tokens), so is the negative prompt (9 tokens): by design, "
    "T5 reads on; 1 of 3 prompts is read as the same tokens as another one"
)
"""By hand: ten words in one piece, "and" in three, an end token, and CLIP's start."""


@pytest.fixture
def project(models: Path, tmp_path: Path) -> Path:
    """Three prompts, two of which differ only behind what is read."""
    teacher = {"max_sequence_length": 7, "negative_prompt": "a red fox a green frog a"}
    write_project(models, tmp_path, teacher=teacher, rewards=[], evaluate={"judges": []})
    (tmp_path / "prompts.txt").write_text(f"{LONG} a fox\n{LONG} a frog\na red fox\n")
    return tmp_path


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    found = [record.getMessage() for record in caplog.records if "max_sequence_length" in record.getMessage()]
    caplog.clear()
    return found


def test_every_command_says_it_once(project: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "rats")
    rows = json.loads(rats(project, "doctor", "--json").stdout)["checks"]
    (said,) = [row["found"] for row in rows if row["check"] == "tokens of train"]
    assert told(caplog) == [] and said == SAID
    plan = [line for line in rats(project, "plan", "--rate", "3").stdout.splitlines() if line.startswith("prompts ")]
    assert [line.removeprefix("prompts").strip() for line in plan] == [said]
    lengths = json.loads(rats(project, "plan", "--rate", "3", "--json").stdout)["lengths"]
    assert (lengths["cuts"][0]["prompts"], lengths["alike"]) == (2, 1)
    for arguments in (["--dry-run"], []):
        rats(project, "stage", "rollout", *arguments)
        assert told(caplog) == [said]
    rats(project, "stage", "rollout")  # makes nothing
    assert told(caplog) == []


def test_a_picture_that_is_drawn_is_of_the_prompt_that_is_read(
    project: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    params = load_params(project / "params.yaml")
    caplog.set_level(logging.INFO, "rats")
    generate(params, LONG, 3, None, 5, tmp_path / "a.png")
    (said,) = told(caplog)
    assert said.startswith("the prompt is longer than max_sequence_length 7") and "negative" not in said
