"""What an import refuses: damage, lies with right seals, names that lead elsewhere, links. Nothing is written then."""

from __future__ import annotations

import io
import os
import pickle
import shutil
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import load, save

from rats.pipeline.files.reading import hash_bytes
from rats.pipeline.store.shard_set import ShardSet
from rats.schemas.errors import DataError
from rats.schemas.manifest import snapshot_hash
from rats.stages.shards.exchange import import_set
from rats.stages.shards.untrusted import plain_view
from tests.support.damage import copied, reseal, unsealed, vouch
from tests.support.project import tree
from tests.support.rolled import export
from tests.support.shards import wanted

SHARD = "shards/rollout-000000"


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One shard of three prompts' first noises; tests copy it before they spoil it."""
    return export(tmp_path_factory.mktemp("exported"), wanted(3, 1))


def rewrite(folder: Path, name: str, data: bytes) -> None:
    """Another content under a name (a new file: the export is hardlinks)."""
    (folder / name).unlink()
    (folder / name).write_bytes(data)


def flip(folder: Path, name: str) -> None:
    """One bit in the middle of the first file of that pattern."""
    path = sorted(folder.glob(name))[0]
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 16
    rewrite(folder, path.relative_to(folder).as_posix(), bytes(data))


def members(folder: Path) -> list[tuple[tarfile.TarInfo, bytes]]:
    """Of the shard."""
    with tarfile.open(folder / f"{SHARD}.tar") as tar:
        return [(member, tar.extractfile(member).read()) for member in tar]  # type: ignore[union-attr]


def lie(folder: Path, entries: list[tuple[tarfile.TarInfo, bytes]]) -> None:
    """The shard made of other members, its documents, index and manifest sealed over it as if it were right."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for member, data in entries:
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    for name in [f"{SHARD}.done.json", "manifests/0001.json", *folder_tables(folder)]:
        rewrite(folder, name, (folder / name).read_bytes())  # no hardlink any more
    rewrite(folder, f"{SHARD}.tar", buffer.getvalue())
    rows = unsealed(folder / f"{SHARD}.done.json")["rows"]
    with tarfile.open(fileobj=io.BytesIO(buffer.getvalue())) as tar:
        found = {member.name: (member.offset_data, tar.extractfile(member).read()) for member in tar if member.isreg()}  # type: ignore[union-attr]
    for row in rows:
        if f"{row['key']}.latents.safetensors" in found:
            offset, data = found[f"{row['key']}.latents.safetensors"]
            row |= {"offset": offset, "length": len(data), "blake3": hash_bytes(data)}
    reindex(folder, rows)


def folder_tables(folder: Path) -> list[str]:
    """Names of the scores' files."""
    return [path.relative_to(folder).as_posix() for path in sorted(folder.glob("scores/*/rollout*"))]


def reindex(folder: Path, rows: list[dict]) -> None:
    """Document, index and manifest for these rows, in agreement with each other."""
    reseal(folder / f"{SHARD}.done.json", rows=rows)
    table = pq.read_table(folder / "index" / "0001.parquet")
    by_key = sorted(rows, key=lambda row: row["key"])
    data = io.BytesIO()
    pq.write_table(type(table).from_pylist(by_key, schema=table.schema), data)
    rewrite(folder, "index/0001.parquet", data.getvalue())

    class Row:
        def __init__(self, row: dict) -> None:
            self.key, self.blake3 = row["key"], row["blake3"]

    reseal(folder / "manifests/0001.json", hash=snapshot_hash(Row(row) for row in rows))  # type: ignore[misc]
    vouch(folder)


def change_latents(folder: Path, change: Callable[[dict[str, np.ndarray]], None]) -> None:
    """The first sample's arrays changed."""
    entries = members(folder)
    arrays = {name: array.copy() for name, array in load(entries[1][1]).items()}
    change(arrays)
    entries[1] = (entries[1][0], save(arrays))
    lie(folder, entries)


class Bomb:
    """What a pickle reader would run."""

    def __reduce__(self) -> tuple:
        return os.system, ("touch exploded",)


def add(name: str, kind: bytes = tarfile.REGTYPE, data: bytes = b"", link: str = "") -> Callable[[Path], None]:
    """A further member at the front of the shard."""

    def spoil(folder: Path) -> None:
        member = tarfile.TarInfo(name)
        member.type, member.linkname = kind, link
        lie(folder, [(member, data), *members(folder)])

    return spoil


