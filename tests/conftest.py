"""Shared by all tests: no hub, no warnings that are not ours, tiny models that are written once."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# Before transformers is imported anywhere: it looks at these once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random models in the real formats: `flux`, `pickscore`, `hpsv2`, `image-reward`."""
    from tests import tiny

    folder = tmp_path_factory.mktemp("models")
    tiny.write_flux(folder / "flux")
    tiny.write_pickscore(folder / "pickscore")
    tiny.write_hpsv2(folder / "hpsv2")
    tiny.write_image_reward(folder / "image-reward")
    return folder
