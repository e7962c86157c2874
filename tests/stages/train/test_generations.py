"""Which teacher is followed: `model.transformer`, generations of shards rolled out from the student, live teachers."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel

from rats.pipeline.families.open import Model
from rats.pipeline.store.shard_set import ShardSet
from rats.schemas.errors import ConfigError, DataError
from rats.schemas.fused_lora import FusedLora
from rats.schemas.params import Params
from rats.schemas.recipe import Recipe, fingerprint
from rats.stages.rollout.columns import check_recipe
from rats.stages.rollout.rollout import read_recipe, rollout_stage
from rats.stages.train.record import read_record
from rats.stages.train.train import train_stage
from tests.stages.train.test_train import params_of, rows
from tests.support import tiny
from tests.support.project import ROOT, environment
from tests.support.styles import write_lora

WEIGHTS = "student/diffusion_pytorch_model.safetensors"
MIXED = {"lr": 1e-2, "alpha": 1.0, "reward_weight": 0.0, "augment": 0.0}
"""With these one generation is refused and the next one accepted."""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models, prompts and published shards, made once; tests take copies of what they change."""
    folder = tmp_path_factory.mktemp("home")
    tiny.write_flux(folder / "flux")
    tiny.write_pickscore(folder / "pick")
    tiny.transformer(seed=3).save_pretrained(folder / "other")
    (folder / "prompts.txt").write_text("\n".join(tiny.PROMPTS[:4]) + "\n")
    rollout_stage(params_of(folder), "train", folder / "shards")
    return folder


def moving(home: Path, store: Path, steps: int = 6, mode: str = "refresh", **changes: Any) -> Params:
    """A short run with a teacher that moves; its generations go into `store`."""
    teacher = {"mode": mode, "every": 2, "ema": 0.2}
    params = params_of(home, **{**MIXED, "steps": steps, "checkpoint_every": 100, **changes})
    train = params.train.model_validate(params.train.model_dump() | {"teacher": teacher})
    return params.model_copy(
        update={"train": train, "store": params.store.model_copy(update={"path": str(store / "store")})}
    )


