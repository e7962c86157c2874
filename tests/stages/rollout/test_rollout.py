"""Stage one on tiny models: what it makes, what it never makes twice, and what survives a kill."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from diffusers import FluxTransformer2DModel
from torch.nn.modules.module import register_module_forward_pre_hook

from rats.pipeline.families.open import Model
from rats.pipeline.noise import noise
from rats.pipeline.solver import euler
from rats.pipeline.store.scores import read_scores, reward_columns
from rats.pipeline.store.shard_set import ShardSet
from rats.pipeline.store.shards import read_sample
from rats.schemas.errors import DataError
from rats.schemas.horizons import rows_of
from rats.schemas.params import Params
from rats.stages.rollout.rollout import rollout_stage
from rats.stages.rollout.worker import RolloutModels
from tests.support.project import PROMPTS, command, environment, settings, tree, write_project

STEPS, SAMPLES, SHARDS = 6, 6, 3


@pytest.fixture(scope="module")
def rolled(models: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Params, Path]:
    """An undisturbed rollout in this process: its parameters, and the folder where it is published in `data`."""
    folder = tmp_path_factory.mktemp("rolled")
    params = Params.model_validate(write_project(models, folder))
    with counting() as forwards:
        report = rollout_stage(params, "train", folder / "data")
    assert (report.samples, report.shards_total, report.shards_reused) == (SAMPLES, SHARDS, 0)
    # one full micro-batch a shard, two evaluations a step
    assert report.teacher_forwards == forwards() == SHARDS * STEPS * 2
    return params, folder


def is_computed(module: Any) -> bool:
    return isinstance(module, FluxTransformer2DModel) and not module.proj_out.weight.is_meta


@contextmanager
def counting() -> Iterator[Callable[[], int]]:
    """Counts the forwards of every FLUX network in this process; those on the meta device compute nothing."""
    seen: list[Any] = []
    hook = register_module_forward_pre_hook(lambda module, args: seen.append(1) if is_computed(module) else None)
    try:
        yield lambda: len(seen)
    finally:
        hook.remove()


def changed(params: Params, **blocks: dict[str, Any]) -> Params:
    values = params.model_dump(mode="json")
    return Params.model_validate(values | {name: values[name] | change for name, change in blocks.items()})


def test_a_stored_trajectory_is_the_teachers_own_at_the_students_sigmas(rolled: tuple[Params, Path]):
    params, folder = rolled
    shards = ShardSet.open(folder / "data")
    row = shards.index(shards.snapshot())[0]
    stored = {name: torch.from_numpy(array).float() for name, array in read_sample(shards, row).items()}
    teacher = Model.of(params).open_teacher()
    start = noise(params.teacher.seed, row.prompt_id, row.noise_index, teacher.latent_shape())[None]
    conditioning = teacher.encode([row.prompt])
    sigmas = shards.recipe.sigmas
    assert len(sigmas) == STEPS + 1
    states, x0s = euler(lambda x, sigma: teacher.guided_velocity(x, sigma, conditioning), start, sigmas)
    for nfe in params.teacher.nfe:
        student = teacher.stock_sigmas(nfe)
        kept, made = rows_of(shards.recipe.horizons, student), rows_of(sigmas, student)
        for k, j in zip(kept, made, strict=True):
            torch.testing.assert_close(stored["x"][k], states[j][0], atol=5e-3, rtol=2e-3)
        for k, j in zip(kept[:-1], made[:-1], strict=True):
            torch.testing.assert_close(stored["x0"][k], x0s[j][0], atol=5e-3, rtol=2e-3)


def test_a_second_call_runs_no_teacher_and_loads_none_and_says_so(
    rolled: tuple[Params, Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    params, folder = rolled
    before = tree(folder)
    loaded: list[str] = []
    load = FluxTransformer2DModel.from_pretrained.__func__
    spy = classmethod(lambda cls, *args, **kwargs: loaded.append("teacher") or load(cls, *args, **kwargs))
    monkeypatch.setattr(FluxTransformer2DModel, "from_pretrained", spy)
    with counting() as forwards, caplog.at_level("INFO", "rats"):
        report = rollout_stage(params, "train", folder / "data")
    assert (report.teacher_forwards, forwards(), loaded, report.shards_reused) == (0, 0, [], SHARDS)
    assert "no teacher forward is run" in caplog.text
    assert tree(folder) == before


def test_a_new_reward_is_scored_from_the_stored_finals_without_the_teacher(
    rolled: tuple[Params, Path], models: Path, tmp_path: Path
):
    params = rolled[0]
    more = [
        *params.model_dump()["rewards"],
        {"name": "second", "adapter": "pickscore", "path": str(models / "pickscore")},
    ]
    with counting() as forwards:
        report = rollout_stage(
            Params.model_validate(params.model_dump() | {"rewards": more}), "train", tmp_path / "data"
        )
    assert (report.teacher_forwards, forwards()) == (0, 0)
    shards = ShardSet.open(tmp_path / "data")
    assert sorted(record.name for record in reward_columns(shards).values()) == ["hpsv2", "second"]
    rows = shards.index(shards.snapshot())
    scores = [read_scores(shards, column, [row.key for row in rows]) for column in reward_columns(shards)]
    assert [len(column) for column in scores] == [SAMPLES, SAMPLES]


def test_a_grown_prompt_file_adds_shards_and_keeps_the_old_ones(rolled: tuple[Params, Path], tmp_path: Path):
    params, folder = rolled
    (tmp_path / "more.txt").write_text("\n".join([*PROMPTS, "a tall tree"]))
    report = rollout_stage(changed(params, prompts={"train": str(tmp_path / "more.txt")}), "train", tmp_path / "data")
    assert (report.samples, report.shards_total, report.shards_reused) == (SAMPLES + 1, SHARDS + 1, SHARDS)
    old, new = tree(folder / "data" / "shards"), tree(tmp_path / "data" / "shards")
    assert old.items() < new.items()


def test_a_changed_recipe_gets_a_new_address_and_a_changed_worker_count_does_not(rolled: tuple[Params, Path]):
    from rats.stages.plan.plan import plan_rollout

    params, _ = rolled
    assert plan_rollout(params, "train")["samples_missing"] == 0
    assert plan_rollout(changed(params, store={"workers": 7}), "train")["samples_missing"] == 0
    assert plan_rollout(changed(params, train={"alpha": 2.0}), "train")["samples_missing"] == 0
    assert plan_rollout(changed(params, teacher={"true_cfg_scale": 2.0}), "train")["samples_missing"] == SAMPLES
    assert plan_rollout(changed(params, teacher={"seed": 1}), "train")["samples_missing"] == SAMPLES


def test_scores_that_are_all_nan_are_an_error_and_not_silence(models: Path, tmp_path: Path):
    from safetensors.torch import load_file, save_file

    broken = tmp_path / "broken"
    broken.mkdir()
    for file in (models / "pickscore").iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    weights = load_file(broken / "model.safetensors")
    save_file({name: torch.full_like(w, torch.nan) for name, w in weights.items()}, broken / "model.safetensors")
    reward = {"name": "broken", "adapter": "pickscore", "path": str(broken)}
    values = settings(models, tmp_path, rewards=[reward], train={"reward": "broken"}, prompts={"train": "two.txt"})
    (tmp_path / "two.txt").write_text("a red fox\na green frog\n")
    params = changed(Params.model_validate(values), prompts={"train": str(tmp_path / "two.txt")})
    with pytest.raises(DataError, match="not finite"):
        rollout_stage(params, "train")


@pytest.mark.slow
def test_two_workers_one_of_which_is_killed_and_another_order_of_prompts_make_the_same_bytes(
    rolled: tuple[Params, Path], models: Path, tmp_path: Path
):
    write_project(models, tmp_path)
    (tmp_path / "prompts.txt").write_text("\n".join(reversed(PROMPTS)))
    with started(tmp_path, "--workers", "2", "--out", "data", "--json") as process:
        wait_for(lambda: list(tmp_path.glob("store/*/embeddings/*.safetensors")))
        killed = wait_for(lambda: kill_a_worker(process))
        out, err = process.communicate(timeout=300)
    assert killed and process.returncode == 0, err
    assert json.loads(out)["samples"] == SAMPLES
    assert tree(tmp_path / "data") == tree(rolled[1] / "data")


@pytest.mark.slow
def test_a_killed_rollout_takes_up_where_it_was(rolled: tuple[Params, Path], models: Path, tmp_path: Path):
    params = Params.model_validate(write_project(models, tmp_path))
    with started(tmp_path, "--out", "data") as process:
        wait_for(lambda: list(tmp_path.glob("store/*/shards/*.done.json")))
        process.kill()
    assert not (tmp_path / "data").exists()
    report = rollout_stage(params, "train", tmp_path / "data")
    assert report.shards_reused >= 1
    assert report.teacher_forwards == (SHARDS - report.shards_reused) * STEPS * 2
    assert tree(tmp_path / "data") == tree(rolled[1] / "data")


@pytest.mark.slow
def test_sigterm_ends_a_rollout_with_143_and_no_process_is_left(models: Path, tmp_path: Path):
    write_project(models, tmp_path, teacher={"steps": 4000})
    with started(tmp_path, "--workers", "1") as process:
        wait_for(lambda: list(tmp_path.glob("store/*/embeddings/*.safetensors")))
        children = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=120) == 143
    assert children and not psutil.wait_procs(children, timeout=60)[1]


def started(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    """`rats stage rollout`, running."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command("stage", "rollout", *arguments), cwd=folder, env=environment(), **pipes)


def wait_for(happened: Callable[[], Any], seconds: float = 300) -> Any:
    """What `happened` says, once it is true."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if result := happened():
            return result
        time.sleep(0.02)
    raise AssertionError(f"nothing happened in {seconds} s")


def kill_a_worker(process: subprocess.Popen[str]) -> bool:
    """Kill -9 to one worker; whether there was one."""
    if process.poll() is not None:
        raise AssertionError("the rollout ended before a worker was killed")
    for child in psutil.Process(process.pid).children(recursive=True):
        try:
            if "--multiprocessing-fork" in child.cmdline():
                child.kill()
                return True
        except (psutil.Error, OSError):
            continue
    return False


def test_the_context_loads_no_model_before_a_task_needs_one(rolled: tuple[Params, Path]):
    params, folder = rolled
    context = RolloutModels(params, ShardSet.open(folder / "data"))
    assert "teacher" not in context.__dict__ and "decoder" not in context.__dict__
    assert context.decoder is not None and "teacher" not in context.__dict__
