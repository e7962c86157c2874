"""Runs to export, made once for this folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.exporting import export, write_home


@pytest.fixture(scope="package")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with a trained run of adapters, runs/lora, and one of the whole network, runs/full."""
    return write_home(tmp_path_factory.mktemp("home"))


@pytest.fixture(scope="package")
def exported(home: Path) -> Path:
    """All of the adapters' run."""
    assert export(home, "lora", home / "exported")["parts"] == ["lora", "pipeline", "README.md", "call.json"]
    return home / "exported"
