"""A store's code asks a place, not its type: a folder and a bucket give the same answers, where they can."""

from __future__ import annotations

import os
import pickle
import uuid
from pathlib import Path

import pytest

from rats.pipeline.files.local import LocalPlace
from rats.pipeline.files.places import Place, matching, open_place
from rats.pipeline.files.reading import hash_bytes, hash_file, hash_ranges
from rats.schemas.errors import DataError, StorageError

DATA = bytes(range(7, 250)) * 3


@pytest.fixture(params=["local", "memory"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    """An empty folder, here or in a bucket."""
    return open_place(tmp_path if request.param == "local" else f"memory://places/{uuid.uuid4().hex}")


def test_what_is_written_is_read_whole_in_part_and_by_its_hash(place: Place) -> None:
    path = place / "shards" / "a.tar"
    path.write(DATA)
    assert path.read() == DATA and path.read_range(11, 29) == DATA[11:29]
    assert path.read_range(700, 5000) == DATA[700:] and path.read_range(5000, 6000) == b""
    assert hash_file(path) == (hash_bytes(DATA), len(DATA))
    assert hash_ranges(path, [(11, 18), (3, 5)]) == (hash_bytes(DATA), [hash_bytes(DATA[11:29]), hash_bytes(DATA[3:8])])
    path.write(DATA[:13])
    assert path.read() == DATA[:13]


def test_a_missing_file_is_a_data_error_that_leaves_the_way_out_to_its_reader(place: Place) -> None:
    for read in (place.read, place.open_plain, lambda: (place / "x" / "y").read_range(2, 3)):
        with pytest.raises(DataError) as caught:
            read()
        assert caught.value.remedy == ""
    assert (place / "x").sizes() == {} and not (place / "x").exists()


def test_a_name_is_taken_once(place: Place) -> None:
    path = place / "0007.json"
    assert path.create(b"first") and not path.create(b"second")
    assert path.read() == b"first"


def test_a_large_file_is_written_aside_and_nothing_is_there_until_it_is_put(place: Place) -> None:
    path = place / "shards" / "b.tar"
    with path.temporary() as temporary:
        temporary.write_bytes(DATA)
        assert not path.exists() and hash_file(temporary)[0] == hash_bytes(DATA)
        path.put(temporary)
    assert path.read() == DATA and not temporary.exists()
    with pytest.raises(ZeroDivisionError), path.temporary() as temporary:
        temporary.write_bytes(DATA[3:])
        raise ZeroDivisionError
    assert path.read() == DATA and (place / "shards").sizes() == {"b.tar": len(DATA)}


def test_a_listing_and_a_pattern_give_what_lies_there(place: Place) -> None:
    for name, size in (("b.json", 5), ("a.json", 17), ("c.tar", 3)):
        (place / name).write(DATA[:size])
    (place / "deeper" / "d.json").write(DATA)
    sizes = place.sizes()
    assert {name: sizes[name] for name in ("a.json", "b.json", "c.tar")} == {"a.json": 17, "b.json": 5, "c.tar": 3}
    assert [path.name for path in matching(place, "*.json")] == ["a.json", "b.json"]
    assert place.concurrently(lambda name: (place / name).read(), ["c.tar", "b.json"]) == [DATA[:3], DATA[:5]]


def test_a_copy_is_known_as_one_until_either_changes(place: Place, tmp_path: Path) -> None:
    path, target = place / "a.json", tmp_path / "out" / "shards" / "a.json"
    path.write(DATA)
    path.copy_to(target)
    assert target.read_bytes() == DATA and path.is_copied_to(target)
    path.write(DATA[::-1])
    assert not path.is_copied_to(target)


def test_a_local_place_is_a_hardlink_s_source_and_has_locks_and_room(tmp_path: Path) -> None:
    place = open_place(tmp_path / "not" / "there")
    assert place.local == tmp_path / "not" / "there" and place.has_locks
    assert 0 < (place.free() or 0) < 2**63
    with (place / "a.lock").lock(0.0) as mine, (place / "a.lock").lock(0.0) as second:
        assert mine and not second
    (place / "a.tar").write(DATA)
    (place / "a.tar").copy_to(tmp_path / "b.tar")
    assert os.path.samefile(tmp_path / "b.tar", place / "a.tar")


def test_a_remote_place_has_neither_locks_nor_a_known_room(tmp_path: Path) -> None:
    place = open_place("memory://places/room")
    assert (place.local, place.free(), place.has_locks) == (None, None, False)
    with (place / "a.lock").lock(0.0) as mine, (place / "a.lock").lock(0.0) as second:
        assert mine and second


def test_a_place_stays_one_however_it_is_reached_and_in_another_process(place: Place) -> None:
    (place / "deep" / "a.json").write(DATA)
    (found,) = matching(place, "*/a.json")
    reached = [found, found.parent, place.absolute(), *place.iterdir(), pickle.loads(pickle.dumps(found))]
    assert {type(each) for each in reached} == {type(place)}
    assert str(reached[-1]) == str(found) and reached[-1].read() == DATA
    assert open_place(place) == place == open_place(str(place))


def test_links_and_what_is_no_file_are_refused_here(tmp_path: Path) -> None:
    place = LocalPlace(tmp_path)
    (place / "real").mkdir()
    (place / "link").symlink_to(place / "real")
    (place / "a.json").symlink_to(place / "real" / "b.json")
    with pytest.raises(DataError, match="link to another folder"):
        place.refuse_links()
    with pytest.raises(DataError, match="a link is refused"):
        (place / "a.json").read()
    with pytest.raises(DataError, match="no plain file|not a plain file"):
        (place / "real").read()


def test_a_range_that_no_file_has_is_named_with_its_file(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(DATA)
    with pytest.raises(StorageError, match=r"cannot read .*a\.tar: .*; check the disk"):
        LocalPlace(tmp_path / "a.tar").read_range(2**70, 2**70 + 3)
