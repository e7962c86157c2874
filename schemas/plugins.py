"""Model families and rewards by name: entry points of this package and of anybody else's.

Names are read from the packages' metadata. What they name is imported on first use.
"""

from __future__ import annotations

from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from rats.schemas.errors import ConfigError, nearest, reason

FAMILIES, REWARDS, OFFICIAL = "rats.families", "rats.rewards", "rats.rewards.official"
"""Entry-point groups: a name stands for a class (`pipeline.families.base.Family`, `pipeline.protocols.RewardAdapter`).

The last group has the rewards that run in their authors' own packages (`backend: official`), under the same names.
"""


@cache
def plugins_in(group: str) -> dict[str, EntryPoint]:
    """All installed entry points of the group, by name."""
    return {point.name: point for point in entry_points(group=group)}


def check_name(group: str, name: str) -> str:
    """Returns the name. Raises ValueError with the nearest known one if no installed entry point has it."""
    if name not in plugins_in(group):
        kind = group.removeprefix("rats.")
        # entry points that an update of the sources adds are known only after it is installed again
        raise ValueError(
            f"no {name!r} among the installed {kind}{nearest(name, plugins_in(group))}; or install rats again"
        )
    return name


def load_plugin(group: str, name: str) -> Any:
    """Imports what an entry point names. Raises ConfigError if there is none, or if its import fails."""
    try:
        return plugins_in(group)[check_name(group, name)].load()
    except ValueError as error:
        raise ConfigError(str(error)) from None
    except (ImportError, AttributeError) as error:
        kind = group.removeprefix("rats.")
        raise ConfigError(
            f"{kind}: {name!r} cannot be imported ({reason(error)}): update or install what it needs"
        ) from error
