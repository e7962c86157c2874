"""The set that gc's tests collect in, written once."""

from __future__ import annotations

from pathlib import Path

import pytest

from rats.pipeline.store.shard_set import ShardSet
from tests.support.damage import copied
from tests.support.experiments import write_grown


@pytest.fixture(scope="session")
def grown(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a store and of the work beside it; tests only copy it."""
    return Path(write_grown(tmp_path_factory.mktemp("gc")).root).parents[1]


@pytest.fixture
def shards(grown: Path, tmp_path: Path) -> ShardSet:
    """The set in a copy of its own."""
    copied(grown, tmp_path)
    return ShardSet.open(next((tmp_path / "store").iterdir()))
