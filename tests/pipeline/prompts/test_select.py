"""Which files of a folder or of the hub count, and that nothing else is looked at."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants

from rats.pipeline.prompts import read_prompts
from rats.schemas.errors import ConfigError, StorageError
from rats.schemas.params import PromptSource

COMMIT = "7" * 40
HPD = {"path": "org/HPDv2", "revision": COMMIT, "files": "benchmark/*.json"}


def write(folder: Path, **files: str) -> Path:
    """A list of one text in each file; `__` in a name is a slash."""
    for name, text in files.items():
        path = folder / (name.replace("__", "/") + ".json")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps([text]))
    return folder


def found(path: Path | str, **settings: Any) -> list[str]:
    return sorted(prompt.text for prompt in read_prompts(PromptSource(path=str(path), **settings)))


@pytest.mark.parametrize(
    ("settings", "texts"),
    [
        ({"split": "train"}, ["a fox"]),
        ({"split": "test"}, ["a frog", "a whale"]),
        ({"split": "validation"}, ["a boat"]),
        ({"files": "data/t*.json"}, ["a fox", "a frog"]),
        ({"files": "**/*.json", "split": "test"}, ["a frog", "a whale"]),
    ],
)
def test_a_split_or_a_pattern_chooses_files_of_a_folder(
    tmp_path: Path, settings: dict[str, str], texts: list[str]
) -> None:
    write(tmp_path, **{"data__train-00000": "a fox", "data__test": "a frog", "test__x": "a whale", "dev": "a boat"})
    assert found(tmp_path, **settings) == texts


def test_several_splits_or_none_of_the_name_are_refused(tmp_path: Path) -> None:
    write(tmp_path, train="a fox", test="a frog", trained="a whale")
    for settings, hint in (
        ({}, "several splits: choose by split: train or test"),
        ({"split": "validation"}, "no file whose name says split validation"),
        ({"files": "/etc/*"}, "no pattern"),
    ):
        with pytest.raises(ConfigError, match=hint):
            found(tmp_path, **settings)
    for settings in ({"split": "test"}, {"files": "*.json"}):
        with pytest.raises(ConfigError, match="leave"):
            found(tmp_path / "train.json", **settings)
    assert found(tmp_path / "train.json", split="train") == ["a fox"]


def test_hidden_folders_are_skipped_unless_they_are_named(tmp_path: Path) -> None:
    write(tmp_path, **{".cache/x": "a fox", "deep__.git/x": "a frog", "plain": "a whale"})
    (tmp_path / "__MACOSX").mkdir()
    (tmp_path / "__MACOSX" / "._plain.json").write_bytes(b"\0")
    assert found(tmp_path) == ["a whale"]
    assert found(tmp_path, files=".cache/*.json") == ["a fox"]


def test_what_tools_and_projects_leave_beside_prompts_is_not_read_with_them(tmp_path: Path) -> None:
    write(tmp_path, dataset_infos="no prompt", state="none either", prompts="a fox")
    assert found(tmp_path) == ["a fox"]
    (tmp_path / "texts").mkdir()
    for name in ("prompts", "LICENSE"):
        (tmp_path / "texts" / f"{name}.txt").write_text("a frog\n")
    with pytest.raises(ConfigError, match="LICENSE.txt, whose lines are no prompts"):
        found(tmp_path / "texts")
    assert found(tmp_path / "texts", files="p*.txt") == ["a frog"]


@pytest.mark.parametrize("name", ["a[1]", "a::b", "a*", "zip://b"])
def test_a_folder_may_be_called_anything(tmp_path: Path, name: str) -> None:
    assert found(write(tmp_path / name, p="a fox")) == found(tmp_path / name / "p.json") == ["a fox"]


@pytest.mark.parametrize("name", ["p.csv", "p.jsonl"])
def test_a_file_replaced_under_its_name_and_time_is_read_anew(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    for text in ("a red fox", "a red dog"):
        path.write_text(f"prompt\n{text}\n" if name == "p.csv" else json.dumps({"prompt": text}))
        os.utime(path, ns=(7, 7))
        assert found(path) == [text]


def test_no_home_and_no_library_is_needed_for_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    monkeypatch.setenv("HOME", "/dev/null")
    assert found(write(tmp_path, p="a fox")) == ["a fox"]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub's cache with one data set in it, and no way to the hub."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    snapshot = tmp_path / "hub" / "datasets--org--HPDv2" / "snapshots" / COMMIT
    write(snapshot, benchmark__anime="007", benchmark__photo="NA", train="a fox")
    return snapshot


def test_files_of_the_hub_are_read_like_ones_own(hub: Path) -> None:
    assert found(**HPD) == ["007", "NA"]
    assert found(**(HPD | {"files": "**/*.json", "split": "train"})) == ["a fox"]
    with pytest.raises(ConfigError, match="cannot read prompts from org/other"):
        found(**(HPD | {"path": "org/other"}))


def test_a_full_disk_is_named(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        try:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            raise RuntimeError("An error occurred") from None

    monkeypatch.setattr(huggingface_hub, "snapshot_download", full)
    with pytest.raises(StorageError, match="cache .*hub is full: free some space there, or set HF_HOME"):
        found(**HPD)
