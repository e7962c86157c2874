"""Files as people have them: published prompt sets, spreadsheets, packed and foreign ones."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rats.pipeline.prompts import Prompt, read_prompts
from rats.schemas.errors import ConfigError
from rats.schemas.params import PromptSource

ZSTD = pa.compress(b"a cat\na dog", codec="zstd", asbytes=True)
COCO = {"info": {"year": 2014}, "images": [{"id": 9}], "annotations": [{"id": 7, "caption": "a man"}]}
CHAT = {"messages": [{"role": "user", "content": "draw a cat"}]}
BENCH = {"tag": "two", "include": [{"class": "bench", "count": 2}], "prompt": "a bench"}


def write(folder: Path, name: str, data: str | bytes | Any) -> Path:
    path = folder / name
    if not isinstance(data, str | bytes):
        data = json.dumps(data)
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def refusal(source: str | Path | PromptSource) -> str:
    with pytest.raises(ConfigError) as caught:
        read_prompts(source)
    assert "\n" not in str(caught.value) and "[{'" not in str(caught.value)
    return str(caught.value)


def found(path: Path, **settings: Any) -> list[str]:
    return [prompt.text for prompt in read_prompts(PromptSource(path=str(path), **settings) if settings else path)]


@pytest.mark.parametrize(
    ("name", "data", "settings", "texts"),
    [
        (
            "PartiPrompts.tsv",
            'Prompt\tCategory\nbond\tAbstract\na "b" c\tArts',
            {"column": "Prompt"},
            ["bond", 'a "b" c'],
        ),
        ("DrawBench.csv", "Prompts,Category\nA red car.,Colors\n", {"column": "Prompts"}, ["A red car."]),
        ("evaluation_metadata.jsonl", BENCH, {}, ["a bench"]),
        ("anime.json", ["a fox", "a frog"], {}, ["a fox", "a frog"]),
        ("anime.json", ["a fox", "a frog"], {"column": "text"}, ["a fox", "a frog"]),
        ("vbench.json", [{"prompt_en": "a dog", "dimension": ["a"]}], {"column": "prompt_en"}, ["a dog"]),
        ("coco.json", COCO, {"field": "annotations", "column": "caption"}, ["a man"]),
        ("chat.jsonl", CHAT, {"column": "messages.0.content"}, ["draw a cat"]),
        ("columns.json", {"prompt": ["a fox", "a frog"]}, {"field": "prompt"}, ["a fox", "a frog"]),
        ("captions.json", [{"caption": {"text": "a fox", "lang": "en"}}], {"column": "caption.text"}, ["a fox"]),
        ("dotted.json", [{"a.b": "a fox", "a": {"b": 3}}], {"column": "a.b"}, ["a fox"]),
        ("one.txt", "a fox\na frog", {"count": 2}, ["a fox", "a frog"]),
        ("excel.csv", '\ufeffprompt,concept\r\n"a fox,\r\nred",fox\r\n'.encode(), {}, ["a fox, red"]),
        ("excel.txt", "a café\r\na frog\r\n".encode("utf-16"), {}, ["a café", "a frog"]),
        ("more.csv", "id,prompt,likes\n7,a fox,3\n", {}, ["a fox"]),
        ("big.csv", f"prompt,picture\na fox,{'x' * 200_000}\n", {}, ["a fox"]),
        ("p.txt.gz", gzip.compress(b"a cat\na dog", mtime=0), {}, ["a cat", "a dog"]),
        ("p.TXT.zst", ZSTD + pa.compress(b"\na fox", codec="zstd", asbytes=True), {}, ["a cat", "a dog", "a fox"]),
        ("we[1]rd::x].csv", "prompt\na fox\n", {}, ["a fox"]),
        ("we[1]rd::x].csv", "prompt\na fox\n", {"column": "prompt"}, ["a fox"]),
    ],
)
def test_it_is_read_as_it_is_written(tmp_path: Path, name: str, data: Any, settings: Any, texts: list[str]) -> None:
    read = found(write(tmp_path, name, data), **settings)
    assert sorted(read) == sorted(texts)


@pytest.mark.parametrize("name", ["p.csv", "p.tsv"])
@pytest.mark.parametrize("settings", [{}, {"column": "prompt"}])
def test_no_type_is_guessed(tmp_path: Path, name: str, settings: dict[str, Any]) -> None:
    texts = ["007", "NA", "null", "NaN", "None", "2024-01-05", "0", "1e5", "true", "1_000"]
    assert sorted(found(write(tmp_path, name, "prompt\n" + "\n".join(texts)), **settings)) == sorted(texts)


def test_lines_end_where_files_end_them_and_nowhere_else(tmp_path: Path) -> None:
    path = write(tmp_path, "p.txt", "a\u2028b\x0cc\x85d\x1ce\rf\r\ng\n")
    assert found(path) == ["a b c d e", "f", "g"]


def test_a_column_has_its_place_in_the_header_by_its_name(tmp_path: Path) -> None:
    path = write(tmp_path, "p.tsv", "kind\tid\tconcept\tprompt\nseen\t7\tfox\ta red fox\n\t8\t\t\n")
    assert read_prompts(path) == [Prompt("a red fox", "fox", "seen")]


@pytest.mark.parametrize(
    ("name", "data", "settings", "hint"),
    [
        ("parti.tsv", "Prompt\tCategory\nbond\tArts", {}, "rats init --prompts .*parti.tsv --column Prompt"),
        ("draw.csv", "Prompts,Category\nA car,Colors\n", {}, "--column Prompts"),
        ("vbench.json", [{"prompt_en": "a dog", "dimension": ["a"]}], {}, "--column prompt_en"),
        ("pick.json", [{"likes": 3, "caption": "a dog"}], {}, "--column caption"),
        ("coco.json", COCO, {}, "field: annotations and column: caption"),
        ("coco.json", COCO, {"field": "annotation", "column": "caption"}, "did you mean 'annotations'"),
        ("coco.json", COCO, {"field": "info", "column": "caption"}, "not a list of rows"),
        ("columns.json", {"prompt": ["a", "b"]}, {}, "field: prompt"),
        ("columns.json", {"prompt": {"0": "a", "1": "b"}}, {}, "orient='records'"),
        ("chat.jsonl", CHAT, {"column": "messages"}, "line 1: .*a list of 1.*column: messages.0.content"),
        ("caption.json", [{"caption": {"lang": "en", "text": "a"}}], {"column": "caption"}, "column: caption.text"),
        ("caption.json", [{"caption": {"text": "a"}}], {"column": "caption.txt"}, "did you mean 'text'"),
        ("true.json", [{"prompt": "a"}, {"prompt": True}], {}, "row 2: .*true or false"),
        ("mixed.json", ["a", {"prompt": "b"}], {}, "row 2: .*another kind"),
        ("half.json", '["\\ud83d"]', {}, "half a character"),
        ("broken.jsonl", '{"prompt": "a"}\n{"prompt"', {}, "line 2 is no JSON"),
        ("deep.json", "[" * 100_000, {}, "nested too deep"),
        ("empty.json", "", {}, "no prompts"),
        ("p.csv", "prompt,x\na,b,c\n", {"column": "prompt"}, "line 2: .*quote prompts that hold commas"),
        ("p.csv", 'x,prompt\na,b\nc,"d\ne",f\n', {}, "line 3: "),
        ("p.csv", "prompt,prompt\na,b\n", {}, "2 columns 'prompt'"),
        ("p.csv", "prompt,concpt\na,b\n", {}, "did you mean 'concept'"),
        ("p.csv", "prompt;concept\na;b\n", {}, "separated by ';'"),
        ("p.tsv", "prompt,concept\na,b\n", {"column": "prompt"}, "separated by ','"),
        ("p.csv", "prompt\ncafé\n".encode("cp1252"), {}, "save it as UTF-8"),
        ("p.csv", "prompt\na\0b\n", {"column": "prompt"}, "NUL"),
        ("p.csv", "<!DOCTYPE html><html>\n", {}, "web page"),
        ("p.txt", "version https://git-lfs.github.com/spec/v1\noid sha256:9\nsize 7\n", {}, "git lfs pull"),
        ("p.parquet", "version https://git-lfs.github.com/spec/v1\noid sha256:9\nsize 7\n", {}, "git lfs pull"),
        ("p.txt.gz", b"a cat", {}, "cannot be unpacked"),
        ("p.txt.gz", gzip.compress(b"a cat and a dog", mtime=0)[:-9], {}, "cannot be unpacked"),
        ("p.txt.zst", ZSTD[:-5], {}, "cannot be unpacked"),
        ("p.txt", "a\nb\na\nb\n", {}, "line 3: 'a' is on line 1 already; line 4: 'b' is on line 2"),
        ("p.csv", "prompt\na\n", {"field": "x"}, "field:"),
    ],
)
def test_what_is_not_clear_is_refused_with_the_way_out(
    tmp_path: Path, name: str, data: Any, settings: dict[str, Any], hint: str
) -> None:
    path = write(tmp_path, name, data)
    with pytest.raises(ConfigError, match=hint) as caught:
        found(path, **settings)
    assert "\n" not in str(caught.value) and "{'" not in str(caught.value)


@pytest.mark.parametrize("name", ["p.yaml", "p.md", "p.xlsx", "p", "p.gz", "p.txt.zip", "p.log"])
def test_a_file_of_no_known_ending_is_not_read_line_by_line(tmp_path: Path, name: str) -> None:
    path = write(tmp_path, name, "a cat\na dog\n")
    assert ".txt, .csv, .tsv" in refusal(path) and ".txt, .csv, .tsv" in refusal(PromptSource(path=str(path)))


def test_what_is_no_file_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.txt")
    assert "no file" in refusal(tmp_path / "pipe.txt")
    assert "no such file" in refusal("x" * 5_000 + ".txt")
    assert "no such file" in refusal("a\0b.txt")
    assert "download" in refusal("https://example.org/p.txt")
    assert "{path: org/prompts, revision: COMMIT}" in refusal("org/prompts")


TYPES = {
    "words": pa.array(["a fox", "a frog"]).dictionary_encode(),
    "number": [0, 7],
    "day": pa.array([5, None], pa.date32()),
    "share": [0.5, float("nan")],
    "deep": [{"text": "a fox"}, None],
    "bytes": [b"a", b"b"],
    "list": [["a fox"], ["a frog"]],
    "picture": [{"bytes": b"x", "path": "x.png"}] * 2,
    "yes": [True, False],
}


@pytest.mark.parametrize(
    ("column", "texts"),
    [
        ("words", ["a fox", "a frog"]),
        ("number", ["0", "7"]),
        ("day", ["1970-01-06"]),
        ("share", ["0.5"]),
        ("deep.text", ["a fox"]),
        ("list.0", ["a fox", "a frog"]),
    ],
)
def test_a_cell_of_a_table_is_text_where_there_is_one_way_to_write_it(
    tmp_path: Path, column: str, texts: list[str]
) -> None:
    pq.write_table(pa.table(TYPES), tmp_path / "p.parquet")
    assert sorted(found(tmp_path / "p.parquet", column=column)) == texts


@pytest.mark.parametrize(
    ("column", "hint"),
    [
        ("bytes", "holds bytes"),
        ("list", "a list of 1, not text; .*column: list.0"),
        ("picture", "a picture"),
        ("yes", "true or false"),
        ("deep", "column: deep.text"),
        ("list.x", "no 'x'"),
        ("likes", "it has words, number"),
    ],
)
def test_any_other_cell_is_refused_by_name(tmp_path: Path, column: str, hint: str) -> None:
    pq.write_table(pa.table(TYPES), tmp_path / "p.parquet")
    with pytest.raises(ConfigError, match=hint):
        found(tmp_path / "p.parquet", column=column)
