"""`rats stage score`: scores an existing shard set by any reward, from its stored latents, without the teacher."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rats.pipeline.families.open import Model
from rats.pipeline.files.places import Place, open_place, open_store
from rats.pipeline.machine import software
from rats.pipeline.rewards.open import examine_reward
from rats.pipeline.store.publish import check_out, publish
from rats.pipeline.store.scores import MAX_BAD, record_reward, scores_done
from rats.pipeline.store.shard_set import ShardSet, is_set
from rats.schemas.errors import ConfigError, DataError, nearest
from rats.schemas.manifest import RewardRecord, ShardDone, Snapshot
from rats.schemas.params import Params, Split, TeacherParams
from rats.schemas.recipe import DECODER, Recipe, fingerprint
from rats.schemas.reports import ScoreReport
from rats.stages.rollout.columns import check_failed, column_hashes, reward_params
from rats.stages.rollout.rollout import pin_params, read_recipe, wanted_samples
from rats.stages.rollout.scorer import ScoreSetup, ScoreTask, do_score, missing_columns
from rats.stages.workers.run import WorkerTarget
from rats.stages.workers.tasks import run_tasks

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ScoringSource:
    """A shard set to score, with parameters and decoder's hash. `keys` are those of the split; None: all samples."""

    shards: ShardSet
    params: Params
    vae: str
    keys: frozenset[str] | None

    def snapshot(self, number: int | None) -> Snapshot:
        """The snapshot of that number; without a number the split's, or the newest."""
        if number is None and self.keys is not None:
            return self.shards.write_snapshot(self.keys)
        return self.shards.snapshot(number)

    def done(self, snapshot: Snapshot) -> list[ShardDone]:
        """Documents of the snapshot's shards, which must all be finished."""
        found = sorted(snapshot.shards.items())
        return self.shards.root.concurrently(lambda item: _whole(self.shards, *item), found)


def score_stage(
    params: Params,
    split: Split | None = None,
    shards: Place | str | None = None,
    rewards: Sequence[str] | None = None,
    where: WorkerTarget | None = None,
    max_bad: float = MAX_BAD,
    retry_failed: bool = False,
    out: Path | None = None,
    snapshot: int | None = None,
) -> ScoreReport:
    """Writes the missing scores of a snapshot's shards, exactly as a rollout writes them.

    Args:
        params: The whole configuration.
        split: The split whose samples in the store are scored; the train split if `shards` is not given either.
        shards: The folder or URL of a shard set instead of a split, such as an imported one. Then only the VAE of
            `model.path` is needed; size, dtype, threads and micro-batch are taken from the set's recipe.
        rewards: Names of `params.rewards`, all if not given.
        where: Where tasks run; `params.store.workers` local processes if not given.
        max_bad: The share of samples, 0 to 1, on which a reward may fail.
        retry_failed: Score shards with failed rows again.
        out: A folder to publish into, with all columns of `params.rewards` that are complete.
        snapshot: Number of the snapshot; by default the split's own, or the newest one of `shards`.

    Raises:
        ConfigError: an unknown reward, no VAE or reward where the parameters say.
        DataError: a damaged or missing shard, or a reward that fails on more samples than `max_bad`.
        NoWorkerError: no worker accepted a task.
    """
    start = time.monotonic()
    source = _open(params, split, shards)
    chosen = _check_before(source, rewards, out)
    hashes = column_hashes(source.params, source.vae)
    named = source.snapshot(snapshot)
    done = source.done(named)
    columns = {name: record_reward(source.shards, name, hashes[name]) for name in chosen}
    tasks = _tasks(source.shards, done, columns, retry_failed)
    _announce(source.shards, done, tasks)
    setup = ScoreSetup(source.params, source.shards.root, software(source.params))
    rows = {part.shard: len(part.rows) for part in done}
    samples = sum(rows[task.shard] for task in tasks)
    made = run_tasks(do_score, tasks, setup, where or WorkerTarget(workers=params.store.workers), "score", samples)
    keys = {row.key for row in source.shards.index(named)}
    failed = check_failed(source.shards, columns, named, keys, max_bad)
    if out is not None:
        publish(source.shards, named, out, _complete(source.shards, done, hashes), done)
    return ScoreReport(
        fingerprint=source.shards.fingerprint,
        snapshot=named.hash,
        snapshot_number=named.number,
        rewards=columns,
        samples=named.samples,
        scored=sum(part.scored for part in made),
        failed=failed,
        shards_total=len(done),
        shards_reused=len(done) - len(tasks),
        teacher_forwards=sum(part.teacher_forwards for part in made),
        seconds=time.monotonic() - start,
    )


