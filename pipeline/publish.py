"""Hands a snapshot to the next stage: a plain folder of hardlinks that `ShardSet.open` reads."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from rats.pipeline.atomic import atomic_folder, storage_errors
from rats.pipeline.store import ROLLOUT, ShardSet
from rats.schemas.errors import CannotCreateError, DataError
from rats.schemas.manifest import Snapshot


def publish(shards: ShardSet, snapshot: Snapshot, out: Path, reward_fps: Sequence[str]) -> None:
    """Make `out` exactly what the snapshot needs: its shards, index, embeddings, scores and manifest.

    Files are linked, and copied where the file system differs; an older published folder is replaced.

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
        for name in files:
            _link(shards.root / name, folder / name)


def _files(shards: ShardSet, snapshot: Snapshot, reward_fps: Sequence[str]) -> list[str]:
    """Names below the set's folder, the manifest last."""
    rows = shards.index(snapshot)
    prompts = sorted({row.prompt_id for row in rows})
    names = ["recipe.json", f"index/{snapshot.index}"]
    for shard in sorted(snapshot.shards):
        done = shards.done(shard)
        if done is None or done.blake3 != snapshot.shards[shard]:
            raise DataError(f"{shards.shard_path(shard)} is not the shard of snapshot {snapshot.number}; {ROLLOUT}")
        names += [f"shards/{shard}.tar", f"shards/{shard}.done.json"]
        names += [name for fp in reward_fps for name in _scores(shards, fp, shard)]
    names += [f"scores/{fp}/reward.json" for fp in reward_fps]
    names += [f"embeddings/{prompt}.safetensors" for prompt in prompts if shards.embedding_path(prompt).exists()]
    return [*names, f"manifests/{snapshot.number:04d}.json"]


def _scores(shards: ShardSet, reward_fp: str, shard: str) -> list[str]:
    if not shards.scores_done(reward_fp, shard):
        raise DataError(f"{shard} has no scores by reward {reward_fp[:12]}; {ROLLOUT}")
    return [f"scores/{reward_fp}/{shard}.parquet", f"scores/{reward_fp}/{shard}.done.json"]


def _check_out(shards: ShardSet, out: Path) -> None:
    """Never replace a folder that is not ours."""
    here, root = out.resolve(), shards.root.resolve()
    if here.is_relative_to(root) or root.is_relative_to(here):
        raise CannotCreateError(f"cannot publish {root} into {out}: one holds the other; choose another folder")
    if out.exists() and not (out / "recipe.json").exists() and (not out.is_dir() or any(out.iterdir())):
        raise CannotCreateError(f"{out} holds something else than a shard set; choose another folder or empty it")


def _same(root: Path, out: Path, files: Sequence[str]) -> bool:
    """Whether `out` is there already, link by link."""
    found = (
        {path.relative_to(out).as_posix() for path in out.rglob("*") if not path.is_dir()} if out.is_dir() else set()
    )
    return found == set(files) and all(os.path.samefile(root / name, out / name) for name in files)


def _link(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with storage_errors(target):
        try:
            os.link(source, target)
        except OSError as error:
            if error.errno not in (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP):
                raise
            shutil.copyfile(source, target)
