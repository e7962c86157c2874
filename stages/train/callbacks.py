"""The callbacks of a training run: the guard with its sample sheets, and the experiment trackers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path

from rats.pipeline.families.models import FamilyStudent
from rats.pipeline.families.open import Model
from rats.pipeline.protocols import Reward
from rats.schemas.params import Params
from rats.schemas.train_params import TrainParams
from rats.stages.train.guard.open import check_guard, open_panel
from rats.stages.train.trackers import check_trackers, open_trackers
from rats.trainer import randomness
from rats.trainer.checkpoint import SavedCheckpoint
from rats.trainer.metrics import MetricsRow
from rats.trainer.run import Callback, Run


def check_callbacks(params: Params, chosen: TrainParams) -> None:
    """Raise ConfigError for settings of the guard or the trackers that cannot work, before anything is loaded."""
    check_guard(params, chosen)
    check_trackers(chosen)


@contextmanager
def training_callbacks(
    params: Params,
    model: Model,
    chosen: TrainParams,
    student: FamilyStudent,
    rewards: Mapping[str, Reward],
    run: Run,
    saved: SavedCheckpoint | None,
    out: Path,
) -> Iterator[None]:
    """Adds guard and trackers to a run. Train inside this block; after it, the learner has the weights to save.

    The guard comes before the trackers, which log its results.
    """
    config = params.model_dump(mode="json") | {"train": chosen.model_dump(mode="json")}
    with rng_kept():
        panel = open_panel(params, model, chosen, student, out, saved, rewards, run.ranks)
        trackers = open_trackers(chosen, out, config, run.state.step, run.ranks.is_main)
    with closing(trackers) if trackers else nullcontext():
        if panel is not None:
            with rng_kept():
                panel.start(run)
        with run.with_callbacks(*(keeping_rng(observer) for observer in (panel, trackers) if observer is not None)):
            yield
        if panel is not None:
            panel.leave_best(run)


def keeping_rng(observer: Callback) -> Callback:
    """Wraps the observer so that it does not change the global random generators."""

    def call(run: Run, row: MetricsRow) -> None:
        with rng_kept():
            observer(run, row)

    return call


@contextmanager
def rng_kept() -> Iterator[None]:
    """Restores the global random generators after the block. In it, models are initialised and rewards may draw."""
    before = randomness.capture()
    try:
        yield
    finally:
        randomness.restore(before)
