"""Of a network that reads a tensor's values nothing can be counted without values: that is said, and nothing fails."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel

from rats.pipeline.families.open import Model
from rats.pipeline.weights.opening import unless_values_are_read
from rats.schemas.params import Params
from rats.stages.doctor.params import check_model
from rats.stages.plan.plan import plan_stage
from rats.stages.plan.text import plan_rows
from rats.stages.rollout.rollout import rollout_stage
from tests.support.project import write_project

READS: dict[str, Callable[[torch.Tensor], Any]] = {
    "item": lambda x: x.sum().item(),
    "a condition": lambda x: bool((x > 1.5).any()),
    "a mask": lambda x: x[x > 1.5],
    "numpy": lambda x: x.detach().numpy(),
    "a list": lambda x: x.tolist(),
    "another device": lambda x: x.to("cpu"),
    "nonzero": lambda x: x.nonzero(),
    "equal": lambda x: torch.equal(x, x + 1),
}


@pytest.mark.parametrize("name", READS)
def test_every_way_to_read_a_value_is_known(name: str):
    reached = False
    with unless_values_are_read():
        READS[name](torch.empty(3, 5, device="meta"))
        reached = True
    assert not reached


@pytest.mark.parametrize("error", [RuntimeError("size mismatch"), TypeError("no metadata"), ValueError("metal")])
def test_other_errors_are_errors(error: Exception):
    with pytest.raises(type(error)), unless_values_are_read():
        raise error


@pytest.fixture
def reading(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A FLUX that reads a value of its latents, as networks with dynamic shifts or routing do."""
    real = FluxTransformer2DModel.forward

    def forward(self: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        assert hidden_states.abs().max().item() < 1000
        return real(self, hidden_states, *args, **kwargs)

    monkeypatch.setattr(FluxTransformer2DModel, "forward", forward)
    yield


@pytest.mark.usefixtures("reading")
def test_a_plan_says_that_it_cannot_know_and_what_it_knows(models: Path, tmp_path: Path):
    params = Params.model_validate(write_project(models, tmp_path, rewards=[]))
    plan = plan_stage(params, "train", price=2.5, rate=1e12)
    assert (plan.evaluation_flops, plan.flops, plan.seconds, plan.usd) == (None, None, None, None)
    assert (plan.rollout_memory, plan.train_memory) == (None, None)
    assert plan.rate == 1e12 and plan.bytes_to_write > 10_000 and plan.decode_flops
    rows = dict(plan_rows(plan))
    assert "unknown FLOP" in rows["teacher"] and rows["time"] == "time unknown"
    assert "reads values of tensors" in rows[""]
    assert plan_stage(params, "train").rate is None


@pytest.mark.usefixtures("reading")
def test_it_is_opened_and_rolled_out_as_any_other(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    params = Params.model_validate(write_project(models, tmp_path, rewards=[]))
    monkeypatch.chdir(tmp_path)
    assert "horizons" in check_model(Model.of(params))
    assert rollout_stage(params, "train").samples == 6
