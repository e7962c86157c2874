"""The command line. Only this folder imports typer; everything heavy is imported inside the commands."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from rats.schemas.errors import ConfigError
from rats.stages.cli.console import guarded, print_checks, print_result
from rats.stages.cli.options import DEFAULT_PARAMS, HELP_STYLE, DryRun, Json, ParamsFile, Seed, Sets, load, split_named
from rats.stages.cli.shards import shards
from rats.stages.cli.stage import stage

app = typer.Typer(
    help="Few-step distillation by reward-aware trajectory shaping, from stored teacher trajectories.",
    add_completion=False,
    pretty_exceptions_enable=False,
    **HELP_STYLE,
)


def _say_version(wanted: bool) -> None:
    if not wanted:
        return
    from importlib.metadata import PackageNotFoundError, version

    try:
        print(f"rats {version('rats')}")
    except PackageNotFoundError:
        print("rats, not installed: read from its source folder")
    raise typer.Exit


app.add_typer(stage, name="stage")
app.add_typer(shards, name="shards")


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_say_version, is_eager=True, help="Say the version and exit.")
    ] = False,
) -> None:
    """What stands before a command."""


@app.command()
def init(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of the new project.")],
    model: Annotated[str, typer.Option(metavar="PATH|HUB-ID", help="The teacher.")] = "black-forest-labs/FLUX.1-dev",
    family: Annotated[
        str | None, typer.Option(metavar="NAME", help="Its family, if model_index.json and hub id do not say it.")
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Prompts, .txt or .csv or a table, split by concept.")
    ] = None,
    column: Annotated[str | None, typer.Option(metavar="NAME", help="The table's column of prompts.")] = None,
    field: Annotated[str | None, typer.Option(metavar="NAME", help="Where rows lie in a JSON document.")] = None,
    reward: Annotated[
        list[str] | None, typer.Option(metavar="ADAPTER=PATH", help="A reward; repeatable, the first one trains.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace existing files.")] = False,
    dvc: Annotated[bool, typer.Option("--dvc", help="Only write dvc.yaml again, from DIR/params.yaml.")] = False,
    demo: Annotated[bool, typer.Option("--demo", help="A project on the embedded model, of two minutes.")] = False,
    json_: Json = False,
) -> None:
    """Start a project of your own.

    Writes params.yaml, dvc.yaml and prompt files for your model, prompts and rewards.
    """
    from rats.stages.init import init_project, next_commands, table_of, write_dvc

    if dvc:
        print_result({"written": [str(write_dvc(folder))]}, json_)
        return
    if demo:
        from rats.stages.demo import demo_commands, demo_project

        written = demo_project(folder, force)
        print_result({"written": [str(path) for path in written], "next": demo_commands(folder)}, json_)
        return
    written = init_project(folder, model, table_of(prompts, column, field), reward or [], force, family)
    print_result({"written": [str(path) for path in written], "next": next_commands(folder)}, json_)


@app.command()
def plan(
    split: Annotated[str, typer.Option(metavar="train|validation|test", help="Which prompts.")] = "train",
    experiments: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Number of trainings on this set [default: all variants].")
    ] = None,
    price: Annotated[float | None, typer.Option(min=0, metavar="USD", help="Price of one worker for an hour.")] = None,
    workers: Annotated[int | None, typer.Option(min=1, metavar="N", help="Number of workers.")] = None,
    rate: Annotated[
        float | None, typer.Option(min=1e-6, metavar="TFLOPS", help="Speed of one worker [default: measured here].")
    ] = None,
    params: ParamsFile = DEFAULT_PARAMS,
    set_: Sets = None,
    json_: Json = False,
) -> None:
    """Estimate what a rollout takes.

    Shows samples, evaluations, time, bytes and cost before anything runs, and compares stored trajectories with a
    live teacher.
    """
    values = load(params, set_)
    from rats.stages.plan.plan import plan_stage
    from rats.stages.plan.text import plan_rows

    flops = None if rate is None else rate * 1e12
    planned = plan_stage(values, split_named(split), experiments, price, workers, flops)
    if json_:
        print_result(planned.model_dump(), json_)
        return
    for name, text in plan_rows(planned):
        print(f"{name:<12} {text}")


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="The prompt.")],
    nfe: Annotated[int, typer.Option(min=1, metavar="N", help="Number of network evaluations.")] = 3,
    run: Annotated[Path, typer.Option(metavar="DIR", help="The run whose student is used.")] = Path("runs/rats"),
    out: Annotated[Path, typer.Option("-o", "--out", metavar="FILE", help="The image file.")] = Path("out.png"),
    count: Annotated[int, typer.Option(min=1, metavar="N", help="Number of images; several form a grid.")] = 1,
    enlarge: Annotated[bool, typer.Option(help="Write small images a whole number of times as large.")] = True,
    seed: Seed = None,
    params: ParamsFile = DEFAULT_PARAMS,
    set_: Sets = None,
    json_: Json = False,
) -> None:
    """Generate images with a trained student."""
    values = load(params, set_)
    from rats.stages.generate import generate as draw

    drawn = draw(values, prompt, nfe, run, seed or 0, out, count, enlarge)
    print_result({"out": str(out), "nfe": nfe, "seconds": drawn.seconds, "pixels": drawn.pixels}, json_)


@app.command()
def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A finished run, such as runs/rats.")],
    out: Annotated[Path, typer.Option("-o", "--out", metavar="DIR", help="The output folder.")],
    merged: Annotated[bool, typer.Option(help="Write the whole pipeline, or only the adapters.")] = True,
    evaluation: Annotated[Path, typer.Option(metavar="FILE", help="Figures for the model card.")] = Path(
        "reports/evaluate.json"
    ),
    params: ParamsFile = DEFAULT_PARAMS,
    set_: Sets = None,
    json_: Json = False,
    dry_run: DryRun = False,
) -> None:
    """Write a student for plain diffusers.

    Writes the adapters, the whole pipeline, a model card, and call.json with the arguments of the pipeline's call.
    """
    values = load(params, set_)
    from rats.pipeline.families.open import Model
    from rats.stages.export.export import export_stage, plan_export, summary

    if dry_run:
        print_result(summary(plan_export(Model.of(values), run, out, merged), run, out), json_)
        return
    print_result(export_stage(values, run, out, merged, evaluation), json_)


@app.command()
def serve(
    name: Annotated[str, typer.Argument(help="One of `rewards`; with --callable, a new name.")],
    host: Annotated[
        str, typer.Option(metavar="ADDRESS", help="Address to listen at; needs a token unless loopback.")
    ] = ("127.0.0.1"),
    port: Annotated[int, typer.Option(min=0, max=65535, metavar="N", help="The port; 0 takes a free one.")] = 8765,
    max_batch: Annotated[int, typer.Option(min=1, metavar="N", help="Largest number of pictures in a request.")] = 32,
    queue: Annotated[
        int, typer.Option(min=1, metavar="N", help="Waiting requests; further ones are told to retry.")
    ] = 8,
    token_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Token that clients must send [default: none].")
    ] = None,
    callable_: Annotated[
        str | None, typer.Option("--callable", metavar="MODULE:FUNCTION", help="A function of pictures and prompts.")
    ] = None,
    params: ParamsFile = DEFAULT_PARAMS,
    set_: Sets = None,
    json_: Json = False,
) -> None:
    """Serve a reward to trainers elsewhere.

    Their params.yaml has a reward with adapter: url and this server's url as its path. Runs until Ctrl-C or SIGTERM.
    """
    from rats.pipeline.rewards.remote_protocol import read_token
    from rats.stages.serve.reward import RewardServer, open_callable, open_served

    token = read_token(token_file) if token_file else None
    reward = open_callable(callable_, name) if callable_ else open_served(load(params, set_), name)
    server = RewardServer(reward, host, port, max_batch, queue, token)
    print_result({"url": server.url, **server.about.model_dump()}, json_)
    sys.stdout.flush()  # a parent process may read the port there
    server.serve()


@app.command()
def doctor(params: ParamsFile = DEFAULT_PARAMS, set_: Sets = None, json_: Json = False) -> None:
    """Check this installation.

    Shows what is installed, which devices there are, and whether everything that the parameter file needs is present.
    """
    from rats.stages.doctor.doctor import run_checks

    checks = run_checks(params, set_ or [], is_default=params == DEFAULT_PARAMS and not set_)
    print_result({"checks": checks}, True) if json_ else print_checks(checks)
    if not all(check["ok"] for check in checks if check["needed"]):
        raise ConfigError("something is missing; see the lines marked 'no' above")


def main() -> None:
    """Entry point of `rats`."""
    guarded(app)


if __name__ == "__main__":
    main()
