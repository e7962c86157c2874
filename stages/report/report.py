"""Stage report: one offline HTML page from what evaluate, train and rollout left on disk. Runs no model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import yaml
from pydantic import ValidationError

from rats.pipeline.files.atomic import atomic_write
from rats.schemas.errors import DataError, reason
from rats.schemas.params import Params
from rats.schemas.reports import EvaluateReport
from rats.schemas.run import RunRecord
from rats.stages.measure.pictures import PICTURES_FILE, Picture, Pictures, SystemLabel, load_pictures
from rats.stages.measure.values import VALUES_FILE, Values, read_values
from rats.stages.report import figures, tables
from rats.stages.report.cost import cost_block
from rats.stages.templates.render import PageData, plot, png, render
from rats.stages.train.record import read_record


def report_stage(params: Params, evaluation: Path, runs: Path, out: Path) -> Path:
    """Writes the page to `out`.

    Args:
        params: The whole configuration.
        evaluation: What `rats stage evaluate` wrote; its pictures and values lie beside it, and so may the
            reports of the rollouts (rollout*.json).
        runs: The folder of the runs that were evaluated.
        out: The page.

    Raises:
        DataError: one of these files is missing or something else.
    """
    result = read_evaluation(evaluation)
    values = read_values(evaluation.parent / VALUES_FILE)
    pictures = load_pictures(evaluation.parent / PICTURES_FILE)
    curves = [figures.read_curve(name, runs / name / "metrics.csv") for name in params.evaluate.variants]
    records = {name: read_record(runs / name) for name in params.evaluate.variants}
    rollouts = {path.stem: read_json(path) for path in sorted(evaluation.parent.glob("rollout*.json"))}
    context = {
        **_tables(params, result, values),
        **_plots(params, result, curves),
        "frames": params.teacher.seen_frames,
        "sheets": _sheets(pictures, params.teacher.seen_frames),
        "variety": _variety(pictures, params.evaluate.variants[0]),
        "cost": cost_block(params, records, rollouts),
        "provenance": _provenance(params, records, result.snapshot),
        "parameters": yaml.safe_dump(params.model_dump(mode="json"), sort_keys=False, allow_unicode=True),
    }
    atomic_write(out, render("report.html.j2", context).encode())
    return out


def read_evaluation(path: Path) -> EvaluateReport:
    """Evaluate's report; DataError when it is none."""
    try:
        return EvaluateReport.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise DataError(f"{path} is no evaluation ({reason(error)}): run `rats stage evaluate`") from error


