"""Memory that `rats plan` counts: against what a real process takes, and what each setting does to it."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rats.pipeline.families.open import Model
from rats.schemas.params import Params
from rats.stages.plan.memory import rollout_memory, train_memory
from rats.stages.plan.meta import META, AsOnGpu, LiveBytes, module_bytes, tensors_of, transient_bytes
from rats.stages.plan.result import Memory
from tests.support.project import settings

MIB = 2**20


def test_what_is_alive_is_counted_and_what_is_gone_is_not() -> None:
    with LiveBytes() as live:
        a = torch.empty(MIB)
        b = a + 1
        view = b[:10]
        assert live.now == 8 * MIB
        del a, b
        assert live.now == 4 * MIB, "a view keeps its storage"
        del view
        assert (live.now, live.peak) == (0, 8 * MIB)
        live.reset()
        assert live.peak == 0


def test_the_graph_keeps_what_the_backward_pass_needs_and_a_checkpoint_does_not() -> None:
    layers = nn.Sequential(*(nn.Linear(256, 256, bias=False, device=META) for _ in range(8)))
    x = torch.empty(1024, 256, device=META, requires_grad=True)

    def kept(through: Any) -> int:
        with LiveBytes([*tensors_of(layers), x]) as live:
            before = live.now
            y = through(x)
            after = live.now - before
            y.sum().backward()
            x.grad = None
            layers.zero_grad()
        return after

    # every layer's input but the first, and the output
    assert kept(layers) == 8 * x.nbytes
    assert kept(lambda x: checkpoint(layers, x, use_reentrant=False)) == x.nbytes


def test_attention_is_counted_as_one_kernel_also_when_it_is_recomputed() -> None:
    class Attention(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(x, x, x)

    module, x = Attention(), torch.empty(1, 2, 4096, 64, device=META, requires_grad=True)
    scores = 2 * 4096 * 4096 * 4
    AsOnGpu(module)
    with LiveBytes([x]) as live:
        checkpoint(module, x, use_reentrant=False).sum().backward()
    assert live.peak < scores / 2


def test_autocast_is_that_of_cuda_and_casts_a_weight_under_training_once() -> None:
    module = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8)).to(META)
    gpu = AsOnGpu(module, torch.bfloat16)
    seen = []
    module[0].register_forward_hook(lambda *call: seen.append(call[2].dtype))
    first = module(torch.empty(2, 8, device=META))
    cast = [id(weight) for _, weight in gpu._cast_weights.values()]
    second = module(torch.empty(2, 8, device=META))
    assert cast == [id(weight) for _, weight in gpu._cast_weights.values()]
    assert seen == [torch.bfloat16] * 2 and first.dtype == second.dtype == torch.float32
    assert gpu.forget() == 2 * (8 * 8 + 8), "weight and bias, once"


def memory(models: Path, folder: Path, **train: Any) -> dict[str, int]:
    values = settings(models, folder, train={"nfe": [2, 3], **train})
    params = Params.model_validate(values)
    found = train_memory(params, Model.of(params))
    assert found.stand_ins == 0
    return found.parts


@pytest.fixture(scope="module")
def whole(models: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    return memory(models, tmp_path_factory.mktemp("memory"))


def test_full_fine_tuning_holds_two_moments_and_a_gradient_of_each_term(whole: dict[str, int]) -> None:
    assert whole["optimizer"] == whole["gradients"] == 2 * whole["network"]
    assert whole["averages"] == whole["teacher"] == 0


def test_averages_and_a_live_teacher_are_kept_beside_the_student(
    models: Path, tmp_path: Path, whole: dict[str, int]
) -> None:
    found = memory(models, tmp_path, ema=0.9, teacher={"mode": "live-ema"})
    assert found["averages"] == found["teacher"] == whole["network"]


def test_lora_keeps_little_but_the_network(models: Path, tmp_path: Path, whole: dict[str, int]) -> None:
    found = memory(models, tmp_path, lora={"rank": 2})
    assert found["network"] > whole["network"]
    assert found["optimizer"] == found["gradients"] == 2 * (found["network"] - whole["network"])


def test_more_student_steps_keep_more_and_checkpointing_keeps_less(
    models: Path, tmp_path: Path, whole: dict[str, int]
) -> None:
    fewer = memory(models, tmp_path, nfe=[2])
    recomputed = memory(models, tmp_path, gradient_checkpointing=True)
    assert fewer["activations"] < whole["activations"] and recomputed["activations"] < whole["activations"]


def worker_memory(models: Path, folder: Path, rewards: list[dict[str, str]]) -> Memory:
    params = Params.model_validate(settings(models, folder, rewards=rewards))
    return rollout_memory(params, Model.of(params))


def test_a_rollout_worker_holds_the_text_encoders_and_every_reward(models: Path, tmp_path: Path) -> None:
    rewards = [{"name": name, "adapter": name, "path": str(models / name)} for name in ("hpsv2", "pickscore")]
    one, two = (worker_memory(models, tmp_path, r) for r in (rewards[:1], rewards))
    assert two.parts["rewards"] > one.parts["rewards"] > 0 and one.parts["text encoders"] > 0
    hub = [{"name": "hpsv2", "adapter": "hpsv2", "path": "xswu/HPSv2"}]
    absent = worker_memory(models, tmp_path, hub)
    assert absent.stand_ins == 1 and absent.parts["rewards"] == pytest.approx(986_109_441 * 4, rel=1e-4)


def test_nothing_that_was_counted_stays(models: Path, tmp_path: Path) -> None:
    """The hooks that count are on modules of their own, and let go of with them."""
    with LiveBytes() as live:
        memory(models, tmp_path)
        gc.collect()
    assert live.now < MIB


def test_held_counts_shared_weights_once() -> None:
    module = nn.ModuleList([nn.Linear(4, 4, bias=False)] * 2)
    assert module_bytes(module) == 64 and transient_bytes(lambda: torch.empty(16), module) == 64


@pytest.mark.slow
def test_the_count_is_within_a_tenth_of_what_a_process_takes(models: Path, tmp_path: Path, monkeypatch: Any) -> None:
    from bench.memory import estimate, peak
    from tests.support.medium import medium_project

    # each block by itself from the system, so that freed ones are given back and the resident set is what is in use
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")
    shards = medium_project(models, tmp_path)
    for changes in (["train.gradient_checkpointing=true"], ["train.lora={rank: 32}"]):
        changes = ["train.nfe=[3]", "train.gate.tau=1", *changes]
        measured = peak(tmp_path / "params.yaml", shards, changes)
        assert estimate(tmp_path / "params.yaml", changes) == pytest.approx(measured, rel=0.1)
