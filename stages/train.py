"""Stage two: open what a run needs, refuse what does not belong together, train, leave a student behind.

Nothing here can run a teacher: of the family it opens the network that learns and the decoder.
"""

from __future__ import annotations

import json
import logging
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import torch
from torch import nn

from rats.pipeline.atomic import atomic_folder, atomic_write, remove
from rats.pipeline.flux import FluxStudent, open_student
from rats.pipeline.places import Place
from rats.pipeline.registry import open_reward
from rats.pipeline.store import ShardSet
from rats.pipeline.weights import hash_path
from rats.schemas.canonical import canonical_json, sha256
from rats.schemas.errors import ConfigError, DataError
from rats.schemas.manifest import Snapshot
from rats.schemas.params import Params, TrainParams, with_variant
from rats.schemas.reports import TrainReport
from rats.schemas.run import RunRecord
from rats.stages.progress import progress
from rats.stages.train_checks import Column, check_recipe, find_column, reward_params
from rats.trainer.checkpoint import Checkpoints, Identity, Saved, State, read
from rats.trainer.gate import spread
from rats.trainer.loop import Run, Settings, train
from rats.trainer.metrics import MetricsFile
from rats.trainer.optim import Learner
from rats.trainer.stored import StoredSamples
from rats.trainer.witness import WatchedStream, WatchedStudent, Witness

log = logging.getLogger(__name__)

NOT_IN_SETTINGS: dict[str, bool | set[str]] = {
    "steps": True,
    "checkpoint_every": True,
    "checkpoints_total_limit": True,
    "gate": {"tau", "value", "value_from"},
}
"""Fields that may differ when a run goes on: they change no step. The gate's enter as what they were resolved to."""


@dataclass(frozen=True)
class Source:
    """What is read: one snapshot of a shard set, and the teacher's scores by the reward that trains."""

    shards: ShardSet
    snapshot: Snapshot
    column: Column
    scores: dict[str, float]


def train_stage(params: Params, variant: str, shards: Place, out: Path, resume: str | None = None) -> TrainReport:
    """Train `variant`'s student from the shards in the folder `shards`; everything it leaves is in `out`.

    `out` holds metrics.csv, checkpoints/, and at the end student/ (a diffusers transformer folder) and run.json.
    `resume`: "latest" goes on from the newest whole checkpoint of the same shards and settings and starts over where
    there is none; a checkpoint's folder goes on from that one; None starts over.

    Raises:
        ConfigError: a variant, reward or gate value that is not there.
        DataError: shards, weights, rewards or checkpoints that are damaged or do not belong together; a number that
            is not finite.
        SystemExit: 143 after SIGTERM, once the step is done and saved.
    """
    chosen = with_variant(params, variant)
    checkpoints = Checkpoints(out / "checkpoints", chosen.checkpoints_total_limit)
    saved = _asked_for(resume, checkpoints, chosen.steps)
    source = open_source(params, chosen, shards, saved)
    settings = read_settings(chosen, source)
    identity = Identity(source.snapshot.hash, source.shards.fingerprint, settings_hash(settings, source.column))
    saved = _belonging(saved, identity, resume)
    student = open_student(params.model, params.teacher, params.compute)
    run = start_run(student, settings, checkpoints, saved, identity, source.snapshot.number, out)
    witness = Witness()
    _train(params, student, settings, source, run, witness)
    record = _record(params, variant, settings, source, run, witness, save_student(run.learner, out / "student"))
    atomic_write(out / "run.json", json.dumps(record.model_dump(mode="json"), indent=1, sort_keys=True).encode())
    return TrainReport(**{name: getattr(record, name) for name in TrainReport.model_fields})


def open_source(params: Params, chosen: TrainParams, folder: Place, saved: Saved | None = None) -> Source:
    """The shards, checked against model and reward; of the snapshot that the checkpoint has read, if it is there."""
    shards = ShardSet.open(folder)
    check_recipe(params, shards)
    number = saved.snapshot if saved and saved.snapshot in shards.snapshots() else None
    snapshot = shards.snapshot(number)
    column = find_column(params, chosen.reward, shards)
    keys = {row.key for row in shards.index(snapshot)}
    return Source(shards, snapshot, column, shards.read_scores(column.address, keys))


def read_settings(chosen: TrainParams, source: Source) -> Settings:
    """The variant's settings with tau and the gate's constant looked up."""
    tau = chosen.gate.tau or spread(list(source.scores.values()))
    return Settings(chosen, source.shards.recipe.horizons, tau, gate_value(chosen))


def gate_value(chosen: TrainParams) -> float | None:
    """The constant gate: `gate.value`, or the mean that the gate had in the run `gate.value_from`."""
    gate = chosen.gate
    if gate.form != "constant" or gate.value is not None:
        return gate.value
    if gate.value_from is None:
        raise ConfigError("gate.form is constant and has no value: set train.gate.value or train.gate.value_from")
    path = Path(gate.value_from) / "run.json"
    try:
        value = json.loads(path.read_text())["gate_mean"]
        return float(value)
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ConfigError(f"gate.value_from: {path} gives no gate_mean ({reason}): train that run first") from None


