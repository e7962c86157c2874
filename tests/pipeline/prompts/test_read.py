"""Prompt files: read, and refused by line."""

from __future__ import annotations

from pathlib import Path

import pytest

from rats.pipeline.prompts import Prompt, planned_samples, read_prompts
from rats.schemas.errors import ConfigError
from rats.schemas.identity import prompt_id


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def test_a_text_file_is_a_prompt_a_line_and_each_its_own_concept(tmp_path: Path) -> None:
    prompts = read_prompts(write(tmp_path, "p.txt", "\ufeffa  cat \n\n a, dog\n"))
    assert prompts == [Prompt("a cat", "a cat"), Prompt("a, dog", "a, dog")]


def test_a_table_names_concept_and_kind(tmp_path: Path) -> None:
    text = 'prompt,concept,kind\n"a cat, drawn",cat,seen\na dog,dog,held-out\n'
    prompts = read_prompts(write(tmp_path, "p.csv", text))
    assert prompts == [Prompt("a cat, drawn", "cat", "seen"), Prompt("a dog", "dog", "held-out")]


def test_a_table_of_prompts_alone_is_enough(tmp_path: Path) -> None:
    assert read_prompts(write(tmp_path, "p.csv", "prompt\na cat\n")) == [Prompt("a cat", "a cat")]


@pytest.mark.parametrize(
    ("name", "text", "hint"),
    [
        ("p.txt", "", "no prompts"),
        ("p.txt", " \n\n", "no prompts"),
        ("p.txt", "a cat\na dog\na  cat\n", "line 3: 'a cat' is on line 1"),
        ("p.csv", "", "expected the columns prompt,concept,kind"),
        ("p.csv", "text,concept\na,b\n", "line 1"),
        ("p.csv", "prompt,concept,kind\n", "no prompts"),
        ("p.csv", "prompt,concept,kind\na,b,c,d\n", "line 2"),
        ("p.csv", "prompt,concept,kind\n,b,c\n", "line 2"),
        ("p.csv", 'prompt,concept,kind\n"a,b,c\n', "line 2"),
        ("p.csv", "prompt,concept,kind\na,b,c\na,d,e\n", "line 3: 'a' is on line 2"),
    ],
)
def test_a_wrong_file_is_refused_by_line(tmp_path: Path, name: str, text: str, hint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_prompts(write(tmp_path, name, text))
    assert hint in str(caught.value) and "\n" not in str(caught.value)


def test_a_missing_or_binary_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe\x00")
    for name in ("none.txt", "b.txt"):
        with pytest.raises(ConfigError, match=r"check prompts: in params\.yaml"):
            read_prompts(tmp_path / name)


def test_every_prompt_gets_every_noise_index(tmp_path: Path) -> None:
    samples = planned_samples([Prompt("a cat", "cat"), Prompt("a dog", "dog")], 3)
    assert [sample.noise_index for sample in samples] == [0, 1, 2, 0, 1, 2]
    assert len({sample.key for sample in samples}) == 6
    assert samples[0].key == f"{prompt_id('a cat')[:24]}-0000"
