"""Opens the guard, and refuses settings with which it could not work."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from rats.pipeline.families.models import FamilyStudent
from rats.pipeline.families.open import Model
from rats.pipeline.protocols import Reward
from rats.pipeline.rewards.open import open_reward
from rats.schemas.errors import ConfigError
from rats.schemas.params import Params
from rats.schemas.train_params import TrainParams
from rats.stages.train.guard.look import DIVERSITY, KID, Validator, open_judge
from rats.stages.train.guard.panel import PANEL_FILE, PANEL_SAMPLES_FILE, Panel
from rats.stages.train.guard.rules import Roles
from rats.stages.train.guard.validation import open_validation_set
from rats.trainer.checkpoint import SavedCheckpoint
from rats.trainer.distributed import Ranks


def open_panel(
    params: Params,
    model: Model,
    chosen: TrainParams,
    student: FamilyStudent,
    out: Path,
    saved: SavedCheckpoint | None,
    rewards: Mapping[str, Reward],
    ranks: Ranks | None = None,
) -> Panel | None:
    """The guard and the sample sheets of a run, or None when `guard.every` and `samples_every` are both null.

    `rewards`: those that train, by name. The others of `params.rewards` are loaded here, on the ranks that validate.

    Raises:
        ConfigError: settings that contradict each other, no validation prompts, nothing to hold the reward against.
    """
    check_guard(params, chosen)
    if chosen.guard.every is None and chosen.samples_every is None:
        return None
    roles = roles_of(params, chosen)
    ranks = ranks or Ranks()
    looks = ranks.is_main or ranks.is_sharded
    eye = _open_validator(params, model, chosen, student, out, saved is not None, rewards, roles) if looks else None
    kept = {name: saved.log(name) if saved else None for name in (PANEL_FILE, PANEL_SAMPLES_FILE)}
    return Panel(chosen, roles, out, eye, kept)


def check_guard(params: Params, chosen: TrainParams) -> None:
    """Raises ConfigError for settings that cannot work, before anything is loaded."""
    guard = chosen.guard
    if guard.every is None:
        if guard.stop or guard.keep == "best":
            raise ConfigError("train.guard has stop or keep: best and never looks: set train.guard.every")
        return
    if not roles_of(params, chosen).panel:
        raise ConfigError(
            "train.guard has nothing to hold the trained reward against: list another reward under rewards:, or set "
            "evaluate.judges"
        )
    if guard.keep == "best" and guard.every % chosen.checkpoint_every:
        raise ConfigError(
            f"train.guard looks every {guard.every} steps, checkpoints come every {chosen.checkpoint_every}: with "
            f"keep: best each look needs one, set train.checkpoint_every to {guard.every} or a divisor of it"
        )


def roles_of(params: Params, chosen: TrainParams) -> Roles:
    """Which metrics are trained, and which form the panel: all other rewards and the judge."""
    held_out = tuple(reward.name for reward in params.rewards if reward.name not in chosen.reward_weights)
    judged = tuple(KID if judge.real_features else DIVERSITY for judge in params.evaluate.judges[:1])
    return Roles(chosen.reward_weights, held_out + judged)


def _open_validator(
    params: Params,
    model: Model,
    chosen: TrainParams,
    student: FamilyStudent,
    out: Path,
    again: bool,
    rewards: Mapping[str, Reward],
    roles: Roles,
) -> Validator:
    validation = open_validation_set(params, model, chosen.guard, student.latent_shape(), out, again)
    size = params.compute.micro_batch
    if chosen.guard.every is None:
        return Validator(student, validation, {}, None, None, size)
    device = str(next(student.network.parameters()).device)
    held_out = {r.name: open_reward(r, device) for r in params.rewards if r.name in roles.panel}
    judge, real = open_judge(params, validation.concepts, device)
    return Validator(student, validation, {**rewards, **held_out}, judge, real, size)
