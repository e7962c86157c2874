"""Stage train: opens what a run needs, refuses data that do not belong together, trains, and saves the student.

It opens the network and the decoder of a family. It opens a teacher only for `teacher.mode: live-ema` and for the
generations of `refresh` (`generations` beside this file).
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from contextlib import closing, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import diffusers
import torch
from diffusers.training_utils import cast_training_params
from torch import Tensor

from rats.pipeline.families.models import FamilyStudent
from rats.pipeline.families.open import Model
from rats.pipeline.files.atomic import atomic_folder, atomic_write, remove
from rats.pipeline.files.places import Place
from rats.pipeline.protocols import Reward
from rats.pipeline.rewards.open import open_reward
from rats.pipeline.weights.hashes import hash_path
from rats.pipeline.weights.loading import save_component
from rats.pipeline.weights.lora import save_lora
from rats.pipeline.weights.movement import share_kept
from rats.schemas.errors import ConfigError
from rats.schemas.params import Params, with_variant
from rats.schemas.reports import TrainReport
from rats.schemas.run import RunRecord
from rats.schemas.train_params import TrainParams
from rats.stages.progress import progress
from rats.stages.rollout.columns import reward_params
from rats.stages.train.callbacks import check_callbacks, training_callbacks
from rats.stages.train.generations import list_generations, open_moving_teacher, training_segments
from rats.stages.train.resume import matching_checkpoint, requested_checkpoint, stop_flag
from rats.stages.train.source import Source, open_source, read_settings, settings_hash
from rats.stages.train.teacher_calls import CountedStream, CountedStudent, TeacherCallCounter
from rats.trainer.checkpoint import RunIdentity
from rats.trainer.data import StoredSamples, collate
from rats.trainer.distributed import Accelerated, Ranks
from rats.trainer.loop import train
from rats.trainer.methods import METHODS
from rats.trainer.methods.rats import gap_spread
from rats.trainer.metrics import MetricsRow
from rats.trainer.objective import Objective, Settings
from rats.trainer.optim import Learner
from rats.trainer.randomness import seed_all
from rats.trainer.run import MovingTeacher, Run, checkpoints_in, open_run

log = logging.getLogger(__name__)


def train_stage(params: Params, variant: str, shards: Place, out: Path, resume: str | None = None) -> TrainReport:
    """Trains the student of `variant` from the shards in the folder `shards`, and writes everything into `out`.

    `out` holds metrics.csv, checkpoints/, and at the end student/ (a diffusers transformer folder, or adapters) and
    run.json. Under torchrun or accelerate all ranks call it, and the first one writes.
    `resume`: "latest" resumes from the newest whole checkpoint of the same shards and settings, or starts over if there
    is none. The folder of a checkpoint resumes from that one. None starts over.

    Raises:
        ConfigError: a variant, reward or gate value that is not there.
        DataError: shards, weights, rewards or checkpoints that are damaged or do not belong together; a number that
            is not finite.
        SystemExit: 143 after SIGTERM. The current step is abandoned; the one before it is saved.
    """
    chosen = with_variant(params, variant)
    check_callbacks(params, chosen)
    ranks = Accelerated(params.compute.device, autocast_dtype(params, chosen), chosen.fsdp)
    seed_all(chosen.seed + ranks.rank)
    saved = requested_checkpoint(resume, checkpoints_in(out, chosen), chosen.steps)
    model = Model.of(params)
    source = open_source(params, model, chosen, shards, saved.snapshot if saved else None)
    settings = read_settings(chosen, source)
    identity = RunIdentity(source.snapshot.hash, source.shards.fingerprint, settings_hash(settings, source.columns))
    saved = matching_checkpoint(saved, identity, resume)
    student, rewards = open_trainable(model, chosen, ranks), open_rewards(params, chosen, ranks)
    objective, witness = Objective(student, rewards, settings, ranks, METHODS["rats"]), TeacherCallCounter()
    watched = CountedStudent(student, witness)

    def follower(learner: Learner) -> MovingTeacher | None:
        return open_moving_teacher(model, chosen, student, learner, source, rewards, watched.decode_teachers)

    run = open_run(objective, out, identity, source.snapshot.number, saved, follower=follower)
    _remove_results(out, ranks)
    objective = _with_tau(objective, source, run)
    settings = objective.settings
    by_name = dict(zip(chosen.reward_weights, rewards, strict=True))
    with training_callbacks(params, model, chosen, student, by_name, run, saved, out):
        for part, followed in training_segments(params, model, settings, source, run, out):
            _train(replace(objective, student=watched, settings=part), followed, run, witness)
    saved_as = save_student(run.learner, out / "student", model, chosen)
    record = _record(model, variant, settings, source, run, witness, saved_as, out)
    if ranks.is_main:
        atomic_write(out / "run.json", json.dumps(record.model_dump(mode="json"), indent=1, sort_keys=True).encode())
    ranks.wait()
    return TrainReport(**{name: getattr(record, name) for name in TrainReport.model_fields})


def autocast_dtype(params: Params, chosen: TrainParams) -> torch.dtype | None:
    """The dtype in which the network is evaluated, if not in float32. Trained weights are always float32."""
    if params.model.dtype == "float16":
        raise ConfigError("model.dtype is float16, in which gradients underflow: train with bfloat16 or float32")
    half = params.model.dtype == "bfloat16" or chosen.mixed_precision == "bf16"
    return torch.bfloat16 if half else None


def open_trainable(model: Model, chosen: TrainParams, ranks: Ranks) -> FamilyStudent:
    """The student with its trained weights in float32: bfloat16 would round small updates away."""
    compute = model.compute.model_copy(update={"compile": chosen.compile, "device": str(ranks.device)})
    student = model.using(compute=compute).open_student(lora=chosen.lora, seed=chosen.seed)
    cast_training_params(student.network, torch.float32)
    if chosen.gradient_checkpointing:
        student.checkpoint_activations()
    return student


def open_rewards(params: Params, chosen: TrainParams, ranks: Ranks) -> list[Reward]:
    """The rewards that train, in the order of `reward_weights`."""
    return [open_reward(reward_params(params, name), str(ranks.device)) for name in chosen.reward_weights]


def _remove_results(out: Path, ranks: Ranks) -> None:
    """Removes what an earlier run wrote at its end, which is no longer valid."""
    if ranks.is_main:
        for stale in ("student", "run.json"):
            remove(out / stale)


def _train(objective: Objective, source: Source, run: Run, witness: TeacherCallCounter) -> None:
    """Trains on one set of shards, up to `train.steps`."""
    chosen, ranks = objective.settings.train, run.ranks
    left = max(0, chosen.steps - run.state.step)
    with (
        closing(_stream(source, chosen, ranks, run.state.position)) as stream,
        progress("train", left, "steps") if ranks.is_main else nullcontext(lambda done: None) as advance,
        stop_flag() as stopping,
        witness.watching(objective.student.network),
        run.with_callbacks(partial(_count, advance)),
    ):
        run.stop_when(stopping)
        train(objective, CountedStream(stream, witness), run)


def _count(advance: Callable[[int], None], run: Run, row: MetricsRow) -> None:
    advance(1)


def _stream(source: Source, chosen: TrainParams, ranks: Ranks, position: int) -> StoredSamples:
    return StoredSamples(
        source.shards,
        source.snapshot,
        source.scores,
        chosen.seed,
        chosen.batch,
        position,
        ranks.rank,
        ranks.world,
        chosen.loader_workers,
    )


def _with_tau(objective: Objective, source: Source, run: Run) -> Objective:
    """For `gate.tau: gap`, measures tau on the untrained student. A resumed run keeps the measured value."""
    settings, tau = objective.settings, run.state.tau
    if settings.train.gate.tau != "gap":
        return objective
    if tau is None:
        with closing(_stream(source, settings.train, run.ranks, 0)) as stream:
            batch = collate(stream.take(), run.ranks.device)
        tau = gap_spread(objective, batch)
        run.keep_tau(tau)
    return replace(objective, settings=replace(settings, tau=tau))


@dataclass(frozen=True)
class SavedAs:
    """The student's folder, its dtype, and the share of what training moved that this dtype keeps."""

    folder: Path
    dtype: str
    kept: float = 1.0


