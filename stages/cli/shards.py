"""`rats shards`: list, check, compare, show, share and clean up shard sets."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rats.schemas.identity import LARGEST_SEED
from rats.stages.cli.console import print_result, print_rows
from rats.stages.cli.options import DEFAULT_PARAMS, HELP_STYLE, Json, ParamsFile, Sets, load

shards = typer.Typer(help="List, check, compare, share and clean up shard sets.", **HELP_STYLE)

SetPath = Annotated[str, typer.Argument(metavar="DIR", help="A shard set or a published folder; may be a URL.")]


@shards.command("ls")
def shards_ls(
    path: Annotated[str, typer.Argument(metavar="DIR", help="A store, a shard set or a published folder.")],
    json_: Json = False,
) -> None:
    """List the shard sets below a folder."""
    from rats.pipeline.files.places import open_place
    from rats.stages.shards.describe import list_sets

    rows = list_sets(open_place(path))
    print_result({"sets": rows}, True) if json_ else print_rows(rows)


@shards.command("info")
def shards_info(
    path: SetPath,
    json_: Json = False,
) -> None:
    """Show recipe, snapshot and scores."""
    from rats.pipeline.files.places import open_place
    from rats.stages.shards.describe import describe

    print_result(describe(open_place(path)), json_)


@shards.command("verify")
def shards_verify(
    path: SetPath,
    rescore: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Also compute N samples' noise, embedding and scores again.")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, max=LARGEST_SEED, metavar="N", help="Draws them [default: a new one].")
    ] = None,
    params: ParamsFile = DEFAULT_PARAMS,
    set_: Sets = None,
    json_: Json = False,
) -> None:
    """Compare every hash.

    Reads every byte of the set and lists everything that is damaged or missing. Hashes do not show a lie that somebody
    has sealed: --rescore does, by the model and the rewards of the parameter file.
    """
    values = None if rescore is None else load(params, set_)
    from rats.pipeline.files.places import open_place
    from rats.stages.shards.verify import verify

    result = verify(open_place(path))
    if rescore is not None and values is not None:
        from rats.stages.shards.rescore import rescore as computed_again

        result |= computed_again(open_place(path), values, rescore, seed)
    print_result(result, json_)


@shards.command("preview")
def shards_preview(
    path: SetPath,
    out: Annotated[Path, typer.Option("-o", "--out", metavar="FILE", help="The page.")] = Path("preview.html"),
    count: Annotated[int, typer.Option(min=1, metavar="N", help="Number of samples.")] = 24,
    seed: Annotated[int, typer.Option(min=0, max=LARGEST_SEED, metavar="N", help="Seed that selects the samples.")] = 0,
    params: ParamsFile = DEFAULT_PARAMS,
    set_: Sets = None,
    json_: Json = False,
) -> None:
    """Write a page to look at.

    Writes one offline HTML file: decoded samples, the states at each horizon, and the best and worst scores. The VAE
    is that of the model in the parameter file.
    """
    values = load(params, set_)
    from rats.pipeline.files.places import open_place
    from rats.stages.shards.preview import preview

    print_result(preview(open_place(path), out, values, count, seed), json_)


@shards.command("export")
def shards_export(
    path: SetPath,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The output folder.")],
    license_: Annotated[
        str | None,
        typer.Option("--license", metavar="ID", help="License of the teacher's outputs, as the Hub names it."),
    ] = None,
    license_name: Annotated[str | None, typer.Option(metavar="NAME", help="For --license other: its name.")] = None,
    license_link: Annotated[str | None, typer.Option(metavar="URL", help="For --license other: its name.")] = None,
    teacher: Annotated[str | None, typer.Option(metavar="NAME", help="Name of the teacher on the card.")] = None,
    title: Annotated[str | None, typer.Option(metavar="TEXT", help="The card's title.")] = None,
    json_: Json = False,
) -> None:
    """Write a folder to share.

    Writes the newest snapshot with its scores and a dataset card. The folder opens in rats, webdataset and datasets,
    and can be uploaded to the Hub as it is. Files are hardlinks where the file system allows.
    """
    from rats.pipeline.files.places import open_place
    from rats.stages.shards.card import LicenseTerms
    from rats.stages.shards.exchange import export_set

    terms = LicenseTerms(license_ or "", license_name, license_link, teacher, title)
    print_result(export_set(open_place(path), out, terms), json_)


@shards.command("import")
def shards_import(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="An exported folder, or a download of one.")],
    store: Annotated[str, typer.Option(metavar="STORE", help="The store to import into; may be a URL.")] = "store",
    json_: Json = False,
) -> None:
    """Take an exported folder into a store.

    Verifies every byte first. A rollout of the same recipe then reuses the samples. A second import changes nothing.
    """
    from rats.pipeline.files.places import open_place
    from rats.stages.shards.exchange import import_set

    print_result(import_set(folder, open_place(store)), json_)


@shards.command("diff")
def shards_diff(
    a: Annotated[str, typer.Argument(metavar="A", help="A shard set or a published folder; may be a URL.")],
    b: Annotated[str, typer.Argument(metavar="B", help="Another one; may be a URL.")],
    snapshot_a: Annotated[int | None, typer.Option(metavar="N", help="A's snapshot [default: the newest].")] = None,
    snapshot_b: Annotated[int | None, typer.Option(metavar="N", help="B's snapshot [default: the newest].")] = None,
    json_: Json = False,
) -> None:
    """Show how two sets differ.

    Compares recipes, samples and columns of scores by their documents.
    """
    from rats.pipeline.files.places import open_place
    from rats.stages.shards.diff import compare_sets, diff_lines

    result = compare_sets(open_place(a), open_place(b), snapshot_a, snapshot_b)
    print_result(result, True) if json_ else print("\n".join(diff_lines(result)))


@shards.command("gc")
def shards_gc(
    store: Annotated[str, typer.Argument(metavar="STORE", help="A local store, the folder that holds the sets.")],
    root: Annotated[
        list[Path] | None,
        typer.Option(metavar="DIR", help="A folder of experiments; repeatable [default: the current folder]."),
    ] = None,
    older_than: Annotated[float, typer.Option(min=0, metavar="HOURS", help="Keep what is younger than this.")] = 24.0,
    delete: Annotated[bool, typer.Option("--delete", help="Delete; without it, only show.")] = False,
    json_: Json = False,
) -> None:
    """Show what no experiment uses.

    With --delete, deletes the sets, snapshots, shards, scores and embeddings that no file below the roots refers to.
    """
    from rats.stages.shards.gc.collect import collect, refuse_busy, result_lines

    result = collect(store, root or [Path(".")], delete, older_than)
    print_result(result, True) if json_ else print("\n".join(result_lines(result)))
    refuse_busy(result)
