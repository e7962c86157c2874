"""`rats shards`: look into shard sets, check, show, share and clear them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rats.stages.cli.console import say, table
from rats.stages.cli.options import DEFAULT_PARAMS, STYLE, Json, ParamsFile, Sets, load

shards = typer.Typer(help="Look into shard sets; check, share and clear them.", **STYLE)

Set = Annotated[str, typer.Argument(metavar="DIR", help="A shard set or a published folder; may be a URL.")]


@shards.command("ls")
def shards_ls(
    path: Annotated[str, typer.Argument(metavar="DIR", help="A store, a shard set or a published folder.")],
    json_: Json = False,
) -> None:
    """List the shard sets below a folder."""
    from rats.pipeline.files.places import open_place
    from rats.stages.shards.describe import list_sets

    rows = list_sets(open_place(path))
    say({"sets": rows}, True) if json_ else table(rows)


@shards.command("info")
def shards_info(
    path: Set,
    json_: Json = False,
) -> None:
    """Show recipe, snapshot and scores."""
    from rats.pipeline.files.places import open_place
    from rats.stages.shards.describe import describe

    say(describe(open_place(path)), json_)


@shards.command("verify")
def shards_verify(
    path: Set,
    json_: Json = False,
) -> None:
    """Compare every hash.

    Reads every byte of the set and says all that is damaged or missing.
    """
    from rats.pipeline.files.places import open_place
    from rats.stages.shards.verify import verify

    say(verify(open_place(path)), json_)


@shards.command("preview")
def shards_preview(
    path: Set,
    out: Annotated[Path, typer.Option("-o", "--out", metavar="FILE", help="The page.")] = Path("preview.html"),
    count: Annotated[int, typer.Option(min=1, metavar="N", help="Samples shown.")] = 24,
    seed: Annotated[int, typer.Option(metavar="N", help="Decides which samples.")] = 0,
    params: ParamsFile = DEFAULT_PARAMS,
    set_: Sets = None,
    json_: Json = False,
) -> None:
    """Write a page to look at.

    One offline HTML file: decoded samples, what lies at each horizon, scores with their best and worst. The parameter
    file names the model whose VAE decodes.
    """
    values = load(params, set_)
    from rats.pipeline.files.places import open_place
    from rats.stages.shards.preview import preview

    say(preview(open_place(path), out, values, count, seed), json_)


@shards.command("export")
def shards_export(
    path: Set,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder that is written.")],
    license_: Annotated[
        str | None, typer.Option("--license", metavar="ID", help="Terms of the teacher's outputs, by the Hub's name.")
    ] = None,
    license_name: Annotated[str | None, typer.Option(metavar="NAME", help="With --license other.")] = None,
    license_link: Annotated[str | None, typer.Option(metavar="URL", help="With --license other.")] = None,
    teacher: Annotated[str | None, typer.Option(metavar="NAME", help="The teacher, as the card names it.")] = None,
    title: Annotated[str | None, typer.Option(metavar="TEXT", help="The card's title.")] = None,
    json_: Json = False,
) -> None:
    """Write a folder to share.

    The newest snapshot with its scores and a dataset card: it opens in rats, in webdataset and in datasets, and can be
    uploaded to the Hub as it is. Files are hardlinks where the file system allows.
    """
    from rats.pipeline.files.places import open_place
    from rats.stages.shards.card import Terms
    from rats.stages.shards.exchange import export_set

    terms = Terms(license_ or "", license_name, license_link, teacher, title)
    say(export_set(open_place(path), out, terms), json_)


@shards.command("import")
def shards_import(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="What export wrote, or the Hub's client fetched.")],
    store: Annotated[str, typer.Option(metavar="STORE", help="The store that takes it; may be a URL.")] = "store",
    json_: Json = False,
) -> None:
    """Take an exported folder into a store.

    Verifies every byte first. A rollout of that recipe then reuses the samples. Given again, it changes nothing.
    """
    from rats.pipeline.files.places import open_place
    from rats.stages.shards.exchange import import_set

    say(import_set(folder, open_place(store)), json_)


@shards.command("diff")
def shards_diff(
    a: Annotated[str, typer.Argument(metavar="A", help="A shard set or a published folder; may be a URL.")],
    b: Annotated[str, typer.Argument(metavar="B", help="Another.")],
    snapshot_a: Annotated[int | None, typer.Option(metavar="N", help="A's snapshot [default: the newest].")] = None,
    snapshot_b: Annotated[int | None, typer.Option(metavar="N", help="B's snapshot [default: the newest].")] = None,
    json_: Json = False,
) -> None:
    """Say in which fields two sets differ.

    Compares recipes, samples and columns of scores by their documents.
    """
    from rats.pipeline.files.places import open_place
    from rats.stages.shards.diff import compare, in_words

    result = compare(open_place(a), open_place(b), snapshot_a, snapshot_b)
    say(result, True) if json_ else print("\n".join(in_words(result)))


@shards.command("gc")
def shards_gc(
    store: Annotated[str, typer.Argument(metavar="STORE", help="A local store, the folder that holds the sets.")],
    root: Annotated[
        list[Path] | None,
        typer.Option(metavar="DIR", help="Where experiments lie; repeatable [default: the current folder]."),
    ] = None,
    older_than: Annotated[float, typer.Option(min=0, metavar="HOURS", help="Keep what was written later.")] = 24.0,
    delete: Annotated[bool, typer.Option("--delete", help="Delete; without it, only show.")] = False,
    json_: Json = False,
) -> None:
    """Show what no experiment reaches.

    With --delete it is removed: sets, snapshots, shards, scores and embeddings that nothing below the roots names.
    """
    from rats.stages.shards.gc.collect import collect, in_words, refuse_busy

    result = collect(store, root or [Path(".")], delete, older_than)
    say(result, True) if json_ else print("\n".join(in_words(result)))
    refuse_busy(result)
