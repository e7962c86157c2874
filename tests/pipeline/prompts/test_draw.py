"""Prompts drawn from tables: own files, folders, the hub's benchmark layout, and what is refused."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from rats.pipeline.prompts import read_prompts
from rats.schemas.errors import ConfigError
from rats.schemas.params import Params, PromptSource, load_params
from rats.stages.init import dvc_yaml
from tests.support.project import ROOT, rats, write_project

PROMPTS = [f"a {colour} {thing}" for thing in ("fox", "frog", "whale", "boat") for colour in ("red", "green", "blue")]
ROWS = [{"caption": text, "about": text.split()[-1], "likes": i} for i, text in enumerate(PROMPTS)]
FIRST = ["a green frog", "a red frog"]
REPEATED = [
    *ROWS,
    {"caption": " a  red fox ", "about": "vixen", "likes": 0},
    {"caption": None, "about": "-", "likes": 1},
]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `datasets` keeps of a table."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def write_parquet(path: Path) -> None:
    pq.write_table(pa.Table.from_pylist(REPEATED), path)


def write_lines(path: Path) -> None:
    path.write_text("\n".join(json.dumps(row) for row in reversed(REPEATED)))


def write_csv(path: Path) -> None:
    lines = [f"{row['likes']},{row['caption'] or ''},{row['about']}" for row in REPEATED]
    path.write_text("\n".join(["likes,caption,about", *lines]))


WRITERS: dict[str, Callable[[Path], None]] = {"p.parquet": write_parquet, "p.jsonl": write_lines, "p.csv": write_csv}


def drawn(path: Path, **settings: Any) -> list[str]:
    return [prompt.text for prompt in read_prompts(PromptSource(path=str(path), **settings))]


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_gives_the_same_distinct_prompts_in_the_order_of_the_seed(name: str, tmp_path: Path) -> None:
    WRITERS[name](tmp_path / name)
    prompts = read_prompts(PromptSource(path=str(tmp_path / name), column="caption", concept="about", seed=7))
    assert [prompt.text for prompt in prompts[:2]] == FIRST
    assert sorted(prompt.text for prompt in prompts) == sorted(PROMPTS)
    assert all(prompt.concept == prompt.text.split()[-1] for prompt in prompts)


def test_a_larger_count_begins_with_a_smaller_one_and_slices_have_nothing_in_common(tmp_path: Path) -> None:
    write_parquet(tmp_path / "p.parquet")
    few, more = (drawn(tmp_path / "p.parquet", column="caption", count=count) for count in (3, 6))
    rest = drawn(tmp_path / "p.parquet", column="caption", skip=6, count=6)
    other = drawn(tmp_path / "p.parquet", column="caption", count=6, seed=1)
    assert more[:3] == few and sorted(more + rest) == sorted(PROMPTS) and sorted(other) != sorted(more)


def test_files_of_a_folder_are_chosen_by_pattern_and_a_list_of_texts_is_the_column_text(tmp_path: Path) -> None:
    """As the HPDv2 benchmark lies on the hub: a JSON list of prompts a style, beside files of other formats."""
    (tmp_path / "benchmark").mkdir()
    for style, texts in (("anime", PROMPTS[:6]), ("photo", PROMPTS[4:])):
        (tmp_path / "benchmark" / f"{style}.json").write_text(json.dumps(texts))
    write_csv(tmp_path / "p.csv")
    assert sorted(drawn(tmp_path, files="benchmark/*.json", column="text")) == sorted(PROMPTS)
    with pytest.raises(ConfigError, match="by files:"):
        drawn(tmp_path, column="text")


def test_a_bare_path_to_a_table_is_read_from_its_column_prompt(tmp_path: Path) -> None:
    pq.write_table(pa.table({"prompt": PROMPTS}), tmp_path / "p.parquet")
    assert {prompt.text for prompt in read_prompts(tmp_path / "p.parquet")} == set(PROMPTS)
    assert {prompt.concept for prompt in read_prompts(str(tmp_path / "p.parquet"))} == set(PROMPTS)


@pytest.mark.parametrize(
    ("settings", "hint"),
    [
        ({"column": "captions"}, "did you mean 'caption'"),
        ({"column": "caption", "concept": "abuot"}, "did you mean 'about'"),
        ({"column": "caption", "count": 13}, "12 distinct prompts"),
        ({"column": "caption", "skip": 12}, "12 distinct prompts"),
        ({"path": "org/prompts"}, "set revision to a commit"),
        ({"path": "org/prompts", "revision": "0" * 40}, "cannot read prompts from org/prompts"),
        ({"path": "./nowhere.parquet"}, "no file, folder or hub id"),
    ],
)
def test_what_cannot_be_drawn_is_one_line(settings: dict[str, Any], hint: str, tmp_path: Path) -> None:
    write_parquet(tmp_path / "p.parquet")
    with pytest.raises(ConfigError) as caught:
        read_prompts(PromptSource(**{"path": str(tmp_path / "p.parquet"), **settings}))
    assert hint in str(caught.value) and "\n" not in str(caught.value)


def test_a_damaged_table_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "p.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(ConfigError, match="cannot read prompts from"):
        drawn(tmp_path / "p.parquet")


def test_a_whole_repository_of_the_hub_takes_datasets_and_a_file_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_parquet(tmp_path / "p.parquet")
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert sorted(drawn(tmp_path / "p.parquet", column="caption")) == sorted(PROMPTS)
    with pytest.raises(ConfigError, match=r"pip install 'rats\[datasets\]'"):
        drawn(Path("org/prompts"), revision="0" * 40)


def test_params_name_a_table_and_say_what_is_wrong_with_it(models: Path, tmp_path: Path) -> None:
    write_parquet(tmp_path / "p.parquet")
    source = {"path": "p.parquet", "column": "caption", "count": 2}
    write_project(models, tmp_path, prompts={"train": source}, rewards=[])
    assert json.loads(rats(tmp_path, "stage", "rollout", "--dry-run", "--json").stdout)["samples"] == 2
    more = rats(tmp_path, "stage", "rollout", "--dry-run", "--json", "--set", "prompts.train.count=3")
    assert json.loads(more.stdout)["samples"] == 3
    wrong = rats(tmp_path, "plan", "--set", "prompts.train.colum=x", code=2).stderr
    assert "unknown key 'prompts.train.colum', did you mean 'column'?" in wrong


def test_dvc_watches_the_table_and_how_it_is_drawn_from(models: Path, tmp_path: Path) -> None:
    write_parquet(tmp_path / "p.parquet")
    hub = {"path": "org/prompts", "revision": "0" * 40}
    write_project(models, tmp_path, prompts={"train": {"path": "p.parquet"}, "test": hub})
    params: Params = load_params(tmp_path / "params.yaml")
    rollout = yaml.safe_load(dvc_yaml(params, tmp_path))["stages"]["rollout"]
    assert rollout["foreach"] == {"train": "${prompts.train.path}", "test": "params.yaml"}
    assert "prompts.${key}" in rollout["do"]["params"]


def test_files_that_are_no_tables_leave_dvc_yaml_as_it_was() -> None:
    assert dvc_yaml(load_params(ROOT / "params.yaml"), ROOT) == (ROOT / "dvc.yaml").read_text()
