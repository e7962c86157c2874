"""What is installed: this package's requirements and extras, by its metadata, and all families and rewards.

Imports nothing that may be missing.
"""

from __future__ import annotations

import platform
from collections.abc import Iterator, Set
from importlib.metadata import PackageNotFoundError, metadata, requires, version
from typing import TYPE_CHECKING, Any

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from rats.schemas.errors import ConfigError
from rats.schemas.plugins import FAMILIES, OFFICIAL, REWARDS, load_plugin, origin, plugins_in

if TYPE_CHECKING:
    from rats.schemas.params import Params

CheckRow = dict[str, Any]
NAME = "rats"
FOR_DEVELOPERS = "dev"
APART = {"rewards": ", in an environment of its own (docs/rewards.md)"}
"""Extras that cannot be installed together with the others."""
GROUP_NAMES = {FAMILIES: "family", REWARDS: "reward adapter", OFFICIAL: "official backend"}


def check_row(check: str, ok: bool, found: str, needed: bool = True) -> CheckRow:
    """One row: what was checked, whether it is fine, whether it is needed, and what was found or how to get it."""
    return {"check": check, "ok": ok, "needed": needed, "found": found}


def packages() -> list[CheckRow]:
    """Python and the core's packages, each against its lower bound."""
    asked, there = SpecifierSet(",".join(metadata(NAME).get_all("Requires-Python") or [])), platform.python_version()
    python = check_row("python", asked.contains(there, prereleases=True), f"{there} ({asked})" if asked else there)
    return [python, check_row(NAME, True, version(NAME)), *(_package(one) for one in _requirements())]


def extras(needed: Set[str] = frozenset()) -> list[CheckRow]:
    """The optional extras. Those in `needed` must be installed."""
    names = metadata(NAME).get_all("Provides-Extra") or []
    return [_extra(name, name in needed) for name in names if name != FOR_DEVELOPERS]


def plugins(params: Params | None) -> list[CheckRow]:
    """Families, rewards and official backends: the package that each comes from, and whether it can be imported."""
    return [
        _plugin(group, name, _is_asked_for(params, group, name))
        for group in GROUP_NAMES
        for name in sorted(plugins_in(group))
    ]


def _requirements(extra: str = "", package: str = NAME) -> Iterator[Requirement]:
    """Requirements of a package or of one of its extras, with those that an extra such as `dask[distributed]` adds."""
    for one in map(Requirement, requires(package) or []):
        own = "extra ==" in str(one.marker)
        if own == bool(extra) and (one.marker is None or one.marker.evaluate({"extra": extra})):
            yield one
            for part in one.extras if _problem(one) is None else ():
                yield from _requirements(part, one.name)


def _package(one: Requirement) -> CheckRow:
    problem = _problem(one)
    return check_row(one.name, problem is None, problem or f"{version(one.name)} ({one.specifier})")


def _problem(one: Requirement) -> str | None:
    """What is wrong with an installed package and what to do; None if it is fine."""
    asked = f"{one.name}{one.specifier}"
    try:
        there = version(one.name)
    except PackageNotFoundError:
        return f"not installed: pip install '{asked}'"
    if not one.specifier.contains(there, prereleases=True):
        return f"{there}, and {one.specifier} is asked for: pip install '{asked}'"
    return None


def _extra(name: str, needed: bool) -> CheckRow:
    wanted = list(_requirements(name))
    there = ", ".join(f"{one.name} {version(one.name)}" for one in wanted if _problem(one) is None)
    if missing := [one.name for one in wanted if _problem(one)]:
        way_out = f"pip install '{NAME}[{name}]'{APART.get(name, '')}"
        return check_row(f"extra {name}", False, f"without {', '.join(missing)}: {way_out}", needed)
    return check_row(f"extra {name}", True, there or "nothing to install on this system", needed)


def _is_asked_for(params: Params | None, group: str, name: str) -> bool:
    if params is None:
        return False
    if group == FAMILIES:
        return params.model.family == name
    backend = "official" if group == OFFICIAL else "transformers"
    return any((reward.adapter, reward.backend) == (name, backend) for reward in params.rewards)


def _plugin(group: str, name: str, needed: bool) -> CheckRow:
    check = f"{GROUP_NAMES[group]} {name}"
    by = ", ".join(map(origin, plugins_in(group)[name]))
    try:
        load_plugin(group, name)
    except ConfigError as error:
        return check_row(check, False, f"{by}: {error}", needed)
    return check_row(check, True, by, needed)