def rename_member(folder: Path) -> None:
    entries = members(folder)
    entries[0][0].name = "../" + entries[0][0].name
    lie(folder, entries)


def other_prompt(folder: Path) -> None:
    """A prompt that is not the one the sample is named after, wherever it is written."""
    entries = members(folder)
    entries[0] = (entries[0][0], entries[0][1].replace(b"a picture of thing", b"a forgery of thing"))
    lie(folder, entries)
    rows = unsealed(folder / f"{SHARD}.done.json")["rows"]
    rows[0]["prompt"] = rows[0]["prompt"].replace("picture", "forgery")
    reindex(folder, rows)


def other_json(folder: Path) -> None:
    entries = members(folder)
    entries[0] = (entries[0][0], entries[0][1].replace(b"0.875", b"0.874"))
    lie(folder, entries)


def other_place(folder: Path) -> None:
    rows = unsealed(folder / f"{SHARD}.done.json")["rows"]
    rows[0] |= {name: rows[1][name] for name in ("offset", "length", "blake3")}
    lie(folder, members(folder))
    reindex(folder, rows)


def other_index(folder: Path) -> None:
    """An index that agrees with its manifest and not with the shard."""
    rows = unsealed(folder / f"{SHARD}.done.json")["rows"]
    other_place(folder)
    reseal(folder / f"{SHARD}.done.json", rows=rows)


def linked(name: str) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        outside = folder.parent / "outside"
        shutil.move(folder / name, outside)
        (folder / name).symlink_to(outside)

    return spoil


def append(folder: Path) -> None:
    data = (folder / f"{SHARD}.tar").read_bytes()
    lie(folder, members(folder))
    rewrite(folder, f"{SHARD}.tar", data + b"\0" * 512 + b"more" * 128)
    vouch(folder)


def other_recipe(folder: Path) -> None:
    rewrite(folder, "recipe.json", (folder / "recipe.json").read_bytes().replace(b'"seed":0', b'"seed": 0'))
    reseal(folder / "manifests/0001.json")
    vouch(folder)


SPOILED: dict[str, tuple[Callable[[Path], None], str]] = {
    "a bit of a shard": (lambda folder: flip(folder, "shards/*.tar"), "damaged"),
    "a bit of an embedding": (lambda folder: flip(folder, "embeddings/*"), "damaged"),
    "a bit of the scores": (lambda folder: flip(folder, "scores/*/*.parquet"), "damaged"),
    "a bit of the index": (lambda folder: flip(folder, "index/*"), "damaged"),
    "a bit of the manifest": (lambda folder: flip(folder, "manifests/*"), "damaged"),
    "no embedding": (lambda folder: sorted(folder.glob("embeddings/*"))[0].unlink(), "missing"),
    "no shard": (lambda folder: (folder / f"{SHARD}.tar").unlink(), "missing"),
    "another spelling of the recipe": (other_recipe, "spelled"),
    "a pickle in the tar": (add("a.pkl", data=pickle.dumps(Bomb())), "not what is recorded"),
    "a member outside": (rename_member, "not what is recorded"),
    "an absolute member": (add("/etc/passwd", data=b"root"), "not what is recorded"),
    "a link in the tar": (add("a.json", tarfile.SYMTYPE, link="/etc/passwd"), "no plain file"),
    "a device in the tar": (add("a.json", tarfile.CHRTYPE), "no plain file"),
    "something after the end of the tar": (append, "more than its samples"),
    "a sample under another prompt": (other_prompt, "not named after its prompt"),
    "another description": (other_json, "not what is recorded"),
    "an index that places one sample at another": (other_place, "noise of its recipe"),
    "an index that agrees with no shard": (other_index, "where it is not"),
    "another noise": (lambda f: change_latents(f, lambda a: a["x"][0].__iadd__(1)), "noise of its recipe"),
    "not a number": (lambda f: change_latents(f, lambda a: a["x"][2].fill(np.nan)), "not finite"),
    "a shard named ../x": (lambda f: reseal(f / f"{SHARD}.done.json", shard="../x"), "damaged"),
    "a snapshot of ../x": (lambda f: reseal(f / "manifests/0001.json", index="../../x.parquet"), "damaged"),
    "a linked shard": (linked(f"{SHARD}.tar"), "link"),
    "a linked folder": (linked("embeddings"), "link"),
    "a linked recipe": (linked("recipe.json"), "link"),
}


