"""The description of a set's files, held against what really lies on the disk and in which order it gets there."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import pytest

from rats.pipeline.files.leftovers import temporary_name
from rats.pipeline.store import layout
from rats.pipeline.store.publish import publish
from rats.pipeline.store.scores import reward_columns
from rats.pipeline.store.shard_set import ShardSet
from rats.schemas.errors import DataError
from rats.stages.shards.exchange import EXPORTED
from rats.stages.shards.gc.contents import read_files
from rats.stages.shards.verify import verify
from tests.support.rolled import export, roll
from tests.support.shards import wanted

PARTS = {"shard": "rollout-000012", "number": "0034", "prompt": "5a" * 32, "reward": "6b" * 32, "lock": "plan"}


def kinds_below(folder: Path, *others: str) -> dict[str, list[layout.Kind]]:
    """All kinds that a file could be of, by its name; `others` are not looked at."""
    files = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    return {
        name: [kind for kind in layout.KINDS if kind.parts(name) is not None] for name in files if name not in others
    }


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    """A set with everything in it."""
    return roll(tmp_path_factory.mktemp("layout"), wanted(3), shard_samples=2)


def test_every_file_of_a_store_is_of_exactly_one_kind_and_every_kind_is_there(shards: ShardSet) -> None:
    found = kinds_below(Path(shards.root))
    assert {len(kinds) for kinds in found.values()} == {1}
    assert {kinds[0] for kinds in found.values()} == set(layout.KINDS)


def test_what_is_published_are_all_the_kinds_that_are_published_and_no_other(shards: ShardSet, tmp_path: Path) -> None:
    publish(shards, shards.snapshot(), tmp_path / "out", list(reward_columns(shards)))
    for folder in (tmp_path / "out", export(tmp_path / "export", wanted(3))):
        found = kinds_below(folder, "README.md", ".gitattributes")
        assert {len(kinds) for kinds in found.values()} == {1}
        assert {kinds[0] for kinds in found.values()} == {kind for kind in layout.KINDS if kind.published}
        assert {path.name for path in folder.iterdir()} <= EXPORTED
    assert {path.name for path in (tmp_path / "out").iterdir()} == set(layout.TOPS)


@pytest.mark.parametrize("kind", layout.KINDS, ids=lambda kind: kind.template)
def test_a_name_is_read_back_as_it_was_made(kind: layout.Kind) -> None:
    mine = {part: value for part, value in PARTS.items() if part in kind.template}
    name = kind.name(**mine)
    assert kind.parts(name) == kind.parts_of_alike(name) == mine
    assert layout.understand(name) == layout.File(kind, mine)
    assert Path(name).match(kind.wildcard()) and Path(name).match(kind.wildcard(**mine))
    for other in (name + "~", "x/" + name, name.upper(), temporary_name(name)):
        assert layout.understand(other) is None


def test_numbers_are_padded_and_read_back() -> None:
    assert layout.MANIFEST.name(number=7) == "manifests/0007.json"
    assert layout.shard_name(321) == "rollout-000321" and layout.shard_number("rollout-000321") == 321
    assert layout.is_shard("rollout-000321") and not layout.is_shard("rollout-notes")


def test_what_vouches_is_written_last_and_deleted_first() -> None:
    written, deleted = layout.KINDS.index, layout.DELETED.index
    assert {*layout.DELETED, layout.RECIPE, layout.LOCK} == set(layout.KINDS)
    vouched = [kind for kind in layout.KINDS if kind.vouched_by]
    assert vouched == [layout.SHARD, layout.SCORES, layout.INDEX]
    for kind in vouched:
        assert kind.vouched_by and written(kind.vouched_by) > written(kind)
        assert deleted(kind.vouched_by) < deleted(kind)
    # a finished shard without its plan would be planned again
    assert written(layout.PLAN) < written(layout.DONE) and deleted(layout.DONE) < deleted(layout.PLAN)
    # scores without their shard, or without their column's record, are an error
    assert deleted(layout.SCORES) < deleted(layout.DONE) and deleted(layout.SCORES) < deleted(layout.REWARD)


def test_files_go_in_that_order_whatever_order_they_are_named_in(shards: ShardSet) -> None:
    names = {name for name, kinds in kinds_below(Path(shards.root)).items() if kinds[0] in layout.DELETED}
    going = [layout.understand(name) for name in layout.to_delete(names)]
    assert len(going) == len(names) > len(layout.DELETED)
    assert list(dict.fromkeys(file.kind for file in going if file)) == list(layout.DELETED)


@pytest.fixture
def store(shards: ShardSet, tmp_path: Path) -> Path:
    root = Path(shards.root)
    return Path(shutil.copytree(root, tmp_path / root.name, ignore=shutil.ignore_patterns("locks")))


STRANGERS = ["notes.txt", "shards/notes.txt", "embeddings/notes.safetensors", "shards/rollout-12.done.json", "x/a.json"]


@pytest.mark.parametrize("name", STRANGERS)
def test_gc_calls_an_unknown_file_strange(store: Path, name: str) -> None:
    (store / name).parent.mkdir(exist_ok=True)
    (store / name).write_text("years")
    assert read_files(store).strange == [name] and name not in read_files(store).files


@pytest.mark.parametrize("name", STRANGERS)
def test_verify_passes_over_an_unknown_file_unless_its_folder_and_ending_are_those_of_a_kind(
    store: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    (store / name).parent.mkdir(exist_ok=True)
    (store / name).write_text("years")
    alike = [kind for kind in layout.KINDS if kind.parts_of_alike(name) is not None]
    if not alike:
        assert verify(store)["ok"]
        return
    with caplog.at_level(logging.ERROR, logger="rats"), pytest.raises(DataError, match="1 damaged or missing"):
        verify(store)
    assert Path(name).name.partition(".")[0] in caplog.text
