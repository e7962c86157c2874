"""The set that gc's tests collect in, written once."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from rats.pipeline.store.shard_set import ShardSet
from tests.support.experiments import write_grown


@pytest.fixture(scope="session")
def grown(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a store and of the work beside it; tests only copy it."""
    return Path(write_grown(tmp_path_factory.mktemp("gc")).root).parents[1]


@pytest.fixture
def shards(grown: Path, tmp_path: Path) -> ShardSet:
    """The set in a copy of its own."""
    shutil.copytree(grown, tmp_path, ignore=shutil.ignore_patterns("locks"), dirs_exist_ok=True)
    return ShardSet.open(next((tmp_path / "store").iterdir()))
