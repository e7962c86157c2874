"""A published set that tests of the store spoil, written once."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.damage import copied, publish_set


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A published set with everything in it; tests only copy it."""
    return publish_set(tmp_path_factory.mktemp("whole"))


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    """A copy of it, to be spoiled."""
    return copied(whole, tmp_path / "copy")
