"""What a download that fails says: the way out of a full disk, and what began it all."""

from __future__ import annotations

import errno
import os
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants

from rats.pipeline.weights.hub import resolve, telling_cause
from rats.schemas.errors import ConfigError, StorageError


def failing(error: Exception, said: str) -> Any:
    """A download that hides its reason, as those of the hub's libraries do."""

    def download(*_: Any, **__: Any) -> None:
        try:
            raise error
        except Exception as cause:
            raise RuntimeError(said) from cause

    return download


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)),
        RuntimeError("Data processing error: File reconstruction error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_is_named_with_the_way_to_another(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", "/big/hub")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", failing(error, "An error occurred"))
    with pytest.raises(StorageError, match="cache /big/hub is full.* HF_HOME"):
        resolve("somebody/something")


def test_any_other_error_is_not_taken_for_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", failing(OSError(errno.EIO, "broken"), "it failed"))
    with pytest.raises(ConfigError, match="in reach .it failed.*check the name"):
        resolve("somebody/something")


def test_the_telling_cause_is_what_a_library_hides() -> None:
    with pytest.raises(RuntimeError) as caught:
        failing(ValueError("column 7 is no number"), "An error occurred")()
    assert str(telling_cause(caught.value)) == "column 7 is no number"