def read_json(path: Path) -> PageData:
    """A JSON object; DataError when it is none."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({error}): run the stage that writes it again") from error
    if not isinstance(value, dict):
        raise DataError(f"{path} holds no JSON object: run the stage that writes it again")
    return value


def _tables(params: Params, result: EvaluateReport, values: Values) -> PageData:
    n, seed = params.evaluate.bootstrap, params.evaluate.seed
    cells, main = result.cells, params.evaluate.variants[0]
    first = cells[0]  # prompts and concepts are those of every cell of a reward
    count = f"{first.num_prompts} prompts of {first.num_concepts} concepts, {len(values.concepts)} samples a system."
    return {
        "title": "rats: few steps against many",
        "lead": f"Teacher {params.model.path}, {params.teacher.steps} steps. {count}",
        "seen": f"On the {first.split} prompts.",
        "intervals": f"Intervals: 95 %, {n:,} paired bootstrap resamples of the {first.num_concepts} concepts.",
        "claims": tables.claims(cells, values, main, n, seed),
        "table": tables.full_table(cells, main),
        "comparisons": _comparisons(params, result, values),
    }


def _comparisons(params: Params, result: EvaluateReport, values: Values) -> list[PageData]:
    """The main variant against the other variants, and against the teacher by kind of prompt."""
    n, seed = params.evaluate.bootstrap, params.evaluate.seed
    cells, variants = result.cells, params.evaluate.variants
    blocks = []
    if found := tables.against_controls(values, cells, variants, n, seed):
        note = "Same shards, same student compute: what is left is what the gate knows. Paired by sample."
        blocks.append({"title": f"{variants[0]} against its controls", "note": note, **found})
    if found := tables.by_kind(values, cells, variants[0], n, seed):
        note = "Student minus teacher; in brackets the number of samples."
        blocks.append({"title": "By kind of prompt", "note": note, **found})
    return blocks


def _plots(params: Params, result: EvaluateReport, curves: Sequence[figures.Curve]) -> PageData:
    variants = params.evaluate.variants
    nfe = sorted({n for curve in curves for n in curve.nfe})
    main = curves[0]
    across = (
        "The paper's reward dynamics, from these runs: student and teacher on the same training prompts and noises, "
        f"scored by {params.train.reward_names} without augmentation; thin: each step's batch, thick: running mean."
    )
    gate = "The gate over training: mean of the batch, with a band of one standard deviation within it."
    inside = (
        f"{main.name}: shaping loss after each student step (before alpha and gate), and the gradient norm of each "
        "term as it enters the total."
    )
    forest = "Difference to the teacher on the same prompts and noises, with its 95 % interval."
    return {
        "forest": [plot(figures.forest(result.cells, variants), forest)],
        "training": [
            plot(figures.reward_curves(curves, nfe, params.train.reward_names), across),
            plot(figures.gate_curves(curves, nfe), gate),
            plot(figures.loss_curves(main, main.nfe), inside),
        ],
    }


def _head(column: SystemLabel) -> PageData:
    words = {"teacher": "teacher", "base_guided": "untrained, guided", "base_unguided": "untrained, unguided"}
    cost = f"{column.nfe} steps, {column.evaluations} eval."
    return {"name": words.get(column.system, column.variant), "cost": cost}


def _sheets(pictures: Pictures, frames: int) -> PageData:
    nfe = sorted({column.nfe for column in pictures.columns if column.system != "teacher"})
    height, width = pictures.size
    note = (
        f"Every row is one prompt and one noise. Drawn by lot (seed {pictures.seed}) before anything was sampled, "
        f"one a concept as far as they go, not picked by hand. {width} x {height} px, scaled for the page."
    )
    if frames > 1:
        note += f" Of each video {frames} frames, from the first to the last."
    return {"note": note, "pages": [_sheet(pictures, steps) for steps in nfe]}


def _sheet(pictures: Pictures, steps: int) -> PageData:
    columns = [c for c in pictures.columns if c.system == "teacher" or c.nfe == steps]
    rows = []
    for i, prompt in enumerate(pictures.prompts):
        shown = [_shown(pictures.side[column.id][i], prompt, column) for column in columns]
        rows.append({"prompt": prompt, "pictures": shown})
    return {"title": f"{steps} steps", "columns": [_head(c) for c in columns], "rows": rows}


def _shown(picture: Picture, prompt: str, column: SystemLabel) -> PageData:
    return {"source": png(picture), "words": f"{prompt}: {column.id}"}


def _variety(pictures: Pictures, main: str) -> PageData | None:
    """Pictures of one prompt from several noises: teacher, guided base and main student, at the fewest steps."""
    if not pictures.noise_prompts:
        return None
    students = [c for c in pictures.columns if c.variant == main]
    fewest = min((c.nfe for c in students), default=0)
    wanted = ("teacher", f"base_guided-{fewest}", f"{main}-{fewest}")
    columns = [c for c in pictures.columns if c.id in wanted]
    rows = []
    for i, prompt in enumerate(pictures.noise_prompts):
        groups = [[_shown(image, prompt, column) for image in pictures.noises[column.id][i]] for column in columns]
        rows.append({"prompt": prompt, "groups": groups})
    return {"columns": [_head(c) for c in columns], "rows": rows}


PROVENANCE = ("recipe", "snapshot", "reward_fingerprint", "base", "vae", "student", "settings")
"""Fields of a run's record that the page shows."""


def _provenance(params: Params, records: dict[str, RunRecord], evaluated: str) -> list[tuple[str, str]]:
    """Hashes and names of everything that the page's numbers were made with."""
    rows = [
        ("model", params.model.path),
        ("judges", ", ".join(judge.name for judge in params.evaluate.judges) or "none"),
        ("evaluated snapshot", evaluated),
    ]
    rows += [(f"reward {reward.name}", f"{reward.adapter}, {reward.path}") for reward in params.rewards]
    for name, record in records.items():
        rows += [(f"{name}: {field.replace('_', ' ')}", getattr(record, field)) for field in PROVENANCE]
    return rows
