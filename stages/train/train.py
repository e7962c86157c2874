"""Stage train: opens what a run needs, refuses data that do not belong together, trains, and saves the student.

It opens the network and the decoder of a family. It opens a teacher only for `teacher.mode: live-ema` and for the
generations of `refresh` (`generations` beside this file).
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable
from contextlib import closing, nullcontext
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import diffusers
import torch
from diffusers.training_utils import cast_training_params

from rats.pipeline.families.models import FamilyStudent
from rats.pipeline.families.open import Model
from rats.pipeline.files.atomic import atomic_write, remove
from rats.pipeline.files.places import Place
from rats.pipeline.machine import on_its_threads
from rats.pipeline.protocols import Reward
from rats.pipeline.rewards.open import open_reward
from rats.pipeline.weights.hashes import hash_path
from rats.schemas.params import Params, with_variant
from rats.schemas.reports import TrainReport
from rats.schemas.run import RunRecord, SettingChange
from rats.schemas.train_params import TrainParams, check_dtype
from rats.stages.progress import Advance, progress
from rats.stages.rollout.columns import reward_params
from rats.stages.train.callbacks import check_callbacks, training_callbacks
from rats.stages.train.generations import list_generations, open_moving_teacher, training_segments
from rats.stages.train.owner import owned
from rats.stages.train.record import clipped_share, read_record
from rats.stages.train.resume import OWN, Begin, Request, decide, is_of, requested_checkpoint, stop_flag
from rats.stages.train.source import Source, identify, older_hash, open_source, read_settings
from rats.stages.train.teacher_calls import CountedStream, CountedStudent, TeacherCallCounter
from rats.trainer.checkpoint import Checkpoints, RunIdentity, SavedCheckpoint
from rats.trainer.data import StoredSamples, collate
from rats.trainer.distributed import Accelerated, Ranks
from rats.trainer.loop import train
from rats.trainer.methods import METHODS
from rats.trainer.methods.rats import gap_spread
from rats.trainer.metrics import MetricsRow, note_of
from rats.trainer.objective import Objective, Settings
from rats.trainer.optim import Learner
from rats.trainer.randomness import seed_all
from rats.trainer.replaced import set_aside
from rats.trainer.run import MovingTeacher, Run, checkpoints_in, open_run
from rats.trainer.saving import SavedAs, save_student

log = logging.getLogger(__name__)


@on_its_threads
def train_stage(
    params: Params, variant: str, shards: Place, out: Path, resume: str | None = None, force: bool = False
) -> TrainReport:
    """Train `variant`'s student from the shards in the folder `shards`; everything it leaves is in `out`.

    `out` holds metrics.csv, checkpoints/, and at the end student/ (a diffusers transformer folder, or adapters) and
    run.json. Under torchrun or accelerate all ranks call it, and the first one writes.
    `resume`: "latest" goes on from the newest whole checkpoint of the same shards and settings, and starts where there
    is none; a checkpoint's folder goes on from that one; None starts.
    `force`: start over where a run is; with `resume`, go on with other settings, or from a checkpoint before later
    ones. What has to make room moves to `out`/replaced.

    Raises:
        ConfigError: a variant, reward or gate value that is not there; a run in `out` that would have to make room.
        DataError: shards, weights, rewards or checkpoints that are damaged or do not belong together; a number that
            is not finite.
        RetryLaterError: another process trains in `out`.
        SystemExit: 143 after SIGTERM, or when the process that started this one has gone; the step under way is
            abandoned, the one before it saved.
    """
    chosen = with_variant(params, variant)
    check_callbacks(params, chosen)
    ranks = Accelerated(params.compute.device, autocast_dtype(params, chosen), chosen.fsdp)
    with owned(out, force, ranks.is_main) as check_owner:
        return _train_owned(params, variant, chosen, ranks, shards, Request(out, resume, force), check_owner)


def _train_owned(
    params: Params,
    variant: str,
    chosen: TrainParams,
    ranks: Ranks,
    shards: Place,
    request: Request,
    check_owner: Callable[[], None],
) -> TrainReport:
    seed_all(chosen.seed + ranks.rank)
    model, out = Model.of(params), request.out
    source, settings, identity, begin = _begin(params, model, chosen, shards, request)
    saved = begin.saved
    student, rewards = open_trainable(model, chosen, ranks), open_rewards(params, chosen, ranks)
    objective, witness = Objective(student, rewards, settings, ranks, METHODS["rats"]), TeacherCallCounter()
    watched = CountedStudent(student, witness)

    def follower(learner: Learner) -> MovingTeacher | None:
        return open_moving_teacher(model, chosen, student, learner, source, rewards, watched.decode_teachers)

    _make_room(out, saved, checkpoints_in(out, chosen), ranks)
    run = open_run(objective, out, identity, source.snapshot.number, saved, follower=follower)
    run.owned_by(check_owner)
    run.counted_by(witness.taken)
    run.keep_changes(begin.changes)
    objective = _with_tau(objective, source, run)
    settings = objective.settings
    by_name = dict(zip(chosen.reward_weights, rewards, strict=True))
    with training_callbacks(params, model, chosen, student, by_name, run, saved, out):
        for part, followed in training_segments(params, model, settings, source, run, out):
            _train(replace(objective, student=watched, settings=part), followed, run, witness)
    _leave(model, variant, settings, source, run, out)
    return TrainReport(**{name: getattr(read_record(out), name) for name in TrainReport.model_fields})


def _begin(
    params: Params, model: Model, chosen: TrainParams, shards: Place, request: Request
) -> tuple[Source, Settings, RunIdentity, Begin]:
    """What is read, and where the run begins."""

    def opened(snapshot: int | None) -> tuple[Source, Settings, RunIdentity]:
        source = open_source(params, model, chosen, shards, snapshot)
        settings = read_settings(chosen, source)
        return source, settings, identify(settings, source)

    saved = requested_checkpoint(request, checkpoints_in(request.out, chosen), chosen.steps)
    source, settings, identity = opened(saved.snapshot if saved else None)
    begin = decide(saved, identity, older_hash(settings, source.columns), request)
    if saved is not None and begin.saved is None:  # not the old run's snapshot, but the newest
        source, settings, identity = opened(None)
    return source, settings, identity, begin


def _make_room(out: Path, saved: SavedCheckpoint | None, checkpoints: Checkpoints, ranks: Ranks) -> None:
    """Set aside what an earlier run has left, unless this one goes on from it."""
    ranks.wait()  # nobody reads any more what is moved now
    if ranks.is_main and (saved is None or not is_of(saved, checkpoints)):
        set_aside(out, [out / name for name in OWN])
    ranks.wait()


def autocast_dtype(params: Params, chosen: TrainParams) -> torch.dtype | None:
    """The dtype in which the network is evaluated, if not in float32. Trained weights are always float32."""
    check_dtype(params.model.dtype)
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


def _leave(model: Model, variant: str, settings: Settings, source: Source, run: Run, out: Path) -> None:
    """The student and the record. Those of an earlier run are true until then."""
    ranks = run.ranks
    if ranks.is_main:
        run.check_owner()
        remove(out / "run.json")
    saved_as = save_student(run.learner, out / "student", model, settings.train)
    if ranks.is_main:
        record = _record(model, variant, settings, source, run, saved_as, out)
        atomic_write(out / "run.json", json.dumps(record.model_dump(mode="json"), indent=1, sort_keys=True).encode())
    ranks.wait()


def _train(objective: Objective, source: Source, run: Run, witness: TeacherCallCounter) -> None:
    """Trains on one set of shards, up to `train.steps`."""
    chosen, ranks = objective.settings.train, run.ranks
    left = max(0, chosen.steps - run.state.step)
    with (
        closing(_stream(source, chosen, ranks, run.state.position)) as stream,
        progress("train", left, "steps") if ranks.is_main else nullcontext(lambda done, note="": None) as advance,
        stop_flag() as stopping,
        witness.watching(objective.student.network),
        run.with_callbacks(partial(_count, advance)),
    ):
        run.stop_when(stopping)
        train(objective, CountedStream(stream, witness), run)


def _count(advance: Advance, run: Run, row: MetricsRow) -> None:
    advance(1, note_of(row))


def _stream(source: Source, chosen: TrainParams, ranks: Ranks, position: int) -> StoredSamples:
    return StoredSamples(
        source.shards,
        source.snapshot,
        source.followed,
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
    if not math.isnan(settings.tau):
        return objective
    if tau is None:
        with closing(_stream(source, settings.train, run.ranks, 0)) as stream:
            batch = collate(stream.take(), run.ranks.device)
        tau = gap_spread(objective, batch)
        run.keep_tau(tau)
    return replace(objective, settings=replace(settings, tau=tau))


def _record(
    model: Model,
    variant: str,
    settings: Settings,
    source: Source,
    run: Run,
    saved_as: SavedAs,
    out: Path,
) -> RunRecord:
    state, snapshot = run.state, source.snapshot
    scored = source.columns.values()
    return RunRecord(
        snapshot=snapshot.hash,
        steps=state.step,
        teacher_forwards=state.teacher_forwards,
        teacher_reward_calls=state.teacher_reward_calls,
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
        update_length=settings.train.update_length,
        clipped=clipped_share(run.gradient_norms(), settings.train.clip_norm),
        gate_form=settings.train.gate.form,
        gate_mean=state.gate_mean,
        gate_value=settings.gate_value,
        tau=settings.tau,
        student_forwards=state.student_forwards,
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
        settings_values=dict(run.identity.values or {}),
        changes=tuple(SettingChange(**asdict(change)) for change in state.changes),
    )
