"""What `rats init` writes is read by YAML, DVC and the shell as it was meant, or nothing is written."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from dvc.repo import Repo

from rats.pipeline.prompts import Prompt, read_prompts
from rats.schemas.errors import ConfigError
from rats.schemas.params import load_params
from rats.stages.init import dvc_yaml, split_by_concept, write_dvc
from tests.support.project import rats, write_project

PARTI = "Prompt\tCategory\n" + "".join(f"a {thing}\tArts\n" for thing in ("fox", "frog", "boat", "star", "fox"))


@pytest.mark.parametrize(
    "name", ["flux #1", "it's: [mine]", "'quoted'", "off", "1e5", "- a", "{x}", "größe \U0001f98a"]
)
def test_a_models_name_is_written_as_it_is(models: Path, tmp_path: Path, name: str) -> None:
    shutil.copytree(models / "flux", tmp_path / "mm" / name)
    shutil.copytree(models / "hpsv2", tmp_path / "rr" / name)
    rats(tmp_path, "init", "mine", "--model", f"mm/{name}", "--reward", f"hpsv2=rr/{name}")
    params = load_params(tmp_path / "mine" / "params.yaml")
    places = [str(tmp_path / folder / name) for folder in ("mm", "rr")]
    assert [params.model.path, params.rewards[0].path] == places
    deps = yaml.safe_load((tmp_path / "mine" / "dvc.yaml").read_text())["stages"]["evaluate"]["deps"]
    assert deps[1:3] == ["${model.path}", "${rewards[0].path}"]


@pytest.mark.parametrize("arguments", [["--model", "a/${HOME}", "--family", "flux"], ["--reward", "hpsv2=$HOME/r"]])
def test_what_could_not_be_loaded_is_not_written(tmp_path: Path, arguments: list[str]) -> None:
    assert "variables of the shell" in rats(tmp_path, "init", "mine", *arguments, code=2).stderr
    assert not (tmp_path / "mine").exists()


def test_the_next_three_commands_are_said_as_the_shell_takes_them(models: Path, tmp_path: Path) -> None:
    mine = ["--model", str(models / "flux"), "--reward", f"hpsv2={models / 'hpsv2'}"]
    said = rats(tmp_path, "init", "my project", *mine).stdout
    lines = [line.removeprefix("next: ") for line in said.splitlines() if line.startswith("next: ")]
    assert shlex.split(lines[0]) == ["cd", "my project"] and len(lines) == 3
    rats(tmp_path / "my project", *shlex.split(lines[2])[1:], "--dry-run", "--set", "teacher.height=16")
    again = json.loads(rats(tmp_path, "init", "my project", "--force", "--json").stdout)
    assert again["next"] == lines and again["written"][-1].endswith("dvc.yaml")
    assert list(json.loads(rats(tmp_path, "init", "my project", "--dvc", "--json").stdout)) == ["written"]


def test_a_column_of_a_published_table_is_split(tmp_path: Path) -> None:
    (tmp_path / "parti.tsv").write_text(PARTI)
    refused = rats(tmp_path, "init", "mine", "--prompts", "parti.tsv", code=2).stderr
    assert "rats init --prompts parti.tsv --column Prompt" in refused
    rats(tmp_path, "init", "mine", "--prompts", "parti.tsv", "--column", "Prompt")
    files = (tmp_path / "mine" / "prompts").iterdir()
    assert sorted(p.text for f in files for p in read_prompts(f)) == ["a boat", "a fox", "a frog", "a star"]
    (tmp_path / "coco.json").write_text(json.dumps({"rows": [{"caption": f"a {i}"} for i in range(3, 8)]}))
    arguments = ["--prompts", "coco.json", "--field", "rows", "--column", "caption"]
    rats(tmp_path, "init", "other", *arguments)
    assert "name it by --prompts" in rats(tmp_path, "init", "third", "--column", "caption", code=2).stderr


def test_a_project_in_a_linked_folder_sees_its_model(models: Path, tmp_path: Path) -> None:
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "deep" / "er")
    rats(tmp_path, "init", "link/mine", "--model", str(models / "flux"))
    folder = tmp_path / "link" / "mine"
    assert os.path.samefile(folder / load_params(folder / "params.yaml").model.path, models / "flux")
    assert "${model.path}" in (folder / "dvc.yaml").read_text()


def test_dvc_reads_odd_names_and_a_path_below_home(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copytree(models / "flux", tmp_path / "flux #1")
    variants = {name: {} for name in ("off", "1e5x", "null", "007")}
    bound = {"control": {"gate.form": "constant", "gate.value_from": "runs/a: b"}}
    folder = tmp_path / "project"
    folder.mkdir()
    evaluated = [*variants, "control"]
    (folder / "style.safetensors").write_bytes(b"a LoRA")
    loras = [{"path": "style.safetensors"}]
    changes = {"model": {"path": "~/flux #1", "loras": loras}, "prompts": {"train": "prompts.txt"}}
    write_project(models, folder, variants=variants | bound, evaluate={"variants": evaluated}, **changes)
    write_dvc(folder)
    subprocess.run(["git", "init", "--quiet"], cwd=folder, check=True)
    (folder / ".dvc").mkdir()
    with Repo(str(folder)) as repo:
        stages = {stage.name: stage for stage in repo.index.stages}
    assert {f"train@{name}" for name in variants} | {"control@control"} < set(stages)
    assert "--variant 007 " in stages["train@007"].cmd
    deps = [dep.def_path for dep in stages["train@off"].deps]
    assert str(tmp_path / "flux #1") in deps and "style.safetensors" in deps
    assert "runs/a: b/run.json" in [dep.def_path for dep in stages["control@control"].deps]


def test_the_pipeline_of_plain_names_has_no_quotes_to_speak_of(models: Path, tmp_path: Path) -> None:
    write_project(models, tmp_path, prompts={"train": "prompts.txt"}, evaluate={"variants": ["rats"]})
    text = dvc_yaml(load_params(tmp_path / "params.yaml"), tmp_path)
    assert "foreach: [rats]" in text and '"' not in text


@pytest.mark.parametrize("concepts", range(4, 13))
def test_a_test_split_has_two_concepts_and_no_other_split_is_empty(concepts: int) -> None:
    parts = split_by_concept([Prompt(f"a {size} thing {i}", f"thing {i}") for i in range(concepts) for size in "abc"])
    counts = {split: len({prompt.concept for prompt in prompts}) for split, prompts in parts.items()}
    assert counts["test"] >= 2 and min(counts.values()) >= 1 and sum(counts.values()) == concepts


def test_three_concepts_are_too_few() -> None:
    with pytest.raises(ConfigError, match="3 concepts cannot be split in three, and test needs two"):
        split_by_concept([Prompt(text, text) for text in ("a fox", "a frog", "a whale")])


def test_a_model_in_the_project_is_named_from_there_and_one_elsewhere_by_its_whole_path(
    models: Path, tmp_path: Path
) -> None:
    shutil.copytree(models / "flux", tmp_path / "mine" / "flux")
    shutil.copytree(models / "hpsv2", tmp_path / "hpsv2")
    rats(tmp_path, "init", "mine", "--model", "mine/flux", "--reward", "hpsv2=hpsv2")
    params = load_params(tmp_path / "mine" / "params.yaml")
    assert (params.model.path, params.rewards[0].path) == ("flux", str(tmp_path / "hpsv2"))
