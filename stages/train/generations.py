"""Which teacher is followed: the stored one, new generations of shards, or a teacher that runs in the loop.

With `train.teacher.mode: refresh` a run writes `<run>/generations/<step>/`: `network/`, the averaged network that the
generation was rolled out by, and `generation.json`. Its shards are in the store like any others.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from pydantic import ValidationError
from torch import Tensor

from rats.pipeline.families.models import FamilyStudent
from rats.pipeline.families.open import Model
from rats.pipeline.files.atomic import atomic_folder, atomic_write, link_or_copy, remove
from rats.pipeline.files.places import open_store
from rats.pipeline.protocols import Reward
from rats.pipeline.store.shard_set import ShardSet
from rats.pipeline.weights.loading import save_component
from rats.pipeline.weights.lora import merge_lora
from rats.schemas.errors import ConfigError, DataError, reason
from rats.schemas.manifest import PlannedSample
from rats.schemas.params import Params
from rats.schemas.run import Generation
from rats.schemas.train_params import TrainParams
from rats.stages.rollout.rollout import read_recipe, rollout_stage
from rats.stages.train.source import Source, open_source
from rats.stages.workers.run import WorkerTarget
from rats.trainer import randomness
from rats.trainer.distributed import Ranks
from rats.trainer.gate import WeightedReward, weighted_sum
from rats.trainer.objective import Settings
from rats.trainer.optim import Learner
from rats.trainer.run import Run
from rats.trainer.teachers import LiveTeacher, WeightAverage

log = logging.getLogger(__name__)

GENERATION_FILE = "generation.json"


def open_moving_teacher(
    model: Model,
    chosen: TrainParams,
    student: FamilyStudent,
    learner: Learner,
    source: Source,
    rewards: Sequence[Reward],
    decode: Callable[[Tensor], Tensor],
) -> WeightAverage | None:
    """What `train.teacher.mode` needs: nothing, the average for the next generation, or a teacher in the loop.

    Raises ConfigError for a teacher in the loop of a student that is sharded.
    """
    if chosen.teacher.mode == "frozen":
        return None
    if chosen.teacher.mode == "refresh":
        return WeightAverage(learner, chosen.teacher.ema)
    if learner.ranks.is_sharded:
        raise ConfigError("train.teacher.mode: live-ema needs a whole second network on each rank: launch without FSDP")
    compute, recipe = model.compute.model_copy(update={"compile": chosen.compile}), source.shards.recipe
    teacher = model.using(compute=compute).open_live_teacher(student)
    return LiveTeacher(teacher, learner, chosen.teacher.ema, (recipe.sigmas, recipe.horizons), decode, rewards)


def training_segments(
    params: Params, model: Model, settings: Settings, source: Source, run: Run, out: Path
) -> Iterator[tuple[Settings, Source]]:
    """The parts of the training: how far to train (`train.steps`) and from which shards. Between two parts a generation
    is made.

    A run that resumes where a generation was due makes it again from its finished shards, since it depends on the
    checkpoint alone. So a kill loses at most the shards that were being written.
    """
    train, every = settings.train, settings.train.teacher.every
    if train.teacher.mode != "refresh":
        yield settings, source
        return
    line = Generations(params, model, settings, source, run.ranks, out)
    line.forget_after(run.state.step)
    followed = line.at(run.state.generation)
    while run.state.step < train.steps and run.state.finished is None:
        if run.state.step > 0 and run.state.step % every == 0:
            followed = line.renewed(run, followed)
        until = min(train.steps, (run.state.step // every + 1) * every)
        yield replace(settings, train=train.model_copy(update={"steps": until})), followed


class Generations:
    """The generations of one run, each named by the step it was made at; 0 is the teacher's own."""

    def __init__(
        self, params: Params, model: Model, settings: Settings, source: Source, ranks: Ranks, out: Path
    ) -> None:
        """`source`: the shards that the run was started with. Every generation has their prompts and noises."""
        self.params, self.model, self.chosen, self.parts = params, model, settings.train, settings.parts
        self.source, self.ranks, self.folder = source, ranks, out / "generations"
        rows = source.shards.index(source.snapshot)
        self.samples = [PlannedSample(**row.model_dump(include=set(PlannedSample.model_fields))) for row in rows]

    def at(self, step: int) -> Source:
        """The shards of a generation. Missing ones are made again."""
        return self._rolled(step) if step else self.source

    def renewed(self, run: Run, followed: Source) -> Source:
        """Rolls out a generation by the present average. Returns the better of the new and the followed one."""
        step = run.state.step
        self._save_network(run, step)
        with _randomness_kept():
            new = self._rolled(step)
        accepted = mean_reward(new, self.parts) >= mean_reward(followed, self.parts)
        if self.ranks.is_main:
            self._write(step, new, accepted)
            self._announce(step, followed, new, accepted)
        self.ranks.wait()
        if not accepted:
            return followed
        run.follow_generation(step)
        return new

    def params_at(self, step: int) -> Params:
        """Parameters of a generation: the averaged network at the teacher's number of steps, without CFG."""
        network = str(self._network(step).absolute())
        names = self.chosen.reward_weights
        compute = {"device": str(self.ranks.device)} if self.ranks.world > 1 else {}
        return self.params.model_copy(
            update={
                "model": self.params.model.model_copy(update={"transformer": network}),
                "teacher": self.params.teacher.model_copy(update={"true_cfg_scale": 1.0}),
                "compute": self.params.compute.model_copy(update=compute),
                "rewards": tuple(reward for reward in self.params.rewards if reward.name in names),
            }
        )

    def _network(self, step: int) -> Path:
        return self.folder / f"{step:06d}" / "network"

    def _save_network(self, run: Run, step: int) -> None:
        """Saves the average as a whole network, with adapters merged into it. All ranks must call this."""
        assert run.moving_teacher is not None
        weights, lora = run.moving_teacher.tensors(), self.chosen.lora
        if self.ranks.is_main:
            network = self.model.rebuilt_network(weights, lora)
            if lora:
                merge_lora(network)
            with atomic_folder(self._network(step)) as temporary:
                save_component(network, temporary)
        self.ranks.wait()

    def _rolled(self, step: int) -> Source:
        """The generation's shards. Several ranks share the work, each on its own device."""
        params = self.params_at(step)
        model = Model.of(params)
        store = open_store(params.store.path)
        if self.ranks.is_main:
            self._link_embeddings(ShardSet.open_or_create(store, read_recipe(params, model)))
        self.ranks.wait()
        where = WorkerTarget(workers=0) if self.ranks.world > 1 else None
        report = rollout_stage(params, "train", where=where, samples=self.samples)
        return open_source(params, model, self.chosen, store / report.fingerprint, report.snapshot_number)

    def _link_embeddings(self, shards: ShardSet) -> None:
        """Links the embeddings: the prompts and encoders are the same, so they need not be made or stored twice."""
        for prompt in {sample.prompt_id for sample in self.samples}:
            there, here = self.source.shards.embedding_path(prompt).local, shards.embedding_path(prompt).local
            if there and here and there.exists() and not here.exists():
                link_or_copy(there, here)

    def _write(self, step: int, source: Source, accepted: bool) -> None:
        record = generation_record(step, source, self.parts, accepted, self._network(step))
        atomic_write(self.folder / f"{step:06d}" / GENERATION_FILE, (record.model_dump_json(indent=1) + "\n").encode())

    def _announce(self, step: int, followed: Source, new: Source, accepted: bool) -> None:
        before, after = mean_reward(followed, self.parts), mean_reward(new, self.parts)
        verdict = "is followed from here on" if accepted else "is refused, training goes on with the one before"
        log.log(
            logging.INFO if accepted else logging.WARNING,
            "step %d: generation %s has mean reward %.4f, the one before %.4f: it %s; the other's shards stay, "
            "%.1f MB in %s",
            *(step, new.shards.fingerprint[:12], after, before, verdict),
            *(bytes_on_disk(followed if accepted else new) / 1e6, (followed if accepted else new).shards.root),
        )

    def forget_after(self, step: int) -> None:
        """Removes generations after `step`, which an earlier run has left."""
        if self.ranks.is_main:
            for folder in self.folder.glob("[0-9]*"):
                if int(folder.name) > step:
                    remove(folder)
        self.ranks.wait()


