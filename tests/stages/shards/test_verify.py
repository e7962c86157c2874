"""`rats shards verify`: every byte is looked at, and all damage is named, not only the first."""

from __future__ import annotations

import json
import logging
import random
import re
import shutil
from pathlib import Path

import pytest

from rats.pipeline.files.places import open_place
from rats.pipeline.store.documents import read_document, write_document
from rats.pipeline.store.embeddings import read_embedding, verify_embedding
from rats.pipeline.store.publish import publish
from rats.pipeline.store.scores import reward_columns
from rats.pipeline.store.shard_set import ShardSet
from rats.schemas.errors import DataError
from rats.schemas.manifest import ShardPlan, Snapshot
from rats.stages.shards.verify import verify
from tests.support.damage import copied, files, flipped
from tests.support.project import rats
from tests.support.shards import embed, score, wanted, write_samples, write_set

PROMPTS = wanted(prompts=3)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a set in `store` that has grown once, and its first snapshot published into `out`."""
    folder = tmp_path_factory.mktemp("verify")
    shards = write_set(folder / "store", PROMPTS)
    write_samples(shards, wanted(prompts=4))
    embed(shards, wanted(prompts=4))
    publish(shards, shards.snapshot(1), folder / "out", [score(shards)])
    return folder


@pytest.fixture(params=["store", "out"])
def folder(whole: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """A copy of either, to be spoiled."""
    source = whole / request.param
    source = next(source.iterdir()) if request.param == "store" else source
    return copied(source, tmp_path / source.name)


@pytest.fixture
def store(whole: Path, tmp_path: Path) -> ShardSet:
    source = next((whole / "store").iterdir())
    return ShardSet.open(copied(source, tmp_path / source.name))


def test_a_whole_set_is_read_to_the_last_byte(folder: Path) -> None:
    result = verify(folder)
    assert result["ok"] and result["unfinished"] == []
    assert result["bytes"] == sum(path.stat().st_size for path in files(folder))
    counts = {"samples": 8, "snapshots": 2, "shards": 3, "rewards": 1, "embeddings": 4}
    published = {"samples": 6, "snapshots": 1, "shards": 2, "rewards": 1, "embeddings": 3}
    assert {name: result[name] for name in counts} == (published if folder.name == "out" else counts)
    assert result["gb_per_second"] > 0


def test_every_damaged_file_is_found_and_named_in_one_pass(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    generator, names = random.Random(0), files(folder)
    spoiled = [path for path in names if path.name != "recipe.json"]
    for path in spoiled:
        path.write_bytes(flipped(path.read_bytes(), generator))
    with caplog.at_level(logging.ERROR, logger="rats"), pytest.raises(DataError) as caught:
        verify(folder)
    # a table cannot be judged without the document that vouches for it, nor a tar, nor an index
    vouched = [path for path in spoiled if path.suffix not in (".tar", ".parquet")]
    for path in vouched:
        assert path.name in caplog.text or path.name.replace(".done.json", ".tar") in caplog.text, path
    assert re.search(rf"has {len(caplog.records)} damaged or missing files, first: .*; \w+", str(caught.value))
    assert len(caplog.records) >= len(vouched) and "\n" not in str(caught.value)


def test_one_flipped_bit_or_one_cut_anywhere_is_one_file_and_no_other_is_blamed(folder: Path) -> None:
    generator = random.Random(1)
    for path in files(folder):
        data = path.read_bytes()
        for content in (flipped(data, generator), data[: generator.randrange(len(data))], b""):
            path.write_bytes(content)
            with pytest.raises(DataError, match="recipe" if path.name == "recipe.json" else "has 1 damaged"):
                verify(folder)
        path.write_bytes(data)
    assert verify(folder)["ok"]


def test_every_missing_file_is_named_and_all_of_them_at_once(whole: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(whole / "out", tmp_path / "copy"))
    for path in files(folder):
        data = path.read_bytes()
        path.unlink()
        with pytest.raises(DataError):
            verify(folder)
        path.write_bytes(data)
    for path in [*(folder / "embeddings").iterdir(), folder / "shards" / "rollout-000001.tar"]:
        path.unlink()
    with pytest.raises(DataError, match=r"has 4 damaged or missing files, first: .*rollout-000001.tar is missing"):
        verify(folder)


def test_work_that_is_not_finished_is_no_damage_in_a_store(store: ShardSet) -> None:
    store.plan(wanted(prompts=6), 2)
    column = next(iter(reward_columns(store)))
    (store.scores_folder(column) / "rollout-000000.done.json").unlink()
    (store.root / "shards" / ".rollout-000009.tar.somewhere-1-00000000.tmp").write_bytes(b"torn")
    assert verify(store.root)["unfinished"] == [
        "2 planned shards are still to be made",
        f"scores {column[:12]} lack 1 of 3 shards",
    ]


def test_a_shard_made_again_differently_is_found_by_the_documents_that_name_it(
    store: ShardSet, whole: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = store.done("rollout-000001")
    assert other is not None
    rows = tuple(row.model_copy(update={"blake3": "0" * 64}) for row in other.rows)
    write_document(store.done_path("rollout-000001"), other.model_copy(update={"rows": rows}))
    with pytest.raises(DataError, match="damaged at sample"):
        verify(store.root)
    write_document(store.done_path("rollout-000001"), other.model_copy(update={"rows": other.rows[:1]}))
    with pytest.raises(DataError), caplog.at_level(logging.ERROR, logger="rats"):
        verify(store.root)
    for text in ("holds other samples than", "0001.parquet has 1 samples that no shard has", "scores another"):
        assert text in caplog.text


def test_a_document_under_another_documents_name_is_found(store: ShardSet, caplog: pytest.LogCaptureFixture) -> None:
    plan = store.plan_path("rollout-000000")
    write_document(plan, read_document(store.plan_path("rollout-000001"), ShardPlan))
    manifests = store.root / "manifests"
    shutil.copy(manifests / "0001.json", manifests / "0003.json")
    first, second = read_document(manifests / "0001.json", Snapshot), next(iter(store.snapshot(2).shards))
    write_document(manifests / "0002.json", first.model_copy(update={"number": 2, "shards": {second: "0" * 64}}))
    with pytest.raises(DataError), caplog.at_level(logging.ERROR, logger="rats"):
        verify(store.root)
    for text in ("plans rollout-000001", "is snapshot 1, not", f"names another {second}"):
        assert text in caplog.text


def test_the_recipe_alone_is_named_when_nothing_else_can_be_judged(folder: Path) -> None:
    (folder / "recipe.json").write_bytes(b"{}")
    with pytest.raises(DataError, match=r"recipe\.json"):
        verify(folder)


def test_a_remote_set_is_verified_as_a_local_one(whole: Path) -> None:
    place = open_place("memory://verify/out")
    for path in files(whole / "out"):
        (place / path.relative_to(whole / "out").as_posix()).write(path.read_bytes())
    assert {**verify(place), "seconds": 0, "gb_per_second": 0} == {
        **verify(whole / "out"),
        "seconds": 0,
        "gb_per_second": 0,
    }
    (place / "shards" / "rollout-000001.tar").unlink()
    with pytest.raises(DataError, match=r"1 damaged or missing file, first: memory://.*tar is missing"):
        verify(place)


def test_an_embedding_is_whole_only_as_it_was_written_for_its_prompt(store: ShardSet) -> None:
    one, two = (sample.prompt_id for sample in PROMPTS[::2][:2])
    path = store.embedding_path(one)
    data = path.read_bytes()
    assert verify_embedding(store, one) == len(data)
    longer = (int.from_bytes(data[:8], "little") + 8).to_bytes(8, "little")
    spelled_otherwise = longer + b"{" + b" " * 8 + data[9:]
    for content in (
        spelled_otherwise,
        data.replace(b'"seal"', b'"sael"'),
        data.replace(b"{", b" ", 1),
        data + b"\0",
        b"\xff" * 16,
    ):
        path.write_bytes(content)
        for read in (verify_embedding, read_embedding):
            with pytest.raises(DataError, match="is damaged"):
                read(store, one)
    path.write_bytes(store.embedding_path(two).read_bytes())
    with pytest.raises(DataError, match="is damaged"):
        verify_embedding(store, one)


def test_the_command_says_its_speed_and_exits_65_on_damage(whole: Path, tmp_path: Path) -> None:
    copied(whole / "out", tmp_path / "out")
    assert json.loads(rats(tmp_path, "shards", "verify", "out", "--json").stdout)["gb_per_second"] > 0
    (tmp_path / "out" / "index" / "0001.parquet").write_bytes(b"")
    assert "1 damaged or missing file, first" in rats(tmp_path, "shards", "verify", "out", code=65).stderr
