"""What a rollout does to the files of its set: the order in which it writes them, and how often it reads them."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from rats.pipeline.store import layout
from rats.schemas.params import Params
from rats.stages.rollout.rollout import rollout_stage
from tests.support.project import write_project

SHARDS = 3


@pytest.fixture(scope="module")
def written(models: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Params, list[layout.File]]:
    """A rollout's parameters, and the files of its set in the order in which they got their names."""
    folder, names = tmp_path_factory.mktemp("files"), []
    params, real = Params.model_validate(write_project(models, folder)), os.replace

    def replace(source: Any, target: Any) -> None:
        real(source, target)
        names.append(Path(*Path(target).relative_to(Path(params.store.path)).parts[1:]).as_posix())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "replace", replace)
        assert rollout_stage(params, "train").shards_total == SHARDS
    files = [layout.understand(name) for name in names]
    assert None not in files
    return params, [file for file in files if file]


@pytest.mark.parametrize("number", range(SHARDS))
def test_a_rollout_writes_in_the_order_of_the_table(written: tuple[Params, list[layout.File]], number: int) -> None:
    mine = layout.shard_name(number)
    files = [file for file in written[1] if file.parts.get("shard", mine) == mine]
    # every shard brings the embeddings of its own prompts
    ranks = [layout.KINDS.index(file.kind) for file in files if file.kind is not layout.EMBEDDING]
    assert ranks == sorted(ranks)
    assert {file.kind for file in written[1]} == {*layout.KINDS} - {layout.LOCK}
    order = [file.kind for file in written[1]]
    assert order.index(layout.PLAN) < order.index(layout.EMBEDDING) < order.index(layout.SHARD)


def test_a_second_rollout_reads_the_document_of_every_shard_once(
    written: tuple[Params, list[layout.File]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, real = Counter[str](), os.open

    def open_(path: Any, *arguments: Any, **options: Any) -> int:
        opened[str(path)] += 1
        return real(path, *arguments, **options)

    monkeypatch.setattr(os, "open", open_)
    report = rollout_stage(written[0], "train", tmp_path / "out")
    assert report.shards_reused == SHARDS and (tmp_path / "out").is_dir()
    root = Path(written[0].store.path) / report.fingerprint
    assert {opened[str(root / layout.DONE.name(shard=layout.shard_name(number)))] for number in range(SHARDS)} == {1}
