"""`rats shards`: look into shard sets, check, show, share and clear them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rats.stages.cli_options import STYLE, Json
from rats.stages.console import say, table

shards = typer.Typer(help="Look into a shard set.", **STYLE)


@shards.command("ls")
def shards_ls(
    path: Annotated[Path, typer.Argument(metavar="DIR", help="A store, a shard set or a published folder.")],
    json_: Json = False,
) -> None:
    """List the shard sets below a folder."""
    from rats.stages.shards import list_sets

    rows = list_sets(path)
    say({"sets": rows}, True) if json_ else table(rows)


@shards.command("info")
def shards_info(
    path: Annotated[Path, typer.Argument(metavar="DIR", help="A shard set or a published folder.")],
    json_: Json = False,
) -> None:
    """Show recipe, snapshot and scores."""
    from rats.stages.shards import describe

    say(describe(path), json_)


@shards.command("verify")
def shards_verify(
    path: Annotated[Path, typer.Argument(metavar="DIR", help="A shard set or a published folder.")],
    json_: Json = False,
) -> None:
    """Compare every hash.

    Reads every byte of the newest snapshot.
    """
    from rats.stages.shards import verify

    say(verify(path), json_)
