"""What would stop a rollout at its end stops it before the teacher runs: the run itself, --dry-run and the doctor."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from tests.support.project import rats, write_project

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 2379876\n"
OUT = "data/teacher/train"
COMMANDS = (
    ("stage", "rollout", "--split", "train", "--out", OUT),
    ("stage", "rollout", "--split", "train", "--out", OUT, "--dry-run"),
)


def project(models: Path, folder: Path, **changes: Any) -> Path:
    """A project with models of its own, to break."""
    for name in ("flux", "hpsv2"):
        shutil.copytree(models / name, folder / name)
    rewards = [{"name": "hpsv2", "adapter": "hpsv2", "path": str(folder / "hpsv2")}]
    model = {"path": str(folder / "flux")}
    write_project(models, folder, model=model, rewards=rewards, evaluate={"judges": []}, **changes)
    return folder


def assert_refused(folder: Path, said: str, code: int) -> None:
    """By all three, in a line that holds `said`, and with no sample made."""
    for command in COMMANDS:
        errors = rats(folder, *command, code=code).stderr.splitlines()
        assert said in errors[-1] and errors[-1].startswith("error: ")
    checks = json.loads(rats(folder, "doctor", "--json", code=2).stdout)["checks"]
    bad = [check["found"] for check in checks if check["needed"] and not check["ok"]]
    assert len(bad) == 1 and said in bad[0]
    assert not list(folder.glob("store/*/shards/*.tar"))


def something_else(folder: Path) -> None:
    (folder / OUT).mkdir(parents=True)
    (folder / OUT / "thesis.txt").write_text("years")


def a_file_in_the_way(folder: Path) -> None:
    (folder / "data").write_text("no folder")


@pytest.mark.parametrize(
    ("breaks", "said"),
    [(something_else, "holds something else than a shard set"), (a_file_in_the_way, "cannot create")],
)
def test_a_folder_that_cannot_be_published_into(
    breaks: Callable[[Path], None], said: str, models: Path, tmp_path: Path
) -> None:
    breaks(project(models, tmp_path))
    assert_refused(tmp_path, said, 73)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-64])


def pointer(path: Path) -> None:
    path.write_bytes(POINTER)


@pytest.mark.parametrize("name", ["flux/transformer/diffusion_pytorch_model", "hpsv2/open_clip_model"])
@pytest.mark.parametrize(("breaks", "said"), [(cut, "does not load as"), (pointer, "run `git lfs pull`")])
def test_weights_that_will_not_load(
    name: str, breaks: Callable[[Path], None], said: str, models: Path, tmp_path: Path
) -> None:
    breaks(project(models, tmp_path) / f"{name}.safetensors")
    assert_refused(tmp_path, said, 65)


def test_a_cut_pickle_is_found_by_its_header(models: Path, tmp_path: Path) -> None:
    folder = project(models, tmp_path)
    (folder / "hpsv2" / "open_clip_model.safetensors").unlink()
    (folder / "hpsv2" / "HPS_v2.1_compressed.pt").write_bytes(b"PK\x03\x04" + bytes(64))
    assert_refused(tmp_path, "HPS_v2.1_compressed.pt does not load", 65)


def test_a_reward_of_which_only_loading_shows_the_fault_is_loaded_before_the_teacher_runs(
    models: Path, tmp_path: Path
) -> None:
    path = project(models, tmp_path) / "hpsv2" / "open_clip_model.safetensors"
    state = load_file(path)
    save_file({name: value for name, value in state.items() if name != "logit_scale"}, path)
    assert "lacks 1 weights, logit_scale first" in rats(tmp_path, *COMMANDS[0], code=65).stderr
    assert not list(tmp_path.glob("store/*/shards/*.tar"))


def test_a_report_that_cannot_be_written(models: Path, tmp_path: Path) -> None:
    a_file_in_the_way(project(models, tmp_path))
    for more in ((), ("--dry-run",)):
        said = rats(tmp_path, "stage", "rollout", "--report", "data/rollout.json", *more, code=73).stderr
        assert "cannot create" in said and "data/rollout.json" in said


def test_a_finished_rollout_asks_for_none_of_it(models: Path, tmp_path: Path) -> None:
    folder = project(models, tmp_path)
    rats(folder, "stage", "rollout")
    something_else(folder)
    again = json.loads(rats(folder, *COMMANDS[1], "--json").stdout)
    assert again["samples_missing"] == 0
    assert "holds something else" in rats(folder, *COMMANDS[0], code=73).stderr


def test_a_test_split_with_one_concept(models: Path, tmp_path: Path) -> None:
    (tmp_path / "test.csv").write_text("prompt,concept\na yellow star,star\na red star,star\n")
    project(models, tmp_path, prompts={"test": str(tmp_path / "test.csv")})
    for more in ((), ("--dry-run",)):
        said = rats(tmp_path, "stage", "rollout", "--split", "test", *more, code=2).stderr
        assert "is about 'star' alone" in said
    rows = [line for line in rats(tmp_path, "doctor", code=2).stdout.splitlines() if line.startswith("prompts.test")]
    assert len(rows) == 1 and "is about 'star' alone" in rows[0]


def test_what_splits_share_is_said_by_doctor_and_rollout_and_stops_neither(
    models: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "test.txt").write_text("a red fox\na purple lake\na grey wolf\n")
    project(models, tmp_path, prompts={"test": str(tmp_path / "test.txt")})
    said = "1 of 3 prompts of prompts.test are in prompts.train too"
    held_out = [line for line in rats(tmp_path, "doctor").stdout.splitlines() if line.startswith("held out")]
    assert len(held_out) == 1 and said in held_out[0] and "  -  " in held_out[0]
    rats(tmp_path, "stage", "rollout", "--split", "test")
    warned = [record.message for record in caplog.records if record.name.startswith("rats.")]
    assert warned[0].startswith(said)
    (tmp_path / "test.txt").write_text("a purple lake\na grey wolf\n")
    assert "  yes  no prompt and no known concept" in rats(tmp_path, "doctor").stdout
