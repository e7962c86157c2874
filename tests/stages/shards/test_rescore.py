"""`rats shards verify --rescore`: a lie under right seals, which `verify` alone cannot see, is found if it is drawn."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from rats.pipeline.store.embeddings import read_embedding, write_embedding
from rats.pipeline.store.scores import reward_column, score_rows, write_scores
from rats.pipeline.store.shard_set import ShardSet
from rats.schemas.errors import DataError
from rats.schemas.manifest import ScoreRow
from rats.schemas.params import Params, load_params
from rats.stages.rollout.rollout import rollout_stage
from rats.stages.shards.rescore import is_near, is_score, rescore
from rats.stages.shards.verify import verify
from tests.stages.shards.test_untrusted import SHARD, reindex, rewrite
from tests.support.damage import copied, unsealed
from tests.support.project import PROMPTS, rats, write_project

NAME = "rollout-000000"


@pytest.fixture(scope="module")
def project(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with one shard of all its prompts, published in `data`."""
    folder = tmp_path_factory.mktemp("rescored")
    write_project(models, folder, store={"path": str(folder / "store"), "shard_samples": 6, "workers": 0})
    rollout_stage(load_params(folder / "params.yaml"), "train", folder / "data")
    return folder


@pytest.fixture
def spoiled(project: Path, tmp_path: Path) -> tuple[ShardSet, Params]:
    """A copy of the published folder, to lie in."""
    folder = copied(project / "data", tmp_path / "data")
    return ShardSet.open(folder), load_params(project / "params.yaml")


def refused(shards: ShardSet, params: Params, text: str) -> None:
    """`verify` sees nothing, and computing all samples again does."""
    assert verify(shards.root)["ok"]
    with pytest.raises(DataError, match=rf"1 findings in 6 samples \(seed 5\), first: .*{text}.*do not train on this"):
        rescore(shards.root, params, 9, seed=5)


def test_what_a_rollout_wrote_is_computed_again_as_it_is(project: Path) -> None:
    said = json.loads(rats(project, "shards", "verify", "data", "--rescore", "4", "--seed", "3", "--json").stdout)
    assert (said["ok"], said["rescored"], said["seed"]) == (True, 4, 3)
    assert (said["rewards_compared"], said["rewards_not_compared"]) == (["hpsv2"], [])


def test_two_index_rows_that_point_at_each_others_samples_are_found(spoiled: tuple[ShardSet, Params]) -> None:
    shards, params = spoiled
    folder = shards.root.local
    rows = unsealed(folder / f"{SHARD}.done.json")["rows"]
    one, two = ({name: rows[i][name] for name in ("offset", "length", "blake3")} for i in (1, 4))
    rows[1] |= two
    rows[4] |= one
    reindex(folder, rows)
    assert verify(shards.root)["ok"]
    with pytest.raises(DataError, match="does not start from the noise of its recipe"):
        rescore(shards.root, params, 6)


def test_a_score_that_was_sealed_again_is_found(spoiled: tuple[ShardSet, Params]) -> None:
    shards, params = spoiled
    column = reward_column(shards, "hpsv2")[0]
    rows = score_rows(shards, column, NAME)
    assert rows[2].score is not None
    table = f"scores/{column}/{NAME}.parquet"
    rewrite(shards.root.local, table, (shards.root.local / table).read_bytes())
    rows[2] = rows[2].model_copy(update={"score": rows[2].score + 0.5})
    write_scores(shards, column, NAME, rows)
    refused(shards, params, f"sample {rows[2].key} has hpsv2")


def test_an_embedding_of_another_prompt_is_found(spoiled: tuple[ShardSet, Params]) -> None:
    shards, params = spoiled
    rows = {row.prompt: row for row in shards.index(shards.snapshot())}
    write_embedding(shards, rows[PROMPTS[2]].prompt_id, read_embedding(shards, rows[PROMPTS[3]].prompt_id))
    refused(shards, params, f"embedding of '{PROMPTS[2]}' is not what the text encoders give")


def test_a_reward_that_the_parameters_do_not_have_is_named_and_not_compared(spoiled: tuple[ShardSet, Params]) -> None:
    shards, params = spoiled
    found = rescore(shards.root, params.model_copy(update={"rewards": ()}), 2)
    assert (found["rewards_compared"], found["rewards_not_compared"]) == ([], ["hpsv2"])


@pytest.mark.parametrize(
    ("dtype", "shift", "near"),
    [
        (torch.float32, 0.0008, True),
        (torch.float32, 0.0012, False),
        (torch.bfloat16, 0.04, True),
        (torch.bfloat16, 0.06, False),
        (torch.float16, 0.03, False),
        (torch.int64, 0.0, True),
        (torch.int64, 1.0, False),
    ],
)
def test_an_embedding_is_one_up_to_the_roundings_of_its_dtype(dtype: torch.dtype, shift: float, near: bool) -> None:
    made = torch.tensor([3.0, 4.0])
    stored = made + shift * torch.tensor([3.0, 4.0]).round() if dtype.is_floating_point else made + shift
    assert is_near(stored.to(dtype), made.to(dtype)) is near
    assert not is_near(stored.to(dtype), made.to(dtype)[None])


@pytest.mark.parametrize(
    ("made", "spread", "same"),
    [(2.09, 2.0, True), (2.12, 2.0, False), (2.0001, 0.0, True), (2.0005, 0.0, False), (None, 2.0, False)],
)
def test_a_score_is_one_up_to_a_share_of_its_columns_spread(made: float | None, spread: float, same: bool) -> None:
    failed = ScoreRow(key="a-0003", score=None, status="failed", error="no picture")
    again = failed if made is None else ScoreRow(key="a-0003", score=made)
    assert is_score(ScoreRow(key="a-0003", score=2.0), again, spread) is same
    assert is_score(failed, again, spread) is (made is None)