@pytest.mark.parametrize("what", SPOILED)
def test_nothing_is_imported_of_a_set_with(exported: Path, tmp_path: Path, what: str):
    spoil, hint = SPOILED[what]
    copied(exported, tmp_path / "in")
    spoil(tmp_path / "in")
    before = tree(tmp_path)
    with pytest.raises(DataError, match=hint) as caught:
        import_set(tmp_path / "in", tmp_path / "store")
    assert "\n" not in str(caught.value) and "stage rollout" not in str(caught.value)
    # whoever has only the folder is told so once, in place of what the owner of a store would do
    assert str(caught.value).count("; fetch the set ") == 1
    assert hint == "link" or str(caught.value).endswith("; fetch the set again; nothing was imported")
    assert tree(tmp_path) == before


def test_a_lie_that_says_nothing_false_is_imported(exported: Path, tmp_path: Path):
    """The test above refuses for what each case changes, not for how its folder is made."""
    copied(exported, tmp_path / "in")
    lie(tmp_path / "in", members(tmp_path / "in"))
    assert import_set(tmp_path / "in", tmp_path / "store")["samples"] == 3


def test_an_import_runs_no_code_of_the_set(exported: Path, tmp_path: Path):
    import_set(exported, tmp_path / "warm")
    copied(exported, tmp_path / "in")
    for name in ("shards/a.pkl", "embeddings/b.pth", "setup.py"):
        (tmp_path / "in" / name).write_bytes(pickle.dumps(Bomb()))
    seen: list[str] = []
    watching = True
    sys.addaudithook(lambda event, _: seen.append(event) if watching else None)
    import_set(tmp_path / "in", tmp_path / "store")
    watching = False
    assert {"os.system", "subprocess.Popen", "pickle.find_class", "exec"} & set(seen) == set() and "open" in seen
    assert not list((tmp_path / "store").rglob("*.p[kt]*"))


def cached(exported: Path, cache: Path) -> Path:
    """The folder as the Hub's client keeps it: files are links into blobs."""
    repository = cache / "datasets--user--name"
    snapshot = repository / "snapshots" / ("c" * 40)
    (repository / "blobs").mkdir(parents=True)
    for path in (path for path in exported.rglob("*") if path.is_file()):
        target = snapshot / path.relative_to(exported)
        target.parent.mkdir(parents=True, exist_ok=True)
        blob = repository / "blobs" / hash_bytes(path.relative_to(exported).as_posix().encode())
        shutil.copyfile(path, blob)
        target.symlink_to(os.path.relpath(blob, target.parent))
    return snapshot


def test_the_hubs_cache_is_imported_as_it_lies_there(exported: Path, tmp_path: Path):
    snapshot = cached(exported, tmp_path / "cache")
    before = sorted(tmp_path.rglob("*"))
    report = import_set(snapshot, tmp_path / "store")
    assert report["hash"] == ShardSet.open(exported).snapshot().hash
    assert [path for path in sorted(tmp_path.rglob("*")) if "store" not in path.parts] == before
    stored = [path for path in (tmp_path / "store").rglob("*") if path.is_file()]
    assert all(not path.is_symlink() and path.stat().st_nlink == 1 for path in stored)


@pytest.mark.parametrize("name", ["recipe.json", "embeddings", "scores/more", f"{SHARD}.tar", "index/0001.parquet"])
@pytest.mark.parametrize("leads_to", ["../outside", "nowhere", None])
def test_a_link_is_refused_by_its_name_wherever_it_leads(
    exported: Path, tmp_path: Path, name: str, leads_to: str | None
):
    folder = copied(exported, tmp_path / "in")
    link = folder / name
    if link.exists():
        shutil.move(link, tmp_path / "outside")
    link.symlink_to(link.name if leads_to is None else leads_to)  # without: to itself
    with pytest.raises(DataError, match=f"^{link} is a link to .*, which is refused; fetch"):
        import_set(folder, tmp_path / "store")
    assert not (tmp_path / "store").exists()


def test_a_link_out_of_the_hubs_cache_is_refused(exported: Path, tmp_path: Path):
    snapshot = cached(exported, tmp_path / "cache")
    secret = tmp_path / "secret"
    secret.write_text("mine")
    (snapshot / "recipe.json").unlink()
    (snapshot / "recipe.json").symlink_to(secret)
    with pytest.raises(DataError, match="--local-dir"), plain_view(snapshot):
        pass
    with pytest.raises(DataError, match="no folder"):
        import_set(tmp_path / "nowhere", tmp_path / "store")
