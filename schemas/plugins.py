"""Model families and rewards by name: entry points of this package and of anybody else's.

Names are read from the packages' metadata. What they name is imported on first use.
"""

from __future__ import annotations

from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from rats.schemas.errors import ConfigError, nearest, one_line, reason

FAMILIES, REWARDS, OFFICIAL = "rats.families", "rats.rewards", "rats.rewards.official"
"""Entry-point groups: a name stands for a class (`pipeline.families.base.Family`, `pipeline.protocols.RewardAdapter`).

The last group has the rewards that run in their authors' own packages (`backend: official`), under the same names.
"""


@cache
def plugins_in(group: str) -> dict[str, tuple[EntryPoint, ...]]:
    """All installed entry points of the group, by name. A name with several of them cannot be used."""
    found: dict[str, tuple[EntryPoint, ...]] = {}
    for point in entry_points(group=group):
        found[point.name] = (*found.get(point.name, ()), point)
    return found


def origin(point: EntryPoint) -> str:
    """The distribution that an entry point comes from, with its version."""
    return f"{point.dist.name} {point.dist.version}" if point.dist else point.value


def check_name(group: str, name: str) -> str:
    """Returns the name. Raises ValueError if no installed entry point has it, with the nearest one, or several have."""
    kind, points = group.removeprefix("rats."), plugins_in(group).get(name, ())
    if not points:
        # entry points that an update of the sources adds are known only after it is installed again
        raise ValueError(
            f"no {name!r} among the installed {kind}{nearest(name, plugins_in(group))}; or install rats again"
        )
    if len(points) > 1:
        by = " and ".join(sorted(map(origin, points)))
        raise ValueError(f"{kind}: {name!r} is a name in both {by}: uninstall one, or rename its entry point")
    return name


def load_plugin(group: str, name: str) -> Any:
    """Imports what an entry point names. Raises ConfigError if there is none, or if its import fails."""
    try:
        (point,) = plugins_in(group)[check_name(group, name)]
    except ValueError as error:
        raise ConfigError(str(error)) from None
    try:
        return point.load()
    except (Exception, SystemExit) as error:  # the code is somebody else's
        said = reason(error) if isinstance(error, ImportError) else one_line(error)
        kind = group.removeprefix("rats.")
        raise ConfigError(f"{kind}: {name!r} cannot be imported ({said}): update or install what it needs") from error
