"""Hands a snapshot to the next stage: a plain folder of hardlinks that `ShardSet.open` reads."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from rats.pipeline.files.atomic import atomic_folder, link_or_copy
from rats.pipeline.files.places import Place, concurrently, download, is_remote, read, sizes
from rats.pipeline.store.scores import scores_done
from rats.pipeline.store.shard_set import ROLLOUT, ShardSet
from rats.pipeline.store.shards import verify_shard
from rats.schemas.errors import CannotCreateError, DataError
from rats.schemas.manifest import Snapshot


def publish(shards: ShardSet, snapshot: Snapshot, out: Path, reward_fps: Sequence[str]) -> None:
    """Make `out` exactly what the snapshot needs: its shards, index, embeddings, scores and manifest.

    Files are linked, and copied where the file system differs; from a remote store they are downloaded and verified.
    An older published folder is replaced.

    Raises:
        DataError: a shard or a column of scores is missing.
        CannotCreateError: `out` holds something else than a published shard set.
    """
    out = Path(out)
    files = _files(shards, snapshot, reward_fps)
    _check_out(shards, out)
    if _same(shards.root, out, files):
        return
    with atomic_folder(out) as folder:
        concurrently(shards.root, lambda name: _link(shards.root / name, folder / name), files)
        if is_remote(shards.root):
            _verify(ShardSet.open(folder), snapshot)


def _verify(copy: ShardSet, snapshot: Snapshot) -> None:
    for shard, digest in snapshot.shards.items():
        verify_shard(copy, shard, digest)


def _files(shards: ShardSet, snapshot: Snapshot, reward_fps: Sequence[str]) -> list[str]:
    """Names below the set's folder, the manifest last."""
    names = ["recipe.json", f"index/{snapshot.index}"]
    done = {part.shard: part for part in shards.finished()}
    for shard in sorted(snapshot.shards):
        if shard not in done or done[shard].blake3 != snapshot.shards[shard]:
            raise DataError(f"{shards.shard_path(shard)} is not the shard of snapshot {snapshot.number}; {ROLLOUT}")
        names += [f"shards/{shard}.tar", f"shards/{shard}.done.json"]
    columns = [(fp, shard) for fp in reward_fps for shard in sorted(snapshot.shards)]
    names += [name for part in concurrently(shards.root, lambda pair: _scores(shards, *pair), columns) for name in part]
    names += [f"scores/{fp}/reward.json" for fp in reward_fps]
    encoded = sizes(shards.root / "embeddings")
    prompts = sorted({row.prompt_id for row in shards.index(snapshot)})
    names += [f"embeddings/{prompt}.safetensors" for prompt in prompts if f"{prompt}.safetensors" in encoded]
    return [*names, f"manifests/{snapshot.number:04d}.json"]


def _scores(shards: ShardSet, reward_fp: str, shard: str) -> list[str]:
    if not scores_done(shards, reward_fp, shard):
        raise DataError(f"{shard} has no scores by reward {reward_fp[:12]}; {ROLLOUT}")
    return [f"scores/{reward_fp}/{shard}.parquet", f"scores/{reward_fp}/{shard}.done.json"]


def _check_out(shards: ShardSet, out: Path) -> None:
    """Never replace a folder that is not ours."""
    if isinstance(shards.root, Path):
        here, root = out.resolve(), shards.root.resolve()
        if here.is_relative_to(root) or root.is_relative_to(here):
            raise CannotCreateError(f"cannot publish {root} into {out}: one holds the other; choose another folder")
    if out.exists() and not (out / "recipe.json").exists() and (not out.is_dir() or any(out.iterdir())):
        raise CannotCreateError(f"{out} holds something else than a shard set; choose another folder or empty it")


def _same(root: Place, out: Path, files: Sequence[str]) -> bool:
    """Whether `out` is there already: link by link, or from a remote place name by name and size by size."""
    found = (
        {path.relative_to(out).as_posix() for path in out.rglob("*") if not path.is_dir()} if out.is_dir() else set()
    )
    return found == set(files) and all(concurrently(root, lambda name: _is_copy(root / name, out / name), files))


def _is_copy(source: Place, target: Path) -> bool:
    if isinstance(source, Path):
        return os.path.samefile(source, target)
    if source.suffix != ".json":
        return target.stat().st_size == source.stat().st_size
    # the documents hold the hashes of all that is larger
    return target.read_bytes() == read(source, ROLLOUT)


def _link(source: Place, target: Path) -> None:
    if isinstance(source, Path):
        link_or_copy(source, target)
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    download(source, target, ROLLOUT)