def plan_score(
    params: Params,
    split: Split | None = None,
    shards: Place | str | None = None,
    rewards: Sequence[str] | None = None,
    retry_failed: bool = False,
    snapshot: int | None = None,
    out: Path | None = None,
) -> dict[str, Any]:
    """What `score_stage` would do, for --dry-run. Raises what it would raise first."""
    source = _open(params, split, shards)
    _check_before(source, rewards, out)
    hashes = column_hashes(source.params, source.vae)
    records = {name: RewardRecord(name=name, hashes=hashes[name]) for name in _chosen(source.params, rewards)}
    columns = {name: record.fingerprint for name, record in records.items()}
    if snapshot is None and source.keys is not None:
        done = [part for part in source.shards.finished() if any(row.key in source.keys for row in part.rows)]
        samples = len(source.keys & {row.key for part in done for row in part.rows})
    else:
        named = source.snapshot(snapshot)
        done, samples = source.done(named), named.samples
    tasks = _tasks(source.shards, done, columns, retry_failed)
    return {
        "fingerprint": source.shards.fingerprint,
        "store": str(source.shards.root),
        "rewards": columns,
        "samples": samples,
        "shards_total": len(done),
        "shards_to_score": len(tasks),
    }


def _open(params: Params, split: Split | None, shards: Place | str | None) -> ScoringSource:
    if shards is None:
        return _open_split(*pin_params(params), split or "train")
    if split is not None:
        raise ConfigError(f"--split {split} and --shards {shards} name two sets: give one of them")
    params, model = pin_params(params, decoder_alone=True)
    found = ShardSet.open(open_place(shards).absolute())
    folder = model.decoder_folder
    if not (folder.decoder_root / DECODER).is_dir():
        raise ConfigError(
            f"no folder {DECODER!r} in {folder.decoder_root}: model.path must hold the decoder of these shards"
        )
    return ScoringSource(found, as_made(params, found.recipe), folder.hash_of(DECODER), None)


def _open_split(params: Params, model: Model, split: Split) -> ScoringSource:
    keys = frozenset(sample.key for sample in wanted_samples(params, split))
    root = open_store(params.store.path).absolute() / fingerprint(read_recipe(params, model))
    if not is_set(root):
        raise DataError(f"{root} is not there: nothing is rolled out with these parameters; run `rats stage rollout`")
    return ScoringSource(ShardSet.open(root), params, model.folder.hash_of(DECODER), keys)


def as_made(params: Params, recipe: Recipe) -> Params:
    """The parameters with the recipe's teacher, dtype, threads and micro-batch, which change embeddings or scores.

    The device is not changed, since this machine may have another one. If its kind differs, a warning is logged.
    """
    if params.compute.device.partition(":")[0] != recipe.compute.device:
        here, there = params.compute.device, recipe.compute.device
        log.warning("scoring on %s what was made on %s: the scores' last bits may be others", here, there)
    teacher = {name: getattr(recipe, name) for name in TeacherParams.model_fields if name in Recipe.model_fields}
    bits = {"threads": recipe.compute.threads, "micro_batch": recipe.compute.micro_batch}
    return params.model_copy(
        update={
            "model": params.model.model_copy(update={"dtype": recipe.dtype}),
            "teacher": params.teacher.model_copy(update=teacher),
            "compute": params.compute.model_copy(update=bits),
        }
    )


def _check_before(source: ScoringSource, rewards: Sequence[str] | None, out: Path | None) -> list[str]:
    """The names of the rewards to score by. Raises what would else be found after hours of scoring."""
    chosen = _chosen(source.params, rewards)
    if out is not None:
        check_out(source.shards.root, out)
    for name in chosen:
        examine_reward(reward_params(source.params, name))
    return chosen


def _chosen(params: Params, rewards: Sequence[str] | None) -> list[str]:
    known = [reward.name for reward in params.rewards]
    if not known:
        raise ConfigError("params.yaml names no rewards: add one under rewards:")
    for name in rewards or ():
        if name not in known:
            raise ConfigError(f"--reward {name!r} is no reward of params.yaml{nearest(name, known)}")
    return [name for name in known if not rewards or name in rewards]


def _whole(shards: ShardSet, shard: str, digest: str) -> ShardDone:
    done = shards.done(shard)
    if done is None or done.blake3 != digest:
        problem = "is missing" if done is None else "is not the shard of this snapshot"
        raise DataError(f"{shards.shard_path(shard)} {problem}; run `rats stage rollout`, or import the set again")
    return done


def _tasks(shards: ShardSet, done: Sequence[ShardDone], columns: dict[str, str], retry: bool) -> list[ScoreTask]:
    def missing(part: ShardDone) -> dict[str, str]:
        return missing_columns(shards, part, columns, retry)

    found = zip(done, shards.root.concurrently(missing, done), strict=True)
    return [ScoreTask(shard=part.shard, columns=columns, retry=retry) for part, some in found if some]


def _announce(shards: ShardSet, done: Sequence[ShardDone], tasks: Sequence[ScoreTask]) -> None:
    there = len(done) - len(tasks)
    where = f"set {shards.fingerprint[:12]}"
    log.info("%s: %d of %d shards are scored, %d to do", where, there, len(done), len(tasks))


def _complete(shards: ShardSet, done: Sequence[ShardDone], hashes: dict[str, dict[str, str]]) -> list[str]:
    """The columns that are complete: every shard has its scores."""
    columns = [RewardRecord(name=name, hashes=parts).fingerprint for name, parts in hashes.items()]
    return [column for column in columns if all(scores_done(shards, column, part.shard, part.blake3) for part in done)]
