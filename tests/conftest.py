"""Shared by all tests: no hub, no warnings that are not ours, tiny models that are written once."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

# Before transformers is imported anywhere: it looks at these once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ.setdefault("OMP_NUM_THREADS", "1")

collect_ignore = ["rewards"]  # these need the official packages: `make test-rewards`


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random models in the real formats: `flux`, `pickscore`, `hpsv2`, `image-reward`."""
    from tests.support import tiny

    folder = tmp_path_factory.mktemp("models")
    tiny.write_flux(folder / "flux")
    tiny.write_pickscore(folder / "pickscore")
    tiny.write_hpsv2(folder / "hpsv2")
    tiny.write_image_reward(folder / "image-reward")
    return folder


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cache of this test's own for what is read from remote stores."""
    from rats.pipeline.files import cache

    monkeypatch.setenv("RATS_CACHE_DIR", str(tmp_path / "cache"))
    cache.shared.cache_clear()
    yield tmp_path / "cache"
    cache.shared.cache_clear()


@pytest.fixture(scope="session")
def s3() -> Iterator[str]:
    """A bucket behind a real S3 API."""
    from moto.server import ThreadedMotoServer
    from upath import UPath

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("AWS_ENDPOINT_URL", "http://{}:{}".format(*server.get_host_and_port()))
        UPath("s3://bucket").fs.mkdir("bucket")
        yield "s3://bucket"
    server.stop()
