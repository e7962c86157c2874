"""Publishes a snapshot for the next stage: a folder of hardlinks that `ShardSet.open` reads."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from rats.pipeline.files.atomic import atomic_folder, check_creatable
from rats.pipeline.files.places import Place
from rats.pipeline.store import layout
from rats.pipeline.store.scores import scores_done
from rats.pipeline.store.shard_set import ROLLOUT, ShardSet, is_set
from rats.pipeline.store.shards import verify_shard
from rats.schemas.errors import CannotCreateError, DataError, remedy
from rats.schemas.manifest import ShardDone, Snapshot


@remedy(ROLLOUT)
def publish(
    shards: ShardSet, snapshot: Snapshot, out: Path, reward_fps: Sequence[str], known: Iterable[ShardDone] = ()
) -> None:
    """Make `out` exactly what the snapshot needs: its shards, index, embeddings, scores and manifest.

    Files are linked, and copied where the file system differs; from a remote store they are downloaded and verified.
    An older published folder is replaced. Of the finished shards' documents the `known` ones are not read again.

    Raises:
        DataError: a shard or a column of scores is missing.
        CannotCreateError: `out` holds something else than a published shard set.
    """
    out = Path(out)
    files = _files(shards, snapshot, reward_fps, known)
    _refuse_other(shards.root, out)
    if _same(shards.root, out, files):
        return
    with atomic_folder(out) as folder:
        shards.root.concurrently(lambda name: (shards.root / name).copy_to(folder / name), files)
        if shards.root.local is None:  # a download may be damaged, a link is the file itself
            _verify(ShardSet.open(folder), snapshot)


def _verify(copy: ShardSet, snapshot: Snapshot) -> None:
    for shard, digest in snapshot.shards.items():
        verify_shard(copy, shard, digest)


def _files(shards: ShardSet, snapshot: Snapshot, reward_fps: Sequence[str], known: Iterable[ShardDone]) -> list[str]:
    """Names below the set's folder, the manifest last."""
    names = [layout.RECIPE.name(), layout.index_of(snapshot)]
    done = {part.shard: part for part in shards.finished(known)}
    for shard in sorted(snapshot.shards):
        if shard not in done or done[shard].blake3 != snapshot.shards[shard]:
            raise DataError(f"{shards.shard_path(shard)} is not the shard of snapshot {snapshot.number}", ROLLOUT)
        names += [kind.name(shard=shard) for kind in (layout.SHARD, layout.DONE)]
    columns = [(fp, *shard) for fp in reward_fps for shard in sorted(snapshot.shards.items())]
    scores = shards.root.concurrently(lambda column: _scores(shards, *column), columns)
    names += [name for part in scores for name in part]
    names += [layout.REWARD.name(reward=fp) for fp in reward_fps]
    prompts = shards.encoded() & {row.prompt_id for row in shards.index(snapshot)}
    names += [layout.EMBEDDING.name(prompt=prompt) for prompt in sorted(prompts)]
    return [*names, layout.MANIFEST.name(number=snapshot.number)]


def _scores(shards: ShardSet, reward_fp: str, shard: str, shard_blake3: str) -> list[str]:
    if not scores_done(shards, reward_fp, shard, shard_blake3):
        raise DataError(f"{shard} has no scores by reward {reward_fp[:12]}", ROLLOUT)
    return [kind.name(reward=reward_fp, shard=shard) for kind in (layout.SCORES, layout.SCORES_DONE)]


def check_out(root: Place, out: Path) -> None:
    """Finds out before the teacher runs whether the set at `root`, which need not exist, can be published into `out`.

    Raises:
        CannotCreateError: `out` holds something else than a published set, is in the set or around it, or cannot be
            made.
    """
    _refuse_other(root, out)
    check_creatable(out)


def _refuse_other(root: Place, out: Path) -> None:
    if root.local:
        here, there = out.resolve(), root.local.resolve()
        if here.is_relative_to(there) or there.is_relative_to(here):
            raise CannotCreateError(f"cannot publish {root} into {out}: one holds the other", "choose another folder")
    if out.exists() and not is_set(out) and (not out.is_dir() or any(out.iterdir())):
        raise CannotCreateError(f"{out} holds something else than a shard set", "choose another folder or empty it")


def _same(root: Place, out: Path, files: Sequence[str]) -> bool:
    """Whether `out` is up to date: by its links or content, or for a remote store by names and sizes."""
    found = (
        {path.relative_to(out).as_posix() for path in out.rglob("*") if not path.is_dir()} if out.is_dir() else set()
    )
    return found == set(files) and all(root.concurrently(lambda name: (root / name).is_copied_to(out / name), files))
