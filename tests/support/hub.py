"""A hub with one repository, in the place of the client's download: it hands out what fits the patterns."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
from huggingface_hub.utils import filter_repo_objects

COMMIT = "89abcdef01" * 4


class Hub:
    """`repository` is what it has, `snapshot` what was fetched, `asked` the patterns of each request."""

    def __init__(self, repository: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.repository, self.snapshot = repository, cache / COMMIT
        self.asked = list[tuple[str, ...]]()
        monkeypatch.setattr("huggingface_hub.snapshot_download", self._download)

    def _download(
        self,
        _: str,
        *,
        allow_patterns: Sequence[str],
        ignore_patterns: Sequence[str],
        revision: str | None,
        local_files_only: bool,
    ) -> str:
        assert revision in (None, COMMIT)
        if local_files_only and self.snapshot.is_dir():
            return str(self.snapshot)
        self.asked.append(tuple(allow_patterns))
        names = [path.relative_to(self.repository).as_posix() for path in self.repository.rglob("*") if path.is_file()]
        for name in filter_repo_objects(names, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns):
            (self.snapshot / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(self.repository / name, self.snapshot / name)
        return str(self.snapshot)

    def fetched(self) -> set[str]:
        """Names of the files that were handed out."""
        return {path.relative_to(self.snapshot).as_posix() for path in self.snapshot.rglob("*") if path.is_file()}
