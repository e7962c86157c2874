"""The command line: what it offers, what it says when something is wrong, and how fast it is."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml

from rats.pipeline.prompts import read_prompts
from rats.schemas.identity import LARGEST_SEED
from rats.schemas.params import load_params
from rats.stages.cli.main import app
from rats.stages.cli.shards import shards
from rats.stages.cli.stage import stage
from tests.support.project import command, environment, rats, spawn, tree, write_project

COMMON = {"params", "set_", "json_"}
WHERE = {
    *("workers", "scheduler_address", "scheduler_file", "tls_ca_file", "tls_cert", "tls_key", "cluster"),
    *("worker_resources", "wait_for_workers", "performance_report"),
}
COMMANDS = {
    "stage rollout": {"split", "out", "report_path", "max_bad", "seed", "dry_run"} | COMMON | WHERE,
    "stage score": {"split", "shards", "reward", "snapshot", "retry_failed"}
    | {"out", "report_path", "max_bad", "seed", "dry_run"}
    | COMMON
    | WHERE,
    "stage train": {"shards", "variant", "out", "resume", "force", "checkpoints_total_limit"}
    | {"max_bad", "seed", "dry_run"}
    | COMMON,
    "stage evaluate": {"split", "shards", "runs", "out", "update_lengths", "seed", "dry_run"} | COMMON,
    "stage report": {"runs", "evaluation", "out", "sheet", "verdicts", "dry_run"} | COMMON,
    "shards ls": {"path", "json_"},
    "shards info": {"path", "json_"},
    "shards verify": {"path", "json_", "rescore", "seed", "params", "set_"},
    "shards preview": {"path", "out", "count", "seed"} | COMMON,
    "shards export": {"path", "out", "license_", "license_name", "license_link", "teacher", "title", "json_"},
    "shards import": {"folder", "store", "json_"},
    "shards gc": {"store", "root", "older_than", "delete", "json_"},
    "shards diff": {"a", "b", "snapshot_a", "snapshot_b", "json_"},
    "plan": {"split", "experiments", "price", "workers", "rate"} | COMMON,
    "init": {"folder", "model", "family", "prompts", "column", "field", "reward", "force", "dvc", "demo", "json_"},
    "generate": {"prompt", "nfe", "run", "out", "count", "enlarge", "seed"} | COMMON,
    "export": {"run", "out", "merged", "evaluation", "dry_run"} | COMMON,
    "serve": {"name", "host", "port", "max_batch", "queue", "token_file", "callable_"} | COMMON,
    "doctor": COMMON,
}
"""Frozen: scripts and dvc.yaml files out there call these."""


def test_the_command_line_is_the_frozen_one():
    groups = {"": app, "stage ": stage, "shards ": shards}
    found = {
        prefix + (entry.name or entry.callback.__name__): set(entry.callback.__annotations__) - {"return"}
        for prefix, group in groups.items()
        for entry in group.registered_commands
    }
    assert found == COMMANDS


def test_help_loads_no_torch_and_takes_less_than_half_a_second(tmp_path: Path):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = spawn(tmp_path, "--help")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert "generate" in done.stdout
    # processor time: what the machine's other work does to the clock is not ours
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.5


@pytest.mark.parametrize("name", ["rats", "rats.stages.cli.main"])
def test_the_version_is_said_by_every_way_to_start(tmp_path: Path, name: str):
    line = [command()[0], "-m", name, "--version"]
    done = subprocess.run(line, cwd=tmp_path, env=environment(), capture_output=True, text=True, check=True)
    assert done.stdout == f"rats {version('rats')}\n"


@pytest.mark.parametrize("arguments", [["--help"], ["stage", "--help"], ["stage", "rollout", "--help"]])
def test_help_imports_nothing_heavy(tmp_path: Path, arguments: list[str]):
    line = command(*arguments)
    done = subprocess.run(
        [line[0], "-X", "importtime", *line[1:]], cwd=tmp_path, env=environment(), capture_output=True
    )
    loaded = {row.split(b"|")[-1].strip().decode() for row in done.stderr.splitlines()}
    assert loaded & {"torch", "numpy", "distributed", "rich", "transformers"} == set()


def test_a_usage_error_exits_2(tmp_path: Path):
    assert "No such option" in rats(tmp_path, "stage", "rollout", "--nope", code=2).stderr


def test_an_error_is_one_line_and_the_exit_code_of_the_process(tmp_path: Path):
    done = spawn(tmp_path, "stage", "rollout", "--params", "other.yaml", code=2)
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and done.stdout == ""


@pytest.mark.parametrize(
    ("change", "hint"),
    [
        ({"train": {"apha": 2}}, "did you mean 'alpha'?"),
        ({"prompts": {"train": "nowhere.txt"}}, "nowhere.txt"),
        ({"prompts": {"train": "empty.txt"}}, "has no prompts"),
        ({"model": {"path": "models/nowhere"}}, "models/nowhere"),
        ({"rewards": [{"name": "hpsv2", "adapter": "hpsv2", "path": "models/nothing"}]}, "models/nothing"),
    ],
)
def test_a_wrong_value_is_one_line_with_exit_code_2_and_nothing_is_written(
    models: Path, tmp_path: Path, change: dict, hint: str
):
    (tmp_path / "models").mkdir()
    write_project(models, tmp_path, **change)
    (tmp_path / "empty.txt").write_text("\n")
    before = tree(tmp_path)
    done = rats(tmp_path, "stage", "rollout", "--out", "data", code=2)
    assert hint in done.stderr and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["stage", "rollout", "--params", "other.yaml"], "other.yaml"),
        (["stage", "rollout", "--split", "trian"], "trian"),
        (["stage", "rollout", "--split", "test"], "prompts.test"),
        (["stage", "rollout", "--set", "teacher.stesp=4"], "did you mean 'steps'?"),
        (["stage", "train", "--variant", "rast", "--dry-run"], "did you mean 'rats'?"),
        (["shards", "ls", "nowhere"], "nowhere"),
        (["init", "new", "--reward", "pick=models"], "pickscore"),
    ],
)
def test_a_wrong_argument_is_one_line_with_exit_code_2(models: Path, tmp_path: Path, arguments: list[str], hint: str):
    write_project(models, tmp_path)
    done = rats(tmp_path, *arguments, code=2)
    assert hint in done.stderr and done.stderr.count("\n") == 1


SEEDED = [name for name, flags in COMMANDS.items() if "seed" in flags]


@pytest.mark.parametrize("name", SEEDED)
@pytest.mark.parametrize("seed", [-1, LARGEST_SEED + 1, 2**65])
def test_every_command_refuses_a_seed_that_is_none(tmp_path: Path, name: str, seed: int):
    arguments = ["a fox"] if name == "generate" else ["."] if name.startswith("shards ") else []
    said = rats(tmp_path, *name.split(), *arguments, "--seed", str(seed), code=2).stderr
    assert "Invalid value for '--seed'" in said and "Traceback" not in said


def test_a_folder_that_is_no_shard_set_exits_65(tmp_path: Path):
    done = rats(tmp_path, "shards", "info", ".", code=65)
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


def test_a_store_that_cannot_be_created_exits_73(models: Path, tmp_path: Path):
    (tmp_path / "taken").write_text("a file in the way")
    write_project(models, tmp_path, store={"path": str(tmp_path / "taken")})
    done = rats(tmp_path, "stage", "rollout", code=73)
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


def test_a_dry_run_says_what_it_would_cost_and_writes_nothing(models: Path, tmp_path: Path):
    write_project(models, tmp_path)
    before = tree(tmp_path)
    plan = json.loads(rats(tmp_path, "stage", "rollout", "--out", "data", "--dry-run", "--json").stdout)
    assert (plan["samples"], plan["samples_missing"], plan["evaluations"]) == (6, 6, 6 * 6 * 2)
    assert tree(tmp_path) == before


def test_shards_are_listed_described_and_verified_to_the_last_byte(models: Path, tmp_path: Path):
    write_project(models, tmp_path)
    report = json.loads(rats(tmp_path, "stage", "rollout", "--out", "data", "--json").stdout)
    (row,) = json.loads(rats(tmp_path, "shards", "ls", "data", "--json").stdout)["sets"]
    assert (row["fingerprint"], row["samples"]) == (report["fingerprint"], 6)
    assert json.loads(rats(tmp_path, "shards", "info", "data", "--json").stdout)["steps"] == 6
    assert json.loads(rats(tmp_path, "shards", "verify", "data", "--json").stdout)["ok"]
    shard = next((tmp_path / "data").glob("shards/*.tar"))
    whole = bytearray(shard.read_bytes())
    whole[len(whole) // 2] ^= 1
    shard.unlink()  # it is a hardlink: written in place, the store would change with it
    shard.write_bytes(whole)
    done = rats(tmp_path, "shards", "verify", "data", code=65)
    assert "rats stage rollout" in done.stderr and done.stderr.count("\n") == 1


def test_init_writes_a_project_that_the_doctor_finds_well(models: Path, tmp_path: Path):
    (tmp_path / "mine.txt").write_text("a cat\na dog\na red door\na lake\n")
    arguments = ["--model", str(models / "flux"), "--reward", f"hpsv2={models / 'hpsv2'}"]
    rats(tmp_path, "init", "mine", "--prompts", "mine.txt", *arguments)
    said = rats(tmp_path / "mine", "doctor", "--json", "--set", "teacher.height=16", "--set", "teacher.width=16").stdout
    assert all(check["ok"] for check in json.loads(said)["checks"] if check["needed"])
    files = [tmp_path / "mine" / "prompts" / f"{split}.csv" for split in ("train", "validation", "test")]
    prompts = [prompt.text for file in files for prompt in read_prompts(file)]
    assert sorted(prompts) == ["a cat", "a dog", "a lake", "a red door"]
    pipeline = yaml.safe_load((tmp_path / "mine" / "dvc.yaml").read_text())
    assert set(pipeline["stages"]) == {"rollout", "train", "evaluate", "report"}
    assert "--force" in rats(tmp_path, "init", "mine", *arguments, code=73).stderr


def test_init_for_a_hub_model_names_no_file_that_is_not_there(tmp_path: Path):
    rats(tmp_path, "init", "flux")
    text = (tmp_path / "flux" / "dvc.yaml").read_text()
    assert "${model.path}" not in text and "${rewards" not in text
    assert load_params(tmp_path / "flux" / "params.yaml").model.path == "black-forest-labs/FLUX.1-dev"


@pytest.mark.parametrize(("given", "expected"), [(None, "PASSIVE"), ("ACTIVE", "ACTIVE")])
def test_threads_wait_without_spinning_unless_told_and_before_torch_reads_it(given: str | None, expected: str) -> None:
    code = "import os, sys; from rats.stages.cli.console import guarded\n"
    code += "guarded(lambda: print(os.environ['OMP_WAIT_POLICY'], 'torch' in sys.modules))"
    child = {name: value for name, value in environment().items() if name != "OMP_WAIT_POLICY"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=child | ({"OMP_WAIT_POLICY": given} if given else {}),
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == [expected, "False"]
