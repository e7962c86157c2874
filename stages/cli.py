"""The command line. The only file that imports typer; everything heavy is imported inside the commands."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rats.schemas.errors import ConfigError
from rats.stages.console import guarded, say, table, write_json

if TYPE_CHECKING:
    from rats.schemas.params import Params

# Plain help: rich would double the time to the first line.
STYLE: dict[str, Any] = {"no_args_is_help": True, "rich_markup_mode": None}
app = typer.Typer(
    help="Few-step distillation by reward-aware trajectory shaping, from stored teacher trajectories.",
    add_completion=False,
    pretty_exceptions_enable=False,
    **STYLE,
)
stage = typer.Typer(help="Run one stage of the pipeline.", **STYLE)
shards = typer.Typer(help="Look into a shard set.", **STYLE)
app.add_typer(stage, name="stage")
app.add_typer(shards, name="shards")

ParamsFile = Annotated[Path, typer.Option("--params", metavar="FILE", help="The parameter file.")]
Sets = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change one value; repeatable.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout; logs go to stderr.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check everything, say what would be done, do nothing.")]
Seed = Annotated[int | None, typer.Option("--seed", metavar="N", help="The stage's seed, in place of the file's.")]

DEFAULT_PARAMS = Path("params.yaml")


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
    values = _load(params, set_, teacher__seed=seed)
    from rats.stages.rollout import plan_rollout, rollout_stage

    if dry_run:
        say(plan_rollout(values, _split(split)), json_)
        return
    result = rollout_stage(values, _split(split), out, workers, scheduler_address).model_dump()
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

    values = _load(params, set_, train__seed=seed)
    out = out or Path("runs") / variant
    if dry_run:
        settings = with_variant(values, variant).model_dump(mode="json")
        say({"variant": variant, "shards": str(_folder(shards)), "out": str(out), "settings": settings}, json_)
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
    values = _load(params, set_, evaluate__seed=seed)
    if dry_run:
        students = {name: str(_folder(runs / name / "student")) for name in values.evaluate.variants}
        say({"shards": str(_folder(shards)), "students": students, "out": str(out)}, json_)
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
    values = _load(params, set_)
    if dry_run:
        say({"evaluation": str(evaluation), "runs": str(runs), "out": str(out)}, json_)
        return
    from rats.stages.report import report_stage

    report_stage(values, evaluation, runs, out)
    say({"report": str(out.absolute())}, json_)


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


@app.command()
def init(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Where the new project goes.")],
    model: Annotated[str, typer.Option(metavar="PATH|HUB-ID", help="The teacher.")] = "black-forest-labs/FLUX.1-dev",
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

    written = [write_dvc(folder)] if dvc else init_project(folder, model, prompts, reward or [], force)
    say({"written": [str(path) for path in written]}, json_)


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
    values = _load(params, set_)
    from rats.stages.generate import generate as draw

    draw(values, prompt, nfe, run, seed or 0, out, count)
    say({"out": str(out)}, json_)


@app.command()
def doctor(params: ParamsFile = DEFAULT_PARAMS, set_: Sets = None, json_: Json = False) -> None:
    """Check this installation.

    Says what is installed, and whether the models and prompts of the parameter file can be found.
    """
    from rats.stages.doctor import examine

    checks = examine(params, set_ or [])
    say({"checks": checks}, True) if json_ else table(checks)
    if not all(check["ok"] for check in checks):
        raise ConfigError("something is missing; see the lines marked 'no' above")


def _load(path: Path, sets: list[str] | None, **seeds: int | None) -> Params:
    """The parameters; a seed flag such as `teacher__seed` comes last and wins."""
    from rats.schemas.params import load_params

    flags = [f"{name.replace('__', '.')}={value}" for name, value in seeds.items() if value is not None]
    return load_params(path, [*(sets or []), *flags])


def _split(name: str) -> Any:
    if name not in ("train", "validation", "test"):
        raise ConfigError(f"unknown split {name!r}: use train, validation or test")
    return name


def _folder(path: Path) -> Path:
    if not path.is_dir():
        raise ConfigError(f"no folder {path}: run the stage that makes it first")
    return path


def main() -> None:
    """Entry point of `rats`."""
    guarded(app)


if __name__ == "__main__":
    main()
