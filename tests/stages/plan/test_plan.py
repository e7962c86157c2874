"""`rats plan`: what it counts against published figures, against what a rollout does and against real files."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

from rats.pipeline.families.open import Model
from rats.pipeline.store.embeddings import write_embedding
from rats.pipeline.store.scores import record_reward, write_scores
from rats.pipeline.store.shard_set import ShardSet
from rats.pipeline.store.shards import write_shard
from rats.schemas.errors import ConfigError
from rats.schemas.manifest import ScoreRow
from rats.schemas.params import ComputeParams, ModelParams, Params, TeacherParams, load_params
from rats.stages.plan.flops import measured_rate
from rats.stages.plan.plan import compare_costs, pays_from, plan_stage
from rats.stages.plan.sizes import embedding_bytes, latents_bytes, shard_bytes
from rats.stages.plan.text import clock, flop, plan_rows, size
from rats.stages.rollout.rollout import rollout_stage
from rats.stages.workers.run import WorkerTarget
from tests.support.project import PROMPTS, ROOT, rats, tree, write_project
from tests.support.shards import params as params_of
from tests.support.shards import recipe_of, wanted

RATE = 1e12


def test_the_predicted_bytes_of_a_set_are_those_of_its_files_within_two_percent(tmp_path: Path) -> None:
    samples, shape = wanted(24, 3), (16, 64)
    recipe = recipe_of(params_of()).model_copy(update={"latent_shape": shape})
    shards = ShardSet.open_or_create(tmp_path, recipe)
    plans, rows = shards.plan(samples, 24), len(recipe.horizons)
    random = np.random.default_rng(0)
    shapes = {"prompt_embeds": (10, 96), "pooled_prompt_embeds": (96,)}
    columns = [record_reward(shards, name, {"reward": "d" * 64}) for name in ("a", "b")]
    for plan in plans:
        x = random.standard_normal((rows, *shape)).astype(np.float16)
        write_shard(shards, plan, [(sample, {"x": x, "x0": x[1:]}) for sample in plan.samples])
        scores = [ScoreRow(key=sample.key, score=float(random.normal())) for sample in plan.samples]
        for column in columns:
            write_scores(shards, column, plan.shard, scores)
    for prompt in {sample.prompt_id for sample in samples}:
        write_embedding(shards, prompt, {name: torch.randn(size) for name, size in shapes.items()})
    shards.write_snapshot(sample.key for sample in samples)
    predicted = sum(shard_bytes(recipe, latents_bytes(recipe), plan.samples, len(columns)) for plan in plans)
    predicted += 24 * embedding_bytes(shapes, torch.float32)
    assert predicted == pytest.approx(sum(f.stat().st_size for f in tmp_path.rglob("*") if f.is_file()), rel=0.02)


def test_a_plan_says_what_the_rollout_then_does_and_that_nothing_is_left_after_it(models: Path, tmp_path: Path) -> None:
    params = Params.model_validate(write_project(models, tmp_path, rewards=[]))
    before = tree(tmp_path)
    work = plan_stage(params, "train", rate=RATE).work
    assert tree(tmp_path) == before
    report = rollout_stage(params, "train")
    assert work.fingerprint == report.fingerprint
    assert (work.samples, work.samples_missing, work.samples_to_make) == (report.samples,) * 3
    assert (work.shards, work.shards_missing) == (report.shards_total,) * 2
    assert work.forwards == report.teacher_forwards and work.embeddings_to_make == len(PROMPTS)
    after = plan_stage(params, "train", rate=RATE)
    assert (after.work.samples_missing, after.work.forwards, after.flops, after.bytes_to_write) == (0, 0, 0, 0)


def test_a_grown_or_killed_set_lacks_what_it_lacks_in_whole_shards(models: Path, tmp_path: Path) -> None:
    params = Params.model_validate(write_project(models, tmp_path, rewards=[]))
    rollout_stage(params, "train")
    (tmp_path / "prompts.txt").write_text("\n".join([*PROMPTS, "a tall tree"]))
    grown = plan_stage(params, "train", rate=RATE).work
    assert (grown.samples_missing, grown.shards_missing, grown.embeddings_to_make) == (1, 1, 1)
    # its micro-batch of two is padded: 6 steps, two evaluations each
    assert (grown.evaluations, grown.forwards) == (12, 12)
    next((tmp_path / "store").glob("*/shards/*.tar")).unlink()
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    killed = plan_stage(params, "train", rate=RATE).work
    assert (killed.samples, killed.samples_missing, killed.samples_to_make) == (6, 2, 2)
    assert (killed.shards_missing, killed.embeddings_to_make) == (1, 0)


def paper(samples_a_step: int = 8) -> Params:
    train = {"reward": "hps", "steps": 400, "batch": samples_a_step}
    return Params.model_validate({"model": {"path": "m"}, "prompts": {"train": "p.txt"}, "train": train})


def test_at_the_papers_sizes_stored_trajectories_pay_from_the_second_experiment_on() -> None:
    for count, ratio in ((1, 1), (2, 2), (3, 3)):
        found = compare_costs(paper(), 400 * 8, count, seconds_per_evaluation=21.5e12 / 310e12, price=2.0)
        assert found.live.worker_seconds == pytest.approx(ratio * found.stored.worker_seconds)
        assert (found.live.evaluations, found.pays_from) == (count * 400 * 8 * 50, 2)
    assert found.live.usd == pytest.approx(found.live.worker_seconds / 1800)


def test_the_first_experiment_pays_for_a_set_that_is_smaller_than_a_training() -> None:
    assert [pays_from(samples, 100) for samples in (99, 100, 199, 200)] == [1, 2, 2, 3]


def test_classifier_free_guidance_doubles_both_sides() -> None:
    guided = paper().model_copy(update={"teacher": TeacherParams(true_cfg_scale=2.0)})
    one, two = compare_costs(paper(), 10, 1, 1.0), compare_costs(guided, 10, 1, 1.0)
    assert (two.stored.evaluations, two.live.evaluations) == (2 * one.stored.evaluations, 2 * one.live.evaluations)


def test_the_rate_is_measured_in_one_block_of_each_kind_as_the_recipe_computes() -> None:
    model, seen = ModelParams(path=str(ROOT / "assets" / "flux-mini"), dtype="bfloat16"), set()

    def look(module: nn.Module, args: Any) -> None:
        if isinstance(module, nn.Linear) and args[0].ndim == 3 and not args[0].is_meta:
            seen.add((len(args[0]), module.weight.dtype, torch.get_num_threads()))
        if hasattr(module, "single_transformer_blocks") and not next(module.parameters()).is_meta:
            seen.add((len(module.transformer_blocks), len(module.single_transformer_blocks)))

    hook = register_module_forward_pre_hook(look)
    settings = TeacherParams(height=32, width=32, max_sequence_length=10)
    rate = measured_rate(Model(model, settings, ComputeParams(micro_batch=3, threads=2)), seconds=0.05)
    hook.remove()
    assert rate > 0
    assert seen == {(1, 1), (3, torch.bfloat16, 2)}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_a_device_that_is_elsewhere_wants_its_rate(models: Path, tmp_path: Path) -> None:
    write_project(models, tmp_path)
    elsewhere = ["plan", "--set", "compute.device=cuda"]
    assert "--rate" in rats(tmp_path, *elsewhere, code=2).stderr
    plan = json.loads(rats(tmp_path, *elsewhere, "--rate", "310", "--price", "2", "--workers", "4", "--json").stdout)
    assert (plan["rate"], plan["rate_measured"]) == (310e12, False)
    assert plan["worker_seconds"] == pytest.approx(plan["flops"] / 310e12) == pytest.approx(4 * plan["seconds"])
    assert plan["usd"] == pytest.approx(plan["worker_seconds"] / 1800)


def test_the_table_has_units_and_says_when_the_disk_is_too_small(models: Path, tmp_path: Path) -> None:
    params = Params.model_validate(write_project(models, tmp_path, rewards=[]))
    plan = plan_stage(params, "train", rate=RATE, price=2.0, experiments=2)
    text = dict(plan_rows(plan))
    assert text["samples"] == "6 wanted, 0 there, 6 to make" and text["rate"].startswith("1 TFLOP/s")
    assert "as given" in text["rate"] and "NOT ENOUGH" not in text["size"] and "cost" in text
    full = plan.model_copy(update={"bytes_free": 0})
    assert "NOT ENOUGH" in dict(plan_rows(full))["size"]
    assert (flop(21.5e12), size(0.75 * 2**20), size(1023)) == ("21.5 TFLOP", "768 KiB", "1023 B")
    assert (clock(59.6), clock(3599), clock(3600), clock(90061)) == ("1:00 min", "59:59 min", "1:00 h", "25:01 h")


def test_a_dry_run_of_the_rollout_and_the_plan_count_the_same(models: Path, tmp_path: Path) -> None:
    write_project(models, tmp_path)
    dry = json.loads(rats(tmp_path, "stage", "rollout", "--dry-run", "--json").stdout)
    assert json.loads(rats(tmp_path, "plan", "--rate", "1", "--json").stdout)["work"] == dry


def test_a_split_without_prompts_is_one_line(models: Path, tmp_path: Path) -> None:
    write_project(models, tmp_path)
    assert "prompts.test" in rats(tmp_path, "plan", "--split", "test", code=2).stderr
    with pytest.raises(ConfigError, match=r"prompts\.test"):
        plan_stage(load_params(tmp_path / "params.yaml"), "test", rate=RATE)


@pytest.mark.slow
def test_the_predicted_time_of_the_miniature_is_the_measured_one(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(ROOT)
    lines = (ROOT / "assets" / "prompts" / "train.csv").read_text().splitlines()[:17]
    (tmp_path / "few.csv").write_text("\n".join(lines))
    changes = [f"store.path={tmp_path / 'store'}", f"prompts.train={tmp_path / 'few.csv'}", "rewards=[]"]
    params = load_params(ROOT / "params.yaml", changes)
    first, start = plan_stage(params, "train"), time.monotonic()
    rollout_stage(params, "train", None, WorkerTarget(workers=0))
    seconds = time.monotonic() - start
    rate = (first.rate + plan_stage(params, "train").rate) / 2
    # 0.97 to 1.08 when it was written; other work on the machine moves both
    assert 0.6 < seconds / (first.flops / rate) < 1.7