@contextmanager
def _randomness_kept() -> Iterator[None]:
    """Restores the global generators, so that it does not matter whether the shards were made in this process."""
    states = randomness.capture()
    yield
    randomness.restore(states)


def mean_reward(source: Source, parts: Sequence[WeightedReward]) -> float:
    """Mean of R_T over the samples that have a score; for several rewards, of their weighted sum."""
    scores_RB = torch.tensor(list(source.scores.values()), dtype=torch.float64).reshape(-1, len(parts)).T
    return float(weighted_sum(scores_RB, parts).mean())


def bytes_on_disk(source: Source) -> int:
    """Bytes of the set's shards on disk, without embeddings."""
    return sum((source.shards.root / "shards").sizes().values())


def generation_record(
    step: int, source: Source, parts: Sequence[WeightedReward], accepted: bool, network: Path | None = None
) -> Generation:
    """A generation in numbers."""
    weights = [path.stat().st_size for path in network.rglob("*") if path.is_file()] if network else []
    return Generation(
        step=step,
        fingerprint=source.shards.fingerprint,
        snapshot=source.snapshot.hash,
        snapshot_number=source.snapshot.number,
        samples=source.snapshot.samples,
        mean_reward=mean_reward(source, parts),
        accepted=accepted,
        shard_bytes=bytes_on_disk(source),
        network_bytes=sum(weights),
    )


def list_generations(source: Source, settings: Settings, out: Path) -> tuple[Generation, ...]:
    """All generations of a run that has ended, the teacher's own first.

    Raises DataError when a record is damaged.
    """
    if settings.train.teacher.mode != "refresh":
        return ()
    paths = sorted((out / "generations").glob(f"*/{GENERATION_FILE}"))
    return (generation_record(0, source, settings.parts, accepted=True), *map(_read, paths))


def _read(path: Path) -> Generation:
    try:
        return Generation.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise DataError(f"{path} is no record of a generation ({reason(error)}): train again with --force") from None
