"""`rats doctor`: it says what is there, and its exit code is about what the parameters need and nothing else."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from rats.pipeline.families.flux import Flux
from rats.pipeline.rewards.hpsv2 import HPSv2
from rats.pipeline.weights.hub import only_cached, resolve
from rats.schemas.errors import ConfigError
from rats.stages.doctor import packages
from rats.stages.doctor.params import check_params
from tests.support.project import environment, rats, write_project


def findings(folder: Path, *arguments: str, code: int = 0) -> dict[str, dict[str, Any]]:
    """What the doctor says, by check."""
    checks = json.loads(rats(folder, "doctor", "--json", *arguments, code=code).stdout)["checks"]
    assert all(set(check) == {"check", "ok", "needed", "found"} for check in checks)
    return {check["check"]: check for check in checks}


def project(models: Path, folder: Path, **changes: Any) -> Path:
    write_project(models, folder, evaluate={"judges": []}, **changes)
    return folder


def test_outside_of_a_project_the_installation_is_looked_at(tmp_path: Path):
    found = findings(tmp_path)
    assert found["torch"]["found"].startswith(version("torch")) and ">=" in found["torch"]["found"]
    assert found["distributed"]["ok"], "what dask[distributed] brings is the core's too"
    assert found["device cpu"]["ok"] and "torch threads" in found["device cpu"]["found"]
    assert found["family flux"]["found"].startswith("rats ") and found["reward adapter hpsv2"]["ok"]
    assert found["params"] == {
        "check": "params",
        "ok": False,
        "needed": False,
        "found": "no params.yaml in this folder: `rats init DIR` writes one",
    }


def test_a_file_that_was_asked_for_must_be_there_and_right(tmp_path: Path):
    assert "other.yaml" in findings(tmp_path, "--params", "other.yaml", code=2)["params"]["found"]
    (tmp_path / "params.yaml").write_text("modle: {}\n")
    assert "'model' is missing" in findings(tmp_path, code=2)["params"]["found"]


def test_a_project_is_well_when_all_that_it_needs_is_there(models: Path, tmp_path: Path):
    found = findings(project(models, tmp_path))
    assert all(check["ok"] for check in found.values() if check["needed"])
    assert "horizons" in found["model"]["found"] and "of weights" in found["model"]["found"]
    assert found["prompts.train"]["found"].startswith("6 in ")
    assert found["reward hpsv2"]["found"].endswith(f"vocabulary in {models / 'hpsv2'}")
    assert "write" in found["disk"]["found"] and "free" in found["disk"]["found"]
    lines = rats(tmp_path, "doctor").stdout.splitlines()
    assert len(lines) == len(found) and {line.split("  ")[0] for line in lines} == set(found)


@pytest.mark.parametrize(
    ("change", "check", "hint"),
    [
        ({"compute": {"device": "hip"}}, "compute.device", "compute.device is 'hip'"),
        ({"compute": {"device": "gpu"}}, "compute.device", "compute.device is 'gpu'"),
        ({"model": {"path": "org/model"}}, "model", "hf download org/model"),
        ({"rewards": [{"name": "hpsv2", "adapter": "hpsv2", "path": "org/reward"}]}, "reward hpsv2", "hf download"),
        ({"store": {"path": "gs://bucket/store"}}, "extra gcs", "pip install 'rats[gcs]'"),
        ({"prompts": {"train": "nowhere.txt"}}, "prompts.train", "nowhere.txt"),
    ],
)
def test_what_the_parameters_need_and_is_not_there_is_a_failure(
    models: Path, tmp_path: Path, change: dict[str, Any], check: str, hint: str
):
    found = findings(project(models, tmp_path, **change), code=2)
    bad = {name: one for name, one in found.items() if one["needed"] and not one["ok"]}
    assert hint in bad[check]["found"] and set(bad) <= {check, "disk"}


@pytest.mark.parametrize("method", ["latent_shape", "schedule", "check_index", "conditioning_shapes", "fits"])
def test_a_fault_in_somebody_elses_family_is_a_row_and_no_traceback(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
):
    def faulty(*_: object) -> object:
        return {}["nothing"]

    monkeypatch.setattr(Flux, method, faulty)
    monkeypatch.chdir(project(models, tmp_path))
    rows = check_params(Path("params.yaml"), [], is_default=False)
    (row,) = (row for row in rows if row["check"] == "model")
    assert not row["ok"] and "KeyError: 'nothing'" in row["found"]
    assert "does not load as" in row["found"] or f"({__file__}, line " in row["found"]


@pytest.mark.parametrize("device", ["hip", "mps:9", "gpu", ""])
def test_the_doctor_and_the_stages_refuse_a_device_in_the_same_words(models: Path, tmp_path: Path, device: str):
    folder = project(models, tmp_path, compute={"device": device})
    said = findings(folder, code=2)["compute.device"]["found"]
    assert said.startswith(f"compute.device is {device!r}, on which torch computes nothing here (")
    for stage in (["rollout"], ["train", "--shards", "."]):
        assert rats(folder, "stage", *stage, code=2).stderr.splitlines()[-1] == f"error: {said}"


def test_a_model_with_a_part_away_is_no_model(models: Path, tmp_path: Path):
    shutil.copytree(models / "flux", tmp_path / "flux")
    (tmp_path / "flux" / "text_encoder" / "model.safetensors").unlink()
    found = findings(project(models, tmp_path, model={"path": str(tmp_path / "flux")}), code=2)
    assert "no weights" in found["model"]["found"] and "text_encoder" in found["model"]["found"]
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors"}}
    (tmp_path / "flux" / "text_encoder" / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "model-00001-of-00002" in findings(tmp_path, code=2)["model"]["found"]


def test_a_reward_without_a_vocabulary_asks_the_cache_for_it(models: Path, tmp_path: Path):
    reward = shutil.copytree(models / "hpsv2", tmp_path / "hpsv2")
    for name in ("tokenizer.json", "vocab.json", "merges.txt"):
        (reward / name).unlink(missing_ok=True)
    rewards = [{"name": "hpsv2", "adapter": "hpsv2", "path": str(reward)}]
    found = findings(project(models, tmp_path, rewards=rewards), code=2)
    assert HPSv2.tokenizer_source.repository in found["reward hpsv2"]["found"]


def test_a_rollout_that_does_not_fit_on_the_disk_is_a_failure(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = project(models, tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(2**40, 2**40 - 4096, 4096))
    assert "free some space" in findings(folder, code=2)["disk"]["found"]
    rats(tmp_path, "stage", "rollout")  # what is there already needs no room
    assert findings(folder)["disk"]["ok"]


def test_old_and_missing_packages_come_with_their_line(monkeypatch: pytest.MonkeyPatch):
    asked = ["numpy>=1000", "no-such-package>=2 ; python_version > '3'", "numpy>=1", "other>=1; extra == 'more'"]
    monkeypatch.setattr(packages, "requires", lambda name: asked)
    rows = packages.packages()[2:]
    assert [one["ok"] for one in rows] == [False, False, True] and all(one["needed"] for one in rows)
    assert f"{version('numpy')}, and >=1000 is asked for: pip install 'numpy>=1000'" == rows[0]["found"]
    assert rows[1]["found"] == "not installed: pip install 'no-such-package>=2'"


def test_without_its_packages_the_doctor_still_speaks(tmp_path: Path):
    for name in ("torch", "diffusers", "pydantic", "yaml"):
        (tmp_path / f"{name}.py").write_text("raise ImportError('as if it were not here')")
    code = "import sys; sys.path.insert(0, sys.argv[1]); from rats.stages.doctor.packages import packages; packages()"
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, env=environment())


def test_inside_of_only_cached_the_hub_is_left_alone(monkeypatch: pytest.MonkeyPatch):
    asked: list[bool] = []
    original = huggingface_hub.snapshot_download

    def listening(*arguments: Any, local_files_only: bool, **options: Any) -> str:
        asked.append(local_files_only)
        return original(*arguments, local_files_only=True, **options)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", listening)
    with only_cached(), pytest.raises(ConfigError, match="hf download org/model"):
        resolve("org/model")
    with pytest.raises(ConfigError, match="in reach"):
        resolve("org/model")
    assert asked == [True, False]
