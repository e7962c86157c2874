"""The command line on a remote store: workers in processes of their own, an S3 API on loopback."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rats.pipeline.files.places import open_place
from rats.pipeline.store.shard_set import ShardSet
from tests.support.project import spawn, tree, write_project


@pytest.mark.slow
@pytest.mark.usefixtures("own_cache")
def test_rollout_score_and_train_on_a_bucket_give_what_a_folder_gives(
    models: Path,
    tmp_path: Path,
    s3: str,
) -> None:
    write_project(models, tmp_path)
    local = json.loads(spawn(tmp_path, "stage", "rollout", "--out", "local", "--json").stdout)
    bucket = ["--set", f"store.path={s3}/store"]
    first = json.loads(spawn(tmp_path, "stage", "rollout", *bucket, "--workers", "2", "--out", "data", "--json").stdout)
    assert (first["snapshot"], first["shards_reused"]) == (local["snapshot"], 0)
    assert tree(tmp_path / "data") == tree(tmp_path / "local")
    again = json.loads(spawn(tmp_path, "stage", "rollout", *bucket, "--workers", "2", "--json").stdout)
    assert (again["teacher_forwards"], again["shards_reused"]) == (0, again["shards_total"])
    url = f"{s3}/store/{first['fingerprint']}"
    place = open_place(url)
    found = {name.partition(f"{place.name}/")[2] for name in place.fs.find(place.path)}
    assert not any(name.startswith("locks/") or name.endswith(".tmp") for name in found)
    assert json.loads(spawn(tmp_path, "shards", "verify", url, "--json").stdout)["ok"]
    for source, run in ((url, "remote"), ("data", "folder")):
        spawn(tmp_path, "stage", "train", "--shards", source, "--out", run)
    assert tree(tmp_path / "remote" / "student") == tree(tmp_path / "folder" / "student")
    assert ShardSet.open(url).snapshot().hash == local["snapshot"]