def save_student(learner: Learner, folder: Path, model: Model, chosen: TrainParams) -> SavedAs:
    """The trained network, or its adapters, as a folder that diffusers loads.

    The weights are those of the moving average, if one is kept. All ranks must call, the main one writes.
    """
    weights = learner.weights()
    saved_as = SavedAs(folder, model.params.dtype if chosen.save_dtype == "model" and not chosen.lora else "float32")
    if learner.ranks.is_main:
        with atomic_folder(folder) as temporary:
            if chosen.lora:
                save_lora(model.rebuilt_network(weights, chosen.lora), temporary)
            else:
                saved_as = replace(saved_as, kept=_save_network(model, weights, saved_as.dtype, temporary))
        if saved_as.kept < 0.5:
            log.warning(
                "saved in %s, the student keeps %.2g of what training moved: set train.save_dtype: float32",
                *(saved_as.dtype, saved_as.kept),
            )
    learner.ranks.wait()
    return saved_as


def _save_network(model: Model, weights: dict[str, Tensor], dtype: str, folder: Path) -> float:
    """The share of what training moved that the files keep."""
    network = model.base_network(dtype)
    kept = share_kept(network.state_dict(), weights.items())
    network.load_state_dict(weights)
    save_component(network, folder)
    return kept


def _record(
    model: Model,
    variant: str,
    settings: Settings,
    source: Source,
    run: Run,
    witness: TeacherCallCounter,
    saved_as: SavedAs,
    out: Path,
) -> RunRecord:
    state, snapshot = run.state, source.snapshot
    scored = source.columns.values()
    return RunRecord(
        snapshot=snapshot.hash,
        steps=state.step,
        teacher_forwards=witness.teacher_forwards,
        teacher_reward_calls=witness.teacher_reward_calls,
        seconds=state.seconds,
        checkpoint=str(run.checkpoints.path(state.step)),
        variant=variant,
        nfe=settings.train.grid,
        recipe=source.shards.fingerprint,
        snapshot_number=snapshot.number,
        samples=snapshot.samples,
        samples_unscored=snapshot.samples - len(source.scores),
        reward=settings.train.reward_names,
        reward_fingerprint=" + ".join(column.hashes["reward"] for column in scored),
        reward_column=" + ".join(column.address for column in scored),
        base=source.shards.recipe.weights["transformer"],
        vae=next(iter(scored)).hashes["vae"],
        student=hash_path(saved_as.folder),
        settings=run.identity.settings,
        call=model.call(),
        sigmas=model.sigmas(settings.train.grid),
        diffusers=diffusers.__version__,
        saved_dtype=saved_as.dtype,
        movement_kept=saved_as.kept,
        gate_form=settings.train.gate.form,
        gate_mean=state.gate_mean,
        gate_value=settings.gate_value,
        tau=settings.tau,
        student_forwards=witness.student_forwards,
        seconds_per_step=state.seconds / max(1, state.step),
        threads=torch.get_num_threads(),
        ranks=run.ranks.world,
        micro_batch=state.micro_batch or settings.train.micro_batch,
        rewards_asked=state.asked,
        rewards_bad=state.bad,
        finished=state.finished,
        student_step=state.step if run.student_step is None else run.student_step,
        teacher_mode=settings.train.teacher.mode,
        generations=list_generations(source, settings, out),
    )
