"""Rewards by adapter name; a reward's module is imported when it is asked for, and not before."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

from rats.pipeline.protocols import Reward
from rats.pipeline.weights import resolve
from rats.schemas.errors import ConfigError
from rats.schemas.params import RewardParams

ADAPTERS = {
    "pickscore": ("rats.pipeline.pickscore", "PickScore"),
    "hpsv2": ("rats.pipeline.hpsv2", "HPSv2"),
    "image-reward": ("rats.pipeline.image_reward", "ImageReward"),
    "url": ("rats.pipeline.url_reward", "UrlReward"),
}
"""Module and class by adapter. A module also offers `identify(path)` and the hub's file PATTERNS, none for a server."""


def open_reward(reward: RewardParams, device: str = "cpu") -> Reward:
    """The reward, loaded on `device`, under the name that `params.yaml` gives it."""
    module, class_name = _adapter(reward)
    return getattr(module, class_name)(_folder(reward, module), name=reward.name, device=device)


def reward_fingerprint(reward: RewardParams) -> str:
    """`open_reward(reward).fingerprint` without loading the model: it reads and hashes the files."""
    module, _ = _adapter(reward)
    return module.identify(_folder(reward, module))


def _adapter(reward: RewardParams) -> tuple[ModuleType, str]:
    if reward.adapter not in ADAPTERS:
        raise ConfigError(f"reward '{reward.name}': no adapter '{reward.adapter}', use one of {', '.join(ADAPTERS)}")
    module, class_name = ADAPTERS[reward.adapter]
    return importlib.import_module(module), class_name


def _folder(reward: RewardParams, module: ModuleType) -> Path | str:
    if not module.PATTERNS:
        return reward.path
    try:
        return resolve(reward.path, reward.revision, module.PATTERNS)
    except ConfigError as error:
        raise ConfigError(f"reward '{reward.name}': {error}") from error
