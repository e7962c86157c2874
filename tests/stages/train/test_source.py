"""What the settings of a run take from the shards: units of rewards, tau, and what the gate takes for R_T.

A value that the run does not use is not asked for.
"""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rats.schemas.errors import DataError
from rats.schemas.train_params import TrainParams
from rats.stages.train.record import clipped_share
from rats.stages.train.source import Source, prompt_means, read_settings
from rats.trainer.gate import weighted_sum
from rats.trainer.objective import Settings
from tests.support.shards import write_set

SCORES = {"fox-0": (1.0, 20.0), "fox-1": (3.0, 26.0), "owl-0": (5.0, 28.0), "owl-1": (7.0, 22.0)}
PROMPTS = {"fox-0": "fox", "fox-1": "fox", "owl-0": "owl", "owl-1": "owl"}
UNITS = (5.0**0.5, 10.0**0.5)
"""Standard deviations, by hand: of 1, 3, 5, 7 and of 20, 26, 28, 22."""


def source() -> Source:
    shards = SimpleNamespace(recipe=SimpleNamespace(horizons=(1.0, 0.4, 0.0)))
    return Source(shards, None, {}, SCORES, prompt_means(SCORES, PROMPTS))


def train(teacher_reward: str, **changes: object) -> TrainParams:
    values = {"reward": {"a": 2.0, "b": 0.5}, "gate": {"teacher_reward": teacher_reward}}
    return TrainParams.model_validate(values | changes)


def test_prompt_means_are_the_means_over_a_prompts_noises():
    assert source().followed == {key: (2.0, 23.0) if key < "owl" else (6.0, 25.0) for key in SCORES}


@pytest.mark.parametrize("teacher_reward", ["sample", "prompt"])
def test_a_rewards_unit_and_tau_are_the_spread_of_single_samples(teacher_reward: str):
    settings = read_settings(train(teacher_reward), source())
    assert [part.unit for part in settings.parts] == pytest.approx(UNITS)
    sums = torch.tensor([2 * a / UNITS[0] + 0.5 * b / UNITS[1] for a, b in SCORES.values()])
    assert settings.tau == pytest.approx(float(sums.std(correction=0)))


def test_what_the_gate_takes_for_the_teachers_reward_leaves_the_students_as_it_is():
    scores_RB = torch.tensor([[4.0, 6.0], [21.0, 25.0]])
    by_hand = [2 * 4 / UNITS[0] + 0.5 * 21 / UNITS[1], 2 * 6 / UNITS[0] + 0.5 * 25 / UNITS[1]]
    for teacher_reward in ("sample", "prompt"):
        parts = read_settings(train(teacher_reward), source()).parts
        assert weighted_sum(scores_RB, parts).tolist() == pytest.approx(by_hand)


def test_one_rewards_tau_is_that_of_single_samples_too():
    one = Source(source().shards, None, {}, {k: v[:1] for k, v in SCORES.items()}, {})
    assert read_settings(train("prompt", reward="a"), one).tau == pytest.approx(UNITS[0])


def test_the_share_of_clipped_steps_is_counted_and_most_of_them_is_said(caplog: pytest.LogCaptureFixture):
    norms = [0.5, 3.0, 7.0, 0.25, 2.0]
    assert (clipped_share(norms, 5.0), clipped_share(norms, None), clipped_share([], 1.0)) == (0.2, 0.0, 0.0)
    assert caplog.text == ""
    assert clipped_share(norms, 1.0) == 0.6
    assert "clipped in 60 % of the steps" in caplog.text and "train.clip_norm: 7 would" in caplog.text


SPREAD, EQUAL = {"a": (0.2,), "b": (0.6,)}, {"a": (0.3,), "b": (0.3,)}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("store")


def read(store: Path, scores: dict[str, Any], reward: Any = "hps", **gate: Any) -> Settings:
    shards = write_set(store)
    chosen = TrainParams.model_validate({"reward": reward, "gate": gate})
    return read_settings(chosen, Source(shards, shards.snapshot(), {}, scores, scores))


@pytest.mark.parametrize("form", ["rats", "figure"])
def test_a_gate_that_divides_by_tau_wants_scores_that_differ(store: Path, form: str):
    assert read(store, SPREAD, form=form).tau == pytest.approx(0.2)
    assert math.isnan(read(store, EQUAL, form=form, tau="gap").tau)  # to be measured
    with pytest.raises(DataError, match=r"set train\.gate\.tau"):
        read(store, EQUAL, form=form)


@pytest.mark.parametrize("gate", [{"form": "off"}, {"form": "constant", "value": 0.7}])
@pytest.mark.parametrize("tau", [None, "gap"])
def test_a_gate_without_tau_asks_for_none(store: Path, gate: dict[str, Any], tau: Any):
    assert read(store, SPREAD, **gate, tau=tau).tau == pytest.approx(0.2)
    assert read(store, EQUAL, **gate, tau=tau).tau == 0


def test_of_several_rewards_the_one_without_a_spread_is_named(store: Path):
    scores = {"a": (0.2, 0.5), "b": (0.6, 0.5)}
    with pytest.raises(DataError, match="the teacher's pick 2 scores .*: leave that reward out of train.reward"):
        read(store, scores, reward={"hps": 1.0, "pick": 2.0})
