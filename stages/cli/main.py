"""The command line. Only this folder imports typer; everything heavy is imported inside the commands."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from rats.schemas.errors import ConfigError
from rats.stages.cli.console import findings, guarded, say
from rats.stages.cli.options import DEFAULT_PARAMS, STYLE, DryRun, Json, ParamsFile, Seed, Sets, load, split_named
from rats.stages.cli.shards import shards
from rats.stages.cli.stage import stage

app = typer.Typer(
    help="Few-step distillation by reward-aware trajectory shaping, from stored teacher trajectories.",
    add_completion=False,
    pretty_exceptions_enable=False,
    **STYLE,
)
app.add_typer(stage, name="stage")
app.add_typer(shards, name="shards")


@app.command()
def init(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Where the new project goes.")],
    model: Annotated[str, typer.Option(metavar="PATH|HUB-ID", help="The teacher.")] = "black-forest-labs/FLUX.1-dev",
    family: Annotated[
        str | None, typer.Option(metavar="NAME", help="Its family, if model_index.json or the hub id does not tell.")
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Prompts, .txt or .csv, split by concept.")
    ] = None,
    reward: Annotated[
        list[str] | None, typer.Option(metavar="ADAPTER=PATH", help="A reward; repeatable, the first one trains.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace files that are there.")] = False,
    dvc: Annotated[bool, typer.Option("--dvc", help="Only write dvc.yaml anew, from DIR/params.yaml.")] = False,
    json_: Json = False,
) -> None:
    """Start a project of your own.

    Writes params.yaml, dvc.yaml and prompt files for your model, prompts and rewards.
    """
    from rats.stages.init import init_project, write_dvc

    written = [write_dvc(folder)] if dvc else init_project(folder, model, prompts, reward or [], force, family)
    say({"written": [str(path) for path in written]}, json_)


@app.command()
def plan(
    split: Annotated[str, typer.Option(metavar="train|validation|test", help="Which prompts.")] = "train",
    experiments: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Trainings on this set; all variants if not given.")
    ] = None,
    price: Annotated[float | None, typer.Option(min=0, metavar="USD", help="An hour of one worker.")] = None,
    workers: Annotated[int | None, typer.Option(min=1, metavar="N", help="How many share the work.")] = None,
    rate: Annotated[
        float | None, typer.Option(min=1e-6, metavar="TFLOPS", help="Of one worker elsewhere; else measured here.")
    ] = None,
    params: ParamsFile = DEFAULT_PARAMS,
    set_: Sets = None,
    json_: Json = False,
) -> None:
    """Say what a rollout takes, before it starts.

    Samples, what is there, evaluations, time, bytes and cost; stored trajectories against a live teacher.
    """
    values = load(params, set_)
    from rats.stages.plan.plan import plan_stage
    from rats.stages.plan.text import plan_rows

    flops = None if rate is None else rate * 1e12
    planned = plan_stage(values, split_named(split), experiments, price, workers, flops)
    if json_:
        say(planned.model_dump(), json_)
        return
    for name, text in plan_rows(planned):
        print(f"{name:<12} {text}")


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="What to draw.")],
    nfe: Annotated[int, typer.Option(min=1, metavar="N", help="Network evaluations.")] = 3,
    run: Annotated[Path, typer.Option(metavar="DIR", help="The run whose student draws.")] = Path("runs/rats"),
    out: Annotated[Path, typer.Option("-o", "--out", metavar="FILE", help="The picture.")] = Path("out.png"),
    count: Annotated[int, typer.Option(min=1, metavar="N", help="Pictures, in a grid.")] = 1,
    seed: Seed = None,
    params: ParamsFile = DEFAULT_PARAMS,
    set_: Sets = None,
    json_: Json = False,
) -> None:
    """Draw a prompt with a trained student."""
    values = load(params, set_)
    from rats.stages.generate import generate as draw

    draw(values, prompt, nfe, run, seed or 0, out, count)
    say({"out": str(out)}, json_)


@app.command()
def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A finished run, such as runs/rats.")],
    out: Annotated[Path, typer.Option("-o", "--out", metavar="DIR", help="The folder to make.")],
    merged: Annotated[bool, typer.Option(help="The whole pipeline; else the adapters alone.")] = True,
    evaluation: Annotated[Path, typer.Option(metavar="FILE", help="What evaluate wrote, for the card.")] = Path(
        "reports/evaluate.json"
    ),
    params: ParamsFile = DEFAULT_PARAMS,
    set_: Sets = None,
    json_: Json = False,
    dry_run: DryRun = False,
) -> None:
    """Write a student for plain diffusers.

    Adapters, the whole pipeline, a model card and call.json: what to call it with.
    """
    values = load(params, set_)
    from rats.pipeline.families.open import Model
    from rats.stages.export.export import export_stage, plan_export, summary

    if dry_run:
        say(summary(plan_export(Model.of(values), run, out, merged), run, out), json_)
        return
    say(export_stage(values, run, out, merged, evaluation), json_)


@app.command()
def serve(
    name: Annotated[str, typer.Argument(help="One of `rewards`; with --callable, what to call it.")],
    host: Annotated[str, typer.Option(metavar="ADDRESS", help="Where it listens; all but loopback need a token.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=0, max=65535, metavar="N", help="0: a free one.")] = 8765,
    max_batch: Annotated[int, typer.Option(min=1, metavar="N", help="Pictures in one request.")] = 32,
    queue: Annotated[int, typer.Option(min=1, metavar="N", help="Requests held; the next is told to wait.")] = 8,
    token_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The token that clients must send; else no authentication.")
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
    from rats.stages.serve import RewardServer, open_callable, open_served

    token = read_token(token_file) if token_file else None
    reward = open_callable(callable_, name) if callable_ else open_served(load(params, set_), name)
    server = RewardServer(reward, host, port, max_batch, queue, token)
    say({"url": server.url, **server.about.model_dump()}, json_)
    sys.stdout.flush()  # whoever started us reads the port there
    server.serve()


@app.command()
def doctor(params: ParamsFile = DEFAULT_PARAMS, set_: Sets = None, json_: Json = False) -> None:
    """Check this installation.

    Says what is installed, which devices there are, and whether all that the parameter file needs can be found.
    """
    from rats.stages.doctor.doctor import examine

    checks = examine(params, set_ or [], is_default=params == DEFAULT_PARAMS and not set_)
    say({"checks": checks}, True) if json_ else findings(checks)
    if not all(check["ok"] for check in checks if check["needed"]):
        raise ConfigError("something is missing; see the lines marked 'no' above")


def main() -> None:
    """Entry point of `rats`."""
    guarded(app)


if __name__ == "__main__":
    main()
