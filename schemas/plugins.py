"""Model families and rewards by name: entry points of this package and of anybody else's.

Names are read from the packages' metadata; what they name is imported when it is asked for, and not before.
"""

from __future__ import annotations

from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from rats.schemas.errors import ConfigError, nearest, reason

FAMILIES, REWARDS, OFFICIAL = "rats.families", "rats.rewards", "rats.rewards.official"
"""Entry-point groups: a name stands for a class (`pipeline.families.base.Family`, `pipeline.protocols.RewardAdapter`).

The last one has, under the same names, the rewards that run in a package of their own (`backend: official`).
"""


@cache
def found(group: str) -> dict[str, EntryPoint]:
    """All that is installed, by name."""
    return {point.name: point for point in entry_points(group=group)}


def check_name(group: str, name: str) -> str:
    """The name itself. Raises ValueError, with the nearest known one, when nothing installed has it."""
    if name not in found(group):
        kind = group.removeprefix("rats.")
        # what is new in an update of the sources is known after its installation only
        raise ValueError(f"no {name!r} among the installed {kind}{nearest(name, found(group))}; or install rats again")
    return name


def load_plugin(group: str, name: str) -> Any:
    """What an entry point names. Raises ConfigError when there is none, or when its import fails."""
    try:
        return found(group)[check_name(group, name)].load()
    except ValueError as error:
        raise ConfigError(str(error)) from None
    except (ImportError, AttributeError) as error:
        kind = group.removeprefix("rats.")
        raise ConfigError(
            f"{kind}: {name!r} cannot be imported ({reason(error)}): update or install what it needs"
        ) from error