def settings_hash(settings: Settings, column: Column) -> str:
    """What two runs must share for one to go on where the other stopped."""
    parts = settings.train.model_dump(mode="json", exclude=NOT_IN_SETTINGS)
    parts |= {"tau": settings.tau, "gate_value": settings.gate_value, "horizons": settings.horizons}
    return sha256(canonical_json(parts | {"reward": column.address}))


def _asked_for(resume: str | None, checkpoints: Checkpoints, steps: int) -> Saved | None:
    if resume is None:
        return None
    if resume == "latest":
        return checkpoints.newest(at_most=steps)
    if not Path(resume).is_dir():
        raise ConfigError(f"no checkpoint at {resume}: use --resume latest, or a folder such as RUN/checkpoints/000050")
    saved = read(Path(resume))
    if saved.state.step > steps:
        raise ConfigError(
            f"checkpoint {resume} has {saved.state.step} steps, train.steps is {steps}: raise train.steps"
        )
    return saved


def _belonging(saved: Saved | None, identity: Identity, resume: str | None) -> Saved | None:
    """The checkpoint, unless it is of other shards or settings: an error if it was named, else a new start."""
    if saved is None or saved.identity == identity:
        return saved
    names = ("snapshot", "recipe", "settings")
    other = next(name for name in names if getattr(saved.identity, name) != getattr(identity, name))
    was, now = (getattr(found, other)[:12] for found in (saved.identity, identity))
    reason = f"checkpoint {saved.path} is of another {other} ({was}, now {now})"
    if resume != "latest":
        raise DataError(f"{reason}: start over without --resume, or restore what it was trained with")
    log.warning("%s; starting over", reason)
    return None


def start_run(
    student: FluxStudent,
    settings: Settings,
    checkpoints: Checkpoints,
    saved: Saved | None,
    identity: Identity,
    snapshot: int,
    out: Path,
) -> Run:
    """A run at its first step, or where the checkpoint was; what an earlier run left beyond that is removed."""
    student.network.requires_grad_(True)
    learner, state = Learner(student.network, settings.train), saved.state if saved else State()
    if saved:
        learner.restore(saved.tensors())
        log.info("going on from %s", saved.path)
    metrics = MetricsFile(out / "metrics.csv", max(settings.train.nfe), saved.metrics() if saved else None)
    checkpoints.keep_until(state.step)
    for stale in ("student", "run.json"):
        remove(out / stale)
    return Run(learner, checkpoints, metrics, identity, snapshot, state)


def _train(
    params: Params, student: FluxStudent, settings: Settings, source: Source, run: Run, witness: Witness
) -> None:
    reward = open_reward(reward_params(params, settings.train.reward), params.compute.device)
    stream = StoredSamples(source.shards, source.snapshot, source.scores, settings.train.seed, run.state.position)
    watched, seen = WatchedStudent(student, witness), WatchedStream(stream, witness)
    left = max(0, settings.train.steps - run.state.step)
    with progress("train", left, "steps") as advance, stop_flag() as run.stopping, witness.watching(student.network):
        run.report = lambda row: advance(1)
        train(watched, seen, reward, settings, run)


@contextmanager
def stop_flag() -> Iterator[Callable[[], bool]]:
    """A function that is true once SIGTERM has come; a second SIGTERM ends the process at once, with 143."""
    asked = threading.Event()

    def handler(number: int, frame: FrameType | None) -> None:
        if asked.is_set():
            raise SystemExit(128 + number)
        asked.set()

    if threading.current_thread() is not threading.main_thread():  # only the main thread may set a handler
        yield asked.is_set
        return
    before = signal.signal(signal.SIGTERM, handler)
    try:
        yield asked.is_set
    finally:
        signal.signal(signal.SIGTERM, before)


def save_student(learner: Learner, folder: Path) -> Path:
    """The trained network (its moving average, if one is kept) as a folder that diffusers loads; returns it."""
    with learner.averaged() as network, atomic_folder(folder) as temporary:
        _save_pretrained(network, temporary)
    return folder


def _save_pretrained(network: nn.Module, folder: Path) -> None:
    network.save_pretrained(folder)  # type: ignore[operator]
    config = json.loads((folder / "config.json").read_text())
    config.pop("_name_or_path", None)  # where the base lay on this machine is no part of the student
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _record(
    params: Params, variant: str, settings: Settings, source: Source, run: Run, witness: Witness, student: Path
) -> RunRecord:
    state, snapshot, column = run.state, source.snapshot, source.column
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
        reward=settings.train.reward,
        reward_fingerprint=column.hashes["reward"],
        reward_column=column.address,
        base=source.shards.recipe.weights["transformer"],
        vae=column.hashes["vae"],
        student=hash_path(student),
        settings=run.identity.settings,
        gate_form=settings.train.gate.form,
        gate_mean=state.gate_mean,
        gate_value=settings.gate_value,
        tau=settings.tau,
        student_forwards=witness.student_forwards,
        seconds_per_step=state.seconds / max(1, state.step),
        threads=torch.get_num_threads(),
    )
