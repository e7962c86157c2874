"""What a run's settings take from the shards. A value that the run does not use is not asked for."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from rats.schemas.errors import DataError
from rats.schemas.train_params import TrainParams
from rats.stages.train.source import Source, read_settings
from rats.trainer.objective import Settings
from tests.support.shards import write_set

SPREAD, EQUAL = {"a": (0.2,), "b": (0.6,)}, {"a": (0.3,), "b": (0.3,)}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("store")


def read(store: Path, scores: dict[str, Any], reward: Any = "hps", **gate: Any) -> Settings:
    shards = write_set(store)
    chosen = TrainParams.model_validate({"reward": reward, "gate": gate})
    return read_settings(chosen, Source(shards, shards.snapshot(), {}, scores))


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
