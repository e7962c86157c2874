"""`rats stage`: the stages of the pipeline. Everything heavy is imported inside the commands."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rats.schemas.errors import ConfigError, brief
from rats.stages.cli.console import command_line, print_result, write_json
from rats.stages.cli.options import (
    DEFAULT_PARAMS,
    HELP_STYLE,
    LOCAL_WORKERS,
    DryRun,
    Json,
    ParamsFile,
    Seed,
    Sets,
    WorkerFlags,
    creatable,
    grouped,
    load,
    place,
    split_named,
)

if TYPE_CHECKING:
    from rats.pipeline.files.places import Place
    from rats.schemas.params import Params

MaxBad = Annotated[
    float | None,
    typer.Option(min=0.0, max=1.0, metavar="SHARE", help="Samples on which a reward may fail [default: 0.1]."),
]

stage = typer.Typer(help="Run one stage of the pipeline.", **HELP_STYLE)


@stage.command()
@grouped
def rollout(
    split: Annotated[str, typer.Option(metavar="train|validation|test", help="Which prompts.")] = "train",
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Publish the snapshot there, as hardlinks.")] = None,
    report_path: Annotated[
        Path | None, typer.Option("--report", metavar="FILE", help="Also write the result to this file.")
    ] = None,
    workers: WorkerFlags = LOCAL_WORKERS,
    max_bad: MaxBad = None,
    params: ParamsFile = DEFAULT_PARAMS,
    set_: Sets = None,
    seed: Seed = None,
    json_: Json = False,
    dry_run: DryRun = False,
) -> None:
    """Sample the teacher.

    Stores the states that students are trained on, and scores the final ones. Finished shards are reused.
    """
    values = load(params, set_, teacher__seed=seed)
    where = workers.where(values)
    from rats.stages.plan.plan import plan_rollout
    from rats.stages.rollout.rollout import rollout_stage

    creatable(report_path)
    if dry_run:
        print_result(plan_rollout(values, split_named(split), out), json_)
        return
    result = rollout_stage(values, split_named(split), out, where, _share(max_bad)).model_dump()
    if report_path is not None:
        write_json(report_path, result)
    print_result(result, json_)


@stage.command()
@grouped
def score(
    split: Annotated[
        str | None, typer.Option(metavar="train|validation|test", help="Which prompts [default: train].")
    ] = None,
    shards: Annotated[
        str | None, typer.Option(metavar="DIR|URL", help="Score this set instead of the split's.")
    ] = None,
    reward: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="A reward; repeatable [default: all].")
    ] = None,
    snapshot: Annotated[
        int | None, typer.Option(metavar="N", help="Snapshot [default: the split's or the newest].")
    ] = None,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Publish the snapshot there, as hardlinks.")] = None,
    report_path: Annotated[
        Path | None, typer.Option("--report", metavar="FILE", help="Also write the result to this file.")
    ] = None,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Score shards with failed rows again.")] = False,
    workers: WorkerFlags = LOCAL_WORKERS,
    max_bad: MaxBad = None,
    params: ParamsFile = DEFAULT_PARAMS,
    set_: Sets = None,
    seed: Seed = None,
    json_: Json = False,
    dry_run: DryRun = False,
) -> None:
    """Score stored samples.

    Scores the stored final latents by any reward. No teacher is loaded or run. Existing scores are kept.
    """
    values = load(params, set_, teacher__seed=seed)
    where = workers.where(values)
    from rats.stages.rollout.score import plan_score, score_stage

    named = None if split is None else split_named(split)
    creatable(report_path)
    if dry_run:
        print_result(plan_score(values, named, shards, reward, retry_failed, snapshot, out), json_)
        return
    most = _share(max_bad)
    result = score_stage(values, named, shards, reward, where, most, retry_failed, out, snapshot).model_dump()
    if report_path is not None:
        write_json(report_path, result)
    print_result(result if json_ else result | {"rewards": sorted(result["rewards"])}, json_)


@stage.command()
def train(
    shards: Annotated[str, typer.Option(metavar="DIR|URL", help="The training shards.")] = "data/teacher/train",
    variant: Annotated[str, typer.Option(metavar="NAME", help="A name under `variants`.")] = "rats",
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="The run [default: runs/VARIANT].")] = None,
    resume: Annotated[str | None, typer.Option(metavar="latest", help="Continue from the newest checkpoint.")] = None,
    force: Annotated[
        bool,
        typer.Option("--force", help="Start over, or go on with other settings; what is there moves to RUN/replaced."),
    ] = False,
    checkpoints_total_limit: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Checkpoints kept; train.checkpoints_total_limit.")
    ] = None,
    max_bad: Annotated[
        float | None,
        typer.Option(min=0.0, max=1.0, metavar="SHARE", help="Samples on which a reward may fail; train.max_bad."),
    ] = None,
    params: ParamsFile = DEFAULT_PARAMS,
    set_: Sets = None,
    seed: Seed = None,
    json_: Json = False,
    dry_run: DryRun = False,
) -> None:
    """Train a few-step student.

    Trains from stored trajectories: no teacher is run, and no reward scores a teacher sample. For several devices use
    `torchrun --nproc_per_node N --no-python rats stage train` or `accelerate launch --no_python rats stage train`.
    """
    from rats.schemas.params import with_variant

    limits = {"train__checkpoints_total_limit": checkpoints_total_limit, "train__max_bad": max_bad}
    values = load(params, set_, train__seed=seed, **limits)
    out = out or Path("runs") / variant
    if dry_run:
        settings = with_variant(values, variant).model_dump(mode="json")
        print_result({"variant": variant, "shards": str(place(shards)), "out": str(out), "settings": settings}, json_)
        return
    from rats.stages.train.train import train_stage

    print_result(train_stage(values, variant, place(shards), out, resume, force).model_dump(), json_)


@stage.command()
def evaluate(
    split: Annotated[str, typer.Option(metavar="train|validation|test", help="Which prompts.")] = "test",
    shards: Annotated[
        str | None, typer.Option(metavar="DIR|URL", help="Their shards [default: data/teacher/SPLIT].")
    ] = None,
    runs: Annotated[Path, typer.Option(metavar="DIR", help="The folder of the runs.")] = Path("runs"),
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The file of all results [default: reports/evaluate.json].")
    ] = None,
    update_lengths: Annotated[
        str | None,
        typer.Option(metavar="0.5,0.75,1", help="Find train.update_length among these, on the validation prompts."),
    ] = None,
    params: ParamsFile = DEFAULT_PARAMS,
    set_: Sets = None,
    seed: Seed = None,
    json_: Json = False,
    dry_run: DryRun = False,
) -> None:
    """Compare teacher, base and students.

    All systems get the same test prompts and noises.
    """
    values, folder = load(params, set_, evaluate__seed=seed), place(shards or f"data/teacher/{split_named(split)}")
    out = out or Path("reports") / _results(split, update_lengths)
    from rats.stages.evaluate.before import plan_evaluate
    from rats.stages.evaluate.evaluate import evaluate_stage

    if dry_run:
        print_result(plan_evaluate(values, folder, runs, out), json_)
        return
    if update_lengths:
        _choose_length(values, folder, runs, out, _numbers(update_lengths), json_)
        return
    result = evaluate_stage(values, folder, runs, out, command_line())
    print_result(result.model_dump(mode="json") if json_ else {"cells": len(result.cells), "out": str(out)}, json_)
    if not json_:
        _print_verdicts(values, out)


@stage.command()
def report(
    runs: Annotated[Path, typer.Option(metavar="DIR", help="The folder of the runs.")] = Path("runs"),
    evaluation: Annotated[Path, typer.Option(metavar="FILE", help="Output of `rats stage evaluate`.")] = Path(
        "reports/evaluate.json"
    ),
    out: Annotated[Path, typer.Option(metavar="FILE", help="The page.")] = Path("reports/report.html"),
    sheet: Annotated[
        Path | None, typer.Option(metavar="FILE.png", help="Also write its first pictures there, to share.")
    ] = None,
    verdicts: Annotated[bool, typer.Option("--verdicts", help="Only print the verdicts, write nothing.")] = False,
    params: ParamsFile = DEFAULT_PARAMS,
    set_: Sets = None,
    json_: Json = False,
    dry_run: DryRun = False,
) -> None:
    """Write one offline HTML page.

    It shows the results, the pictures side by side, reward and gate over the training, and the cost.
    """
    values = load(params, set_)
    if verdicts:
        _print_verdicts(values, evaluation)
        return
    creatable(out)
    if dry_run:
        print_result({"evaluation": str(evaluation), "runs": str(runs), "out": str(out)}, json_)
        return
    from rats.stages.report.report import report_stage

    report_stage(values, evaluation, runs, out, sheet, command_line())
    print_result({"report": str(out.absolute())}, json_)


def _results(split: str, lengths: str | None) -> str:
    """Results of the test prompts are not replaced by others."""
    if lengths:
        return "update-lengths.json"
    return "evaluate.json" if split == "test" else f"{split}/evaluate.json"


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"--update-lengths {brief(text)}: write numbers and commas, such as 0.5,0.75,1") from None


def _choose_length(values: Params, shards: Place, runs: Path, out: Path, lengths: list[float], json_: bool) -> None:
    from rats.stages.evaluate.lengths import lengths_stage
    from rats.stages.report.verdict import length_lines

    result = lengths_stage(values, shards, runs, out, lengths, command_line())
    print_result(result.model_dump(mode="json") if json_ else {"out": str(out)}, json_)
    if not json_:
        print("", *length_lines(result), sep="\n")


def _print_verdicts(params: Params, evaluation: Path) -> None:
    from rats.stages.report.report import verdicts

    print("", *verdicts(params, evaluation), sep="\n")


def _share(max_bad: float | None) -> float:
    from rats.pipeline.store.scores import MAX_BAD

    return MAX_BAD if max_bad is None else max_bad