@pytest.fixture(scope="module")
def refreshed(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run of three generations, and the store that they are in."""
    folder = tmp_path_factory.mktemp("refreshed")
    train_stage(moving(home, folder), "rats", home / "shards", folder / "run")
    return folder


def other_network(params: Params, folder: Path) -> Params:
    return params.model_copy(update={"model": params.model.model_copy(update={"transformer": str(folder)})})


def recipe_of(params: Params) -> Recipe:
    return read_recipe(params, Model.of(params))


def test_another_network_is_another_address_and_the_same_one_elsewhere_is_not(home: Path, tmp_path: Path) -> None:
    base = recipe_of(params_of(home))
    other = recipe_of(other_network(params_of(home), home / "other"))
    assert fingerprint(base) != fingerprint(other)
    assert {name for name in base.weights if base.weights[name] != other.weights[name]} == {"transformer"}
    shutil.copytree(home / "flux" / "transformer", tmp_path / "same")
    assert recipe_of(other_network(params_of(home), tmp_path / "same")) == base


def test_the_network_of_model_transformer_is_the_one_that_runs(home: Path) -> None:
    params, wanted = other_network(params_of(home), home / "other"), tiny.transformer(seed=3).state_dict()
    for opened in (Model.of(params).open_student(), Model.of(params).open_teacher()):
        found = opened.network.state_dict()
        assert all(torch.equal(found[name], value) for name, value in wanted.items())
    assert Model.of(params).outline.latent_shape() == (4, 16)


def test_shards_of_the_pipelines_own_network_are_refused_for_another(home: Path) -> None:
    with pytest.raises(DataError, match="made with another transformer"):
        params = other_network(params_of(home), home / "other")
        check_recipe(params, Model.of(params), ShardSet.open(home / "shards"))


def test_a_folder_without_a_whole_network_is_refused(home: Path, tmp_path: Path) -> None:
    for folder in (tmp_path / "none", tmp_path):  # the second is where adapters alone might lie
        with pytest.raises(ConfigError, match="merged into one by `rats export`"):
            recipe_of(other_network(params_of(home), folder))


def test_a_generation_of_a_styled_teacher_is_not_styled_twice(home: Path, tmp_path: Path) -> None:
    style = FusedLora(path=str(write_lora(Model.of(params_of(home)), tmp_path / "style")), weight=0.8)
    params = moving(home, tmp_path, steps=3)
    params = params.model_copy(update={"model": params.model.model_copy(update={"loras": (style,)})})
    rollout_stage(params, "train", tmp_path / "shards")
    train_stage(params, "rats", tmp_path / "shards", tmp_path / "run")
    _, made = read_record(tmp_path / "run").generations
    network = Model.of(other_network(params_of(home), tmp_path / "run/generations/000002/network")).folder
    recipe = ShardSet.open(tmp_path / "store" / made.fingerprint).recipe
    assert recipe.weights["transformer"] == network.hash_of("transformer")


def test_a_generation_is_followed_exactly_when_its_mean_reward_has_not_fallen(refreshed: Path) -> None:
    first, *others = read_record(refreshed / "run").generations
    assert [one.step for one in (first, *others)] == [0, 2, 4] and first.accepted
    best = first.mean_reward
    for one in others:
        assert one.accepted == (one.mean_reward >= best)
        best = one.mean_reward if one.accepted else best
    assert {one.accepted for one in others} == {True, False}  # both were seen


def test_the_age_of_what_is_followed_is_in_the_metrics_and_its_scores_too(refreshed: Path) -> None:
    generations, found = read_record(refreshed / "run").generations, rows(refreshed / "run")
    born = [max(g.step for g in generations if g.accepted and g.step <= step) for step in range(6)]
    assert [int(row["teacher_age"]) for row in found] == [step - born[step] for step in range(6)]
    assert all(0 <= float(row["teacher_beaten"]) <= 1 for row in found)
    # each generation is read from its first sample on, one that goes on being followed from where it was
    assert [int(row["position"]) for row in found] == [4 * (step - born[step] + 1) for step in range(6)]
    # a whole epoch, two batches of four, of the generation that is followed last
    last = next(g for g in generations if g.step == born[-1])
    assert sum(float(row["reward_teacher"]) for row in found[4:]) / 2 == pytest.approx(last.mean_reward, rel=1e-5)


def test_a_generation_has_the_same_prompts_and_noises_and_the_students_guidance(home: Path, refreshed: Path) -> None:
    base = ShardSet.open(home / "shards")
    for one in read_record(refreshed / "run").generations[1:]:
        shards = ShardSet.open(refreshed / "store" / one.fingerprint)
        assert shards.recipe.true_cfg_scale == 1.0 and shards.recipe.sigmas == base.recipe.sigmas
        assert [row.key for row in shards.index(shards.snapshot())] == [row.key for row in base.index(base.snapshot())]
        prompt = shards.index(shards.snapshot())[0].prompt_id
        assert shards.embedding_path(prompt).samefile(base.embedding_path(prompt))  # type: ignore[union-attr]
        assert shards.snapshot().hash == one.snapshot and one.shard_bytes > 0


@pytest.mark.slow
def test_a_run_that_stops_between_generations_goes_on_to_the_last_bit(
    home: Path, refreshed: Path, tmp_path: Path
) -> None:
    train_stage(moving(home, tmp_path, steps=5), "rats", home / "shards", tmp_path / "run")
    for one in (tmp_path / "store").iterdir():
        shutil.rmtree(one)  # what is followed is made again, from its network
    train_stage(moving(home, tmp_path), "rats", home / "shards", tmp_path / "run", resume="latest")
    assert (tmp_path / "run" / WEIGHTS).read_bytes() == (refreshed / "run" / WEIGHTS).read_bytes()
    assert rows(tmp_path / "run") == rows(refreshed / "run")
    assert read_record(tmp_path / "run").generations == read_record(refreshed / "run").generations


def test_a_run_that_stops_where_a_generation_is_due_makes_it_as_it_would_have_been(
    home: Path, refreshed: Path, tmp_path: Path
) -> None:
    shutil.copytree(refreshed, tmp_path / "copy")
    run = tmp_path / "copy" / "run"
    shutil.rmtree(run / "checkpoints" / "000006")
    (torn,) = run.glob("generations/000004")
    (torn / "generation.json").unlink()  # as after a kill in the rollout
    train_stage(moving(home, tmp_path / "copy"), "rats", home / "shards", run, resume="latest")
    assert (run / WEIGHTS).read_bytes() == (refreshed / "run" / WEIGHTS).read_bytes()
    assert read_record(run).generations == read_record(refreshed / "run").generations


@pytest.mark.slow
def test_adapters_are_merged_into_the_network_that_a_generation_is_rolled_from(home: Path, tmp_path: Path) -> None:
    params = moving(home, tmp_path, steps=3, lora={"rank": 2, "alpha": 2.0})
    train_stage(params, "rats", home / "shards", tmp_path / "run")
    network = FluxTransformer2DModel.from_pretrained(tmp_path / "run" / "generations" / "000002" / "network")
    base = tiny.transformer().state_dict()
    changed = {name for name, value in network.state_dict().items() if not torch.equal(value, base[name])}
    assert changed and all("attn" in name or "ff" in name for name in changed)


def test_a_damaged_record_of_a_generation_is_no_crash(home: Path, refreshed: Path, tmp_path: Path) -> None:
    shutil.copytree(refreshed, tmp_path / "copy")
    (tmp_path / "copy" / "run" / "generations" / "000002" / "generation.json").write_text("{")
    with pytest.raises(DataError, match="is no record of a generation"):
        train_stage(moving(home, tmp_path / "copy"), "rats", home / "shards", tmp_path / "copy" / "run", "latest")


def test_a_live_teacher_is_counted_and_its_run_says_so(home: Path, tmp_path: Path) -> None:
    report = train_stage(moving(home, tmp_path, 3, "live-ema"), "rats", home / "shards", tmp_path / "run")
    assert report.teacher_forwards == 3 * 6 * 2  # steps of training, steps of the teacher, its guidance
    assert report.teacher_reward_calls == 3 * 4
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["teacher_mode"] == "live-ema" and record["generations"] == []
    assert [row["teacher_age"] for row in rows(tmp_path / "run")] == ["0", "0", "0"]


@pytest.mark.slow
def test_a_run_with_a_live_flux_goes_on_to_the_last_bit(home: Path, tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    train_stage(moving(home, tmp_path, 3, "live-ema"), "rats", home / "shards", whole)
    train_stage(moving(home, tmp_path, 2, "live-ema"), "rats", home / "shards", cut)
    train_stage(moving(home, tmp_path, 3, "live-ema"), "rats", home / "shards", cut, resume="latest")
    assert (whole / WEIGHTS).read_bytes() == (cut / WEIGHTS).read_bytes() and rows(whole) == rows(cut)


def started(home: Path, folder: Path) -> subprocess.Popen[bytes]:
    """The run of `refreshed`, in a process of its own, from its newest checkpoint."""
    script = (
        "import sys\nfrom pathlib import Path\nfrom rats.stages.train.train import train_stage\n"
        "from tests.stages.train.test_generations import moving\nhome, folder = map(Path, sys.argv[1:])\n"
        "train_stage(moving(home, folder), 'rats', home / 'shards', folder / 'run', resume='latest')\n"
    )
    line = [sys.executable, "-c", script, str(home), str(folder)]
    return subprocess.Popen(line, env=environment(), cwd=ROOT, stderr=subprocess.DEVNULL)


@pytest.mark.slow
def test_kill_9_while_a_generation_is_saved_rolled_out_or_judged_changes_nothing(
    home: Path, refreshed: Path, tmp_path: Path
) -> None:
    # each is seen for the first time at a later moment of the run than the one before
    moments = ["run/generations/000002", "store/*/recipe.json", "store/*/shards/*.tar", "run/generations/*/*.json"]
    moments += ["run/checkpoints/000004", "run/generations/000004/network", "run/generations/000004/*.json"]
    for moment in moments:
        child, end = started(home, tmp_path), time.monotonic() + 120
        while not list(tmp_path.glob(moment)) and time.monotonic() < end:
            assert child.poll() is None, f"the run ended before {moment} was there"
            time.sleep(0.002)
        child.kill()
        child.wait()
    assert started(home, tmp_path).wait(timeout=120) == 0
    assert (tmp_path / "run" / WEIGHTS).read_bytes() == (refreshed / "run" / WEIGHTS).read_bytes()
    assert rows(tmp_path / "run") == rows(refreshed / "run")
    assert read_record(tmp_path / "run").generations == read_record(refreshed / "run").generations
