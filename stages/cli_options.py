"""What the commands of `cli*.py` share: flags, and the parameter file as they change it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from rats.schemas.errors import ConfigError

if TYPE_CHECKING:
    from rats.schemas.params import Params, Split

# Plain help: rich would double the time to the first line.
STYLE: dict[str, Any] = {"no_args_is_help": True, "rich_markup_mode": None}
ParamsFile = Annotated[Path, typer.Option("--params", metavar="FILE", help="The parameter file.")]
Sets = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change one value; repeatable.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout; logs go to stderr.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check everything, say what would be done, do nothing.")]
Seed = Annotated[int | None, typer.Option("--seed", metavar="N", help="The stage's seed, in place of the file's.")]

DEFAULT_PARAMS = Path("params.yaml")


def load(path: Path, sets: list[str] | None, **seeds: int | None) -> Params:
    """The parameters; a seed flag such as `teacher__seed` comes last and wins."""
    from rats.schemas.params import load_params

    flags = [f"{name.replace('__', '.')}={value}" for name, value in seeds.items() if value is not None]
    return load_params(path, [*(sets or []), *flags])


def split_named(name: str) -> Split:
    """The split, if there is such a one."""
    if name not in ("train", "validation", "test"):
        raise ConfigError(f"unknown split {name!r}: use train, validation or test")
    return cast("Split", name)


def existing(path: Path) -> Path:
    if not path.is_dir():
        raise ConfigError(f"no folder {path}: run the stage that makes it first")
    return path
