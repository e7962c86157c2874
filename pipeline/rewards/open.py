"""Opens rewards by adapter name. A reward's module is imported on first use.

A reward is identified by the content of its files (`identify`), never by their path or revision.
"""

from __future__ import annotations

from pathlib import Path

from rats.pipeline.protocols import Reward, RewardAdapter
from rats.pipeline.weights.hub import absolute_if_local, resolve_checkpoint
from rats.pipeline.weights.opening import check_file, opening
from rats.schemas.errors import ConfigError
from rats.schemas.params import RewardParams
from rats.schemas.plugins import OFFICIAL, REWARDS, load_plugin, plugins_in

NEEDED = ("checkpoints", "identify", "score")


def open_reward(reward: RewardParams, device: str = "cpu") -> Reward:
    """The reward, loaded on `device`, under the name that `params.yaml` gives it."""
    adapter = _adapter(reward)
    where = _located(reward, adapter)[0]
    with opening(where, f"reward '{reward.name}' ({reward.adapter})"):
        return adapter(where, name=reward.name, device=device, **_token(reward))


def reward_fingerprint(reward: RewardParams) -> str:
    """`open_reward(reward).fingerprint` without loading the model: it reads and hashes the files."""
    adapter = _adapter(reward)
    where = _located(reward, adapter)[0]
    with opening(where, f"reward '{reward.name}' ({reward.adapter})"):
        return adapter.identify(where, **_token(reward))


def examine_reward(reward: RewardParams) -> None:
    """Reads the headers of the reward's files of weights. Raises DataError, naming the file, for one that is cut."""
    adapter = _adapter(reward)
    where = _located(reward, adapter)[0]
    files = getattr(adapter, "files", None)  # adapters of other packages may have none
    for path in files(where) if files else ():
        check_file(path, f"reward '{reward.name}' ({reward.adapter})")


def pin_reward(reward: RewardParams) -> RewardParams:
    """The same with absolute paths or the hub's current commit, so that every worker reads the same files."""
    _, revision = _located(reward, _adapter(reward))
    paths = {"path": absolute_if_local(reward.path)}
    if reward.token_file is not None:
        paths["token_file"] = str(Path(reward.token_file).absolute())
    return reward.model_copy(update=paths | {"revision": revision})


def _token(reward: RewardParams) -> dict[str, str]:
    """The `token_file` argument, only if it is set: other adapters than `url` do not accept it."""
    return {} if reward.token_file is None else {"token_file": reward.token_file}


def _adapter(reward: RewardParams) -> type[RewardAdapter]:
    if reward.backend == "official" and reward.adapter not in plugins_in(OFFICIAL):
        raise ConfigError(
            f"reward '{reward.name}': {reward.adapter!r} has no package of its own, so no official backend "
            f"({', '.join(sorted(plugins_in(OFFICIAL)))} have): leave backend out"
        )
    adapter: type[RewardAdapter] = load_plugin(OFFICIAL if reward.backend == "official" else REWARDS, reward.adapter)
    if missing := [name for name in NEEDED if not hasattr(adapter, name)]:
        raise ConfigError(f"rewards: {reward.adapter!r} lacks {missing[0]!r}, which docs/rewards.md asks of a reward")
    return adapter


def _located(reward: RewardParams, adapter: type[RewardAdapter]) -> tuple[Path | str, str | None]:
    """Where the reward lies on this machine, and its commit on the hub."""
    if not adapter.checkpoints:
        return reward.path, reward.revision
    try:
        return resolve_checkpoint(reward.path, reward.revision, adapter.checkpoints)
    except ConfigError as error:
        raise ConfigError(f"reward '{reward.name}': {error}") from error
