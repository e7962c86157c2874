"""Format version 1 is read for ever: `fixtures/format-1/` was made once, and what it holds is written down here."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rats.pipeline.files.local import LocalPlace
from rats.pipeline.files.reading import hash_bytes
from rats.pipeline.store.documents import read_document
from rats.pipeline.store.embeddings import read_embedding
from rats.pipeline.store.scores import read_scores, reward_column, score_rows
from rats.pipeline.store.shard_set import ShardSet
from rats.pipeline.store.shards import read_sample, verify_shard
from rats.schemas.canonical import canonical_json
from rats.schemas.errors import DataError
from rats.schemas.manifest import FORMAT_VERSION, RewardRecord, ScoresDone, ShardDone, ShardPlan, Snapshot
from tests.support.project import tree
from tests.support.shards import in_order

FOLDER = Path(__file__).parents[2] / "fixtures" / "format-1"
FINGERPRINT = "c51b4e0717ebd5f74c1fcc301be5675b58397ccc0f65d61646352d18da84db53"
SNAPSHOT = "1ee1d474489831e4e29a176c762146fa9c645b4fc76b8d0dade13e310dc0b801"
COLUMN = "06ae511b1d056216712e2f4978fbc8887ba84277fa57ccd0d1edbca4527c2d3a"
FILES = "0ad76ca65c419e7c2a34bb1f3084562da2c17c98c7e22f13a5812834f4f54acd"
"""sha256 over the sha256 of every file: the fixture itself never changes."""
TARS = {
    "rollout-000000": ("47e6c62389a2200b89131dcb5e57ca909cfd89ae77da08fb8425de1c2d9cfb61", 20480),
    "rollout-000001": ("4f064bafe5b1012fa2314c0c2bebeb7dbacb953bf4b1e3b593198d4aed50c3dd", 10240),
}
# key, prompt, shard, offset, blake3 of the latents, x[0, 0, :2], x0[-1, -1, -1], sum of x
SAMPLES: list[tuple[str, str, str, int, str, list[float], float, float]] = [
    (
        "2c7f826e694abc1383a8cbdc-0000",
        "a picture of thing 1",
        "rollout-000000",
        1536,
        "d476faa0643ab426581c524b43d63153e55baa1857fc17aa06bab0b5ac4e4bf9",
        [-0.341552734375, 0.76513671875],
        -0.72998046875,
        8.069894790649414,
    ),
    (
        "2c7f826e694abc1383a8cbdc-0001",
        "a picture of thing 1",
        "rollout-000000",
        5120,
        "76cdcc1222316e2cc6958f374ef698f0dfc4480316b9f432cf902b08f1594d89",
        [1.9462890625, -1.4111328125],
        -0.71240234375,
        11.785441875457764,
    ),
    (
        "5791afa5e5b91bbc9f97c1c8-0000",
        "a picture of thing 2",
        "rollout-000000",
        8704,
        "ae0a72faf1aee69f673644bfa444b3efd684ddee178cc06b9155c4b5b4b42548",
        [1.0791015625, 1.125],
        -0.326416015625,
        5.301445007324219,
    ),
    (
        "5791afa5e5b91bbc9f97c1c8-0001",
        "a picture of thing 2",
        "rollout-000000",
        12288,
        "7790500604db0c1a5ad3adab5ef23b9f316e5168b445d91efc087f269abd89d6",
        [0.60107421875, -0.5029296875],
        -0.348876953125,
        -20.906735718250275,
    ),
    (
        "df012f771d11c42ca65185b2-0000",
        "a picture of thing 0",
        "rollout-000001",
        1536,
        "77a3c2736c5355d0496a53ac5a9589e98f9d8d4b5b90271847fb941fe12f22ec",
        [0.424560546875, -2.654296875],
        -0.1700439453125,
        16.167647004127502,
    ),
    (
        "df012f771d11c42ca65185b2-0001",
        "a picture of thing 0",
        "rollout-000001",
        5120,
        "51f018a2457198a8388ab77812ed70cf76732e7e665f346f58119301c769a002",
        [0.67919921875, 0.62451171875],
        0.1719970703125,
        5.458003997802734,
    ),
]
SCORES = dict(zip([row[0] for row in SAMPLES], [0.0, 0.5, 0.0, 0.5, None, 0.25], strict=True))


@pytest.fixture
def shards() -> ShardSet:
    return ShardSet.open(FOLDER)


def test_nobody_has_touched_the_fixture() -> None:
    assert hashlib.sha256(canonical_json(tree(FOLDER))).hexdigest() == FILES


def test_the_recipe_is_read_and_has_its_address(shards: ShardSet) -> None:
    recipe = shards.recipe
    assert shards.fingerprint == FINGERPRINT
    assert (recipe.format_version, recipe.solver_version, recipe.family, recipe.seed) == (1, 1, "flux", 0)
    assert (recipe.height, recipe.width, recipe.guidance_scale, recipe.true_cfg_scale) == (512, 512, 3.5, 1.0)
    assert (len(recipe.sigmas), recipe.sigmas[:3], recipe.sigmas[-1]) == (51, (1.0, 0.98, 0.96), 0.0)
    assert (len(recipe.horizons), recipe.horizons[:3], recipe.horizons[-1]) == (15, (1.0, 0.875, 0.8), 0.0)
    assert recipe.weights == {"transformer": "a" * 64}
    assert recipe.compute.model_dump() == {
        "device": "cpu", "threads": 1, "micro_batch": 8, "attention": "sdpa", "compile": False,
    }  # fmt: skip


def test_the_snapshot_and_the_index_are_read(shards: ShardSet) -> None:
    snapshot = shards.snapshot()
    assert shards.snapshots() == [1]
    assert (snapshot.number, snapshot.hash, snapshot.samples) == (1, SNAPSHOT, 6)
    assert snapshot.shards == {name: digest for name, (digest, _) in TARS.items()}
    found = [(row.key, row.prompt, row.shard, row.offset, row.blake3) for row in shards.index(snapshot)]
    assert found == [row[:5] for row in SAMPLES]
    assert {(row.length, row.status) for row in shards.index(snapshot)} == {(1992, "ok")}
    assert [row.noise_index for row in shards.index(snapshot)] == [0, 1] * 3


def test_every_sample_is_read_and_every_byte_verified(shards: ShardSet) -> None:
    for row, (_, _, _, _, _, first, last, total) in zip(shards.index(shards.snapshot()), SAMPLES, strict=True):
        arrays = read_sample(shards, row)
        assert {name: (array.dtype, array.shape) for name, array in arrays.items()} == {
            "x": (np.float16, (15, 4, 8)),
            "x0": (np.float16, (14, 4, 8)),
        }
        assert arrays["x"][0, 0, :2].tolist() == first
        assert float(arrays["x0"][-1, -1, -1]) == last
        assert float(arrays["x"].astype(np.float64).sum()) == total
    assert {name: (digest, verify_shard(shards, name, digest).bytes) for name, (digest, _) in TARS.items()} == TARS


def test_the_order_of_training_is_what_it_was(shards: ShardSet) -> None:
    stream = in_order(shards, shards.snapshot(), seed=0)
    keys = [row[0] for row in SAMPLES]
    assert [keys.index(next(stream)[0].key) for _ in range(12)] == [4, 0, 2, 3, 1, 5, 0, 2, 1, 4, 5, 3]


def test_every_score_is_read_the_failed_one_with_its_error(shards: ShardSet) -> None:
    column, record = reward_column(shards, "hps")
    assert (column, record.fingerprint, record.hashes) == (COLUMN, COLUMN, {"reward": "d" * 64, "vae": "b" * 64})
    rows = [row for shard in sorted(TARS) for row in score_rows(shards, column, shard)]
    assert {row.key: row.score for row in rows} == SCORES
    assert [(row.key, row.status, row.error) for row in rows if row.status != "ok"] == [
        (SAMPLES[4][0], "failed", "ValueError: no picture")
    ]
    assert read_scores(shards, column, SCORES) == {key: score for key, score in SCORES.items() if score is not None}


def test_every_embedding_is_read_in_its_own_dtype(shards: ShardSet) -> None:
    for prompt in sorted({row.prompt_id for row in shards.index(shards.snapshot())}):
        tensors = read_embedding(shards, prompt)
        assert tensors["context"].dtype == torch.bfloat16 and tensors["pooled"].dtype == torch.float32
        assert tensors["context"].tolist() == [[0.0, 0.5], [1.0, 1.5], [2.0, 2.5]]
        assert tensors["pooled"].tolist() == [0.0, 1.0, 2.0, 3.0]


def test_the_plans_are_read(shards: ShardSet) -> None:
    planned = [(sample.key, sample.prompt, plan.shard) for plan in shards.plans() for sample in plan.samples]
    assert planned == [row[:3] for row in SAMPLES]


DOCUMENTS: dict[str, Any] = {
    "manifests/0001.json": Snapshot,
    "shards/rollout-000000.plan.json": ShardPlan,
    "shards/rollout-000000.done.json": ShardDone,
    f"scores/{COLUMN}/reward.json": RewardRecord,
    f"scores/{COLUMN}/rollout-000000.done.json": ScoresDone,
}


def test_every_kind_of_document_is_listed_here() -> None:
    kinds = {name.replace("-000001", "-000000") for name in tree(FOLDER) if name.endswith(".json")}
    assert kinds == {*DOCUMENTS, "recipe.json"}


@pytest.mark.parametrize("name", DOCUMENTS)
@pytest.mark.parametrize("version", [2, 10, "2.0", None])
def test_another_major_version_is_refused_by_both_numbers(tmp_path: Path, name: str, version: object) -> None:
    path = tmp_path / Path(name).name
    content = json.loads((FOLDER / name).read_bytes()) | {"format_version": version, "something_new": [1]}
    del content["seal"]
    path.write_bytes(canonical_json(content | {"seal": hash_bytes(canonical_json(content))}))
    with pytest.raises(DataError, match=f"format version {version!r}, this rats reads 1; update rats") as caught:
        read_document(LocalPlace(path), DOCUMENTS[name])
    assert caught.value.exit_code == 65 and FORMAT_VERSION == 1


def test_a_set_of_another_major_version_is_refused_by_both_numbers(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(FOLDER, tmp_path / "later"))
    content = json.loads((FOLDER / "recipe.json").read_bytes()) | {"format_version": 2, "something_new": 1}
    (folder / "recipe.json").write_bytes(canonical_json(content))
    with pytest.raises(DataError, match="format version 2, this rats reads 1; update rats") as caught:
        ShardSet.open(folder)
    assert caught.value.exit_code == 65
