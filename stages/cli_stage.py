"""`rats stage`: the stages of the pipeline. Everything heavy is imported inside the commands."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rats.stages.cli_options import (
    DEFAULT_PARAMS,
    STYLE,
    DryRun,
    Json,
    ParamsFile,
    Seed,
    Sets,
    existing,
    load,
    split_named,
)
from rats.stages.console import say, write_json

stage = typer.Typer(help="Run one stage of the pipeline.", **STYLE)


@stage.command()
def rollout(
    split: Annotated[str, typer.Option(metavar="train|validation|test", help="Which prompts.")] = "train",
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Publish the snapshot there, by hardlink.")] = None,
    report_path: Annotated[Path | None, typer.Option("--report", metavar="FILE", help="Also write the report.")] = None,
    workers: Annotated[int | None, typer.Option(min=0, metavar="N", help="Local processes; 0: in this one.")] = None,
    scheduler_address: Annotated[str | None, typer.Option(metavar="URL", help="A running Dask scheduler.")] = None,
    params: ParamsFile = DEFAULT_PARAMS,
    set_: Sets = None,
    seed: Seed = None,
    json_: Json = False,
    dry_run: DryRun = False,
) -> None:
    """Sample the teacher.

    Keeps what students need and scores it. Finished shards are never made again.
    """
    values = load(params, set_, teacher__seed=seed)
    from rats.stages.rollout import plan_rollout, rollout_stage

    if dry_run:
        say(plan_rollout(values, split_named(split)), json_)
        return
    result = rollout_stage(values, split_named(split), out, workers, scheduler_address).model_dump()
    if report_path is not None:
        write_json(report_path, result)
    say(result, json_)


@stage.command()
def train(
    shards: Annotated[Path, typer.Option(metavar="DIR", help="The published training shards.")] = Path(
        "data/teacher/train"
    ),
    variant: Annotated[str, typer.Option(metavar="NAME", help="A name under `variants`.")] = "rats",
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="The run; runs/VARIANT if not given.")] = None,
    resume: Annotated[str | None, typer.Option(metavar="latest", help="Go on from the newest checkpoint.")] = None,
    params: ParamsFile = DEFAULT_PARAMS,
    set_: Sets = None,
    seed: Seed = None,
    json_: Json = False,
    dry_run: DryRun = False,
) -> None:
    """Train a few-step student.

    From stored trajectories: no teacher is run, no reward is asked about a teacher sample.
    """
    from rats.schemas.params import with_variant

    values = load(params, set_, train__seed=seed)
    out = out or Path("runs") / variant
    if dry_run:
        settings = with_variant(values, variant).model_dump(mode="json")
        say({"variant": variant, "shards": str(existing(shards)), "out": str(out), "settings": settings}, json_)
        return
    from rats.stages.train import train_stage

    say(train_stage(values, variant, shards, out, resume).model_dump(), json_)


@stage.command()
def evaluate(
    shards: Annotated[Path, typer.Option(metavar="DIR", help="The published test shards.")] = Path("data/teacher/test"),
    runs: Annotated[Path, typer.Option(metavar="DIR", help="The folder of the runs.")] = Path("runs"),
    out: Annotated[Path, typer.Option(metavar="FILE", help="The cells.")] = Path("reports/evaluate.json"),
    params: ParamsFile = DEFAULT_PARAMS,
    set_: Sets = None,
    seed: Seed = None,
    json_: Json = False,
    dry_run: DryRun = False,
) -> None:
    """Compare teacher, base and students.

    All on the same test prompts and noises.
    """
    values = load(params, set_, evaluate__seed=seed)
    if dry_run:
        students = {name: str(existing(runs / name / "student")) for name in values.evaluate.variants}
        say({"shards": str(existing(shards)), "students": students, "out": str(out)}, json_)
        return
    from rats.stages.evaluate import evaluate_stage

    result = evaluate_stage(values, shards, runs, out)
    say(result.model_dump(mode="json") if json_ else {"cells": len(result.cells), "out": str(out)}, json_)


@stage.command()
def report(
    runs: Annotated[Path, typer.Option(metavar="DIR", help="The folder of the runs.")] = Path("runs"),
    evaluation: Annotated[Path, typer.Option(metavar="FILE", help="What evaluate wrote.")] = Path(
        "reports/evaluate.json"
    ),
    out: Annotated[Path, typer.Option(metavar="FILE", help="The page.")] = Path("reports/report.html"),
    params: ParamsFile = DEFAULT_PARAMS,
    set_: Sets = None,
    json_: Json = False,
    dry_run: DryRun = False,
) -> None:
    """Write one offline HTML page.

    The table, the pictures side by side, the course of reward and gate, the cost.
    """
    values = load(params, set_)
    if dry_run:
        say({"evaluation": str(evaluation), "runs": str(runs), "out": str(out)}, json_)
        return
    from rats.stages.report import report_stage

    report_stage(values, evaluation, runs, out)
    say({"report": str(out.absolute())}, json_)
