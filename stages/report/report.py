"""Stage report: one offline HTML page from what evaluate, train and rollout left on disk. Runs no model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml
from pydantic import ValidationError

from rats.pipeline.files.atomic import atomic_write
from rats.schemas.errors import ConfigError, DataError, reason
from rats.schemas.params import Params
from rats.schemas.reports import EvaluateReport
from rats.schemas.run import RunRecord
from rats.stages.measure.pictures import PICTURES_FILE, Pictures, load_pictures
from rats.stages.measure.values import VALUES_FILE, Values, read_values
from rats.stages.report import figures, tables
from rats.stages.report.cost import cost_block
from rats.stages.report.sheet import contact_sheet
from rats.stages.report.showcase import FIRST, Shot, Showcase, first_columns, name_of
from rats.stages.report.verdict import headline, verdict_lines
from rats.stages.templates.render import PageData, data_uri, plot, png, render
from rats.stages.train.record import read_record

SMALL = 160
"""Pixels of a picture's longer side below which the page shows its pixels as they are."""


def report_stage(
    params: Params, evaluation: Path, runs: Path, out: Path, sheet: Path | None = None, command: str = ""
) -> Path:
    """Writes the page to `out`.

    Args:
        params: The whole configuration.
        evaluation: What `rats stage evaluate` wrote; its pictures and values lie beside it, and so may the
            reports of the rollouts (rollout*.json).
        runs: The folder of the runs that were evaluated.
        out: The page.
        sheet: Also the first screen's sentence and pictures, as a PNG.
        command: What was typed, for the page.

    Raises:
        ConfigError: the first variant was not evaluated.
        DataError: one of these files is missing or something else.
    """
    found = _Evaluation.read(params, evaluation)
    curves = [figures.read_curve(name, runs / name / "metrics.csv") for name in params.evaluate.variants]
    records = {name: read_record(runs / name) for name in params.evaluate.variants}
    rollouts = {path.stem: read_json(path) for path in sorted(evaluation.parent.glob("rollout*.json"))}
    context = {
        **_first_screen(found),
        **_tables(params, found),
        **_plots(params, found.result, curves),
        "frames": params.teacher.seen_frames,
        "small": max(found.pictures.size) < SMALL,
        "sheets": _sheets(found, params.teacher.seen_frames),
        "variety": _variety(found.pictures, found.main),
        "cost": cost_block(params, records, rollouts),
        "provenance": _provenance(params, records, found.result, command),
        "parameters": yaml.safe_dump(params.model_dump(mode="json"), sort_keys=False, allow_unicode=True),
    }
    atomic_write(out, render("report.html.j2", context).encode())
    if sheet is not None:
        atomic_write(sheet, contact_sheet(found.headline, found.lead(params), found.first_prompts()))
    return out


@dataclass(frozen=True)
class _Evaluation:
    """What `rats stage evaluate` left. `main` is the first of `evaluate.variants`."""

    result: EvaluateReport
    values: Values
    pictures: Pictures
    main: str

    @classmethod
    def read(cls, params: Params, path: Path) -> _Evaluation:
        values, pictures = read_values(path.parent / VALUES_FILE), load_pictures(path.parent / PICTURES_FILE)
        result = read_evaluation(path)
        return cls(result, values, pictures, _main(params, result, path))

    @property
    def headline(self) -> str:
        return headline(self.result.cells, self.main)

    @property
    def showcase(self) -> Showcase:
        return Showcase.of(self.pictures, self.values, self.result.cells, self.main)

    def lead(self, params: Params) -> str:
        first = self.result.cells[0]  # prompts and concepts are those of every cell of a reward
        count = f"{first.num_prompts} {first.split} prompts of {first.num_concepts} concepts"
        said = f"{params.model.path}, {count}, {len(self.values.concepts)} samples a system."
        made = self.result.made
        return f"{said} Evaluated {made.date} by {made.code} on {made.machine}." if made else said

    def first_prompts(self) -> list[tuple[str, list[Shot]]]:
        """The first screen's prompts, each with its pictures."""
        columns = first_columns(self.pictures, self.main)
        rows = self.showcase.ends(columns[-1].id)
        return [(self.pictures.prompts[row], self.showcase.shots(row, columns)) for row in rows]


def verdicts(params: Params, evaluation: Path) -> list[str]:
    """An evaluation in the lines of a terminal."""
    values, result = read_values(evaluation.parent / VALUES_FILE), read_evaluation(evaluation)
    return list(verdict_lines(result.cells, values, _main(params, result, evaluation)))


def _main(params: Params, result: EvaluateReport, path: Path) -> str:
    """The first of `evaluate.variants`. Raises ConfigError where it was not evaluated."""
    main, there = params.evaluate.variants[0], sorted({cell.variant for cell in result.cells if cell.variant})
    if main not in there:
        raise ConfigError(
            f"{path} has no student of {main}, the first of evaluate.variants, but of {', '.join(there) or 'none'}: "
            "run `rats stage evaluate`, or set evaluate.variants to what was evaluated"
        )
    return main


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


def _first_screen(found: _Evaluation) -> PageData:
    metric, shown = found.showcase.metric, len(found.pictures.prompts)
    note = f"Below each picture its {metric} and, in colour, the gain over the teacher's picture from the same noise."
    if shown > FIRST:
        half = FIRST // 2
        note = f"Of {shown} prompts drawn by lot, the {half} largest gains and the {half} largest losses. {note}"
    return {
        "title": "rats: few steps against many",
        "headline": found.headline,
        "first": [_panel(prompt, shots) for prompt, shots in found.first_prompts()],
        "first_note": note,
    }


def _panel(prompt: str, shots: Sequence[Shot]) -> PageData:
    return {"prompt": prompt, "shots": [{**vars(shot), "source": png(shot.picture)} for shot in shots]}


def _tables(params: Params, found: _Evaluation) -> PageData:
    cells, main = found.result.cells, found.main
    return {
        "lead": found.lead(params),
        "intervals": f"Intervals: 95 %, Student's t over the {cells[0].num_concepts} concepts, paired by sample.",
        "claims": tables.claims(cells, found.values, main),
        "table": tables.full_table(cells, main),
        "csv": data_uri("text/csv", tables.cells_csv(cells).encode()),
        "comparisons": _comparisons(params, found.result, found.values),
    }


def _comparisons(params: Params, result: EvaluateReport, values: Values) -> list[PageData]:
    """The main variant against the other variants, and against the teacher by kind of prompt."""
    cells, variants = result.cells, params.evaluate.variants
    blocks = []
    if found := tables.against_controls(values, cells, variants):
        note = "Same shards, same student compute: what is left is what the gate knows. Paired by sample."
        blocks.append({"title": f"{variants[0]} against its controls", "note": note, **found})
    if found := tables.by_kind(values, cells, variants[0]):
        note = "Student minus teacher; in brackets the number of samples."
        blocks.append({"title": "By kind of prompt", "note": note, **found})
    return blocks


def _plot(panels: figures.Panels, caption: str) -> PageData:
    return plot(panels.svgs, panels.legend, caption)


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
        f"term as it enters the total (solid at {main.nfe[0]} steps, then dashed, then dotted)."
    )
    forest = "Difference to the teacher on the same prompts and noises, with its 95 % interval."
    return {
        "forest": [_plot(figures.forest(result.cells, variants), forest)],
        "training": [
            _plot(figures.reward_curves(curves, nfe, params.train.reward_names), across),
            _plot(figures.gate_curves(curves, nfe), gate),
            _plot(figures.loss_curves(main, main.nfe), inside),
        ],
    }


def _sheets(found: _Evaluation, frames: int) -> PageData:
    pictures = found.pictures
    nfe = sorted({column.nfe for column in pictures.columns if column.system != "teacher"})
    height, width = pictures.size
    note = (
        f"Every row is one prompt and one noise. Drawn by lot (seed {pictures.seed}) before anything was sampled, "
        f"one a concept as far as they go, not picked by hand; in the order of the gain of {found.main} over the "
        f"teacher. {width} x {height} px; click for full size."
    )
    if frames > 1:
        note += f" Of each video {frames} frames, from the first to the last."
    return {"note": note, "pages": [_sheet(found, steps) for steps in nfe]}


def _sheet(found: _Evaluation, steps: int) -> PageData:
    pictures, show = found.pictures, found.showcase
    columns = [c for c in pictures.columns if c.system == "teacher" or c.nfe == steps]
    students = [c.id for c in columns if c.variant == found.main] or [columns[-1].id]
    panels = [_panel(pictures.prompts[row], show.shots(row, columns)) for row in show.order(students[0])]
    return {"title": f"{steps} steps", "panels": panels}


def _variety(pictures: Pictures, main: str) -> PageData | None:
    """Pictures of one prompt from several noises: teacher, guided base and main student, at the fewest steps."""
    if not pictures.noise_prompts:
        return None
    panels = []
    for i, prompt in enumerate(pictures.noise_prompts):
        groups = [
            {"name": name_of(column), "sources": [png(image) for image in pictures.noises[column.id][i]]}
            for column in first_columns(pictures, main)
        ]
        panels.append({"prompt": prompt, "groups": groups})
    return {"panels": panels}


PROVENANCE = ("recipe", "snapshot", "reward_fingerprint", "base", "vae", "student", "settings")
"""Fields of a run's record that the page shows."""


def _provenance(
    params: Params, records: dict[str, RunRecord], result: EvaluateReport, command: str
) -> list[tuple[str, str]]:
    """Commands, hashes and names of everything that the page's numbers were made with."""
    rows = [("page", command)] if command else []
    if made := result.made:
        rows += [("evaluation", made.command), ("date", made.date), ("code", made.code), ("machine", made.machine)]
    judges = ", ".join(judge.name for judge in params.evaluate.judges)
    rows += [("model", params.model.path), ("judges", judges or "none")]
    rows += [("evaluated snapshot", result.snapshot)]
    rows += [(f"reward {reward.name}", f"{reward.adapter}, {reward.path}") for reward in params.rewards]
    for name, record in records.items():
        rows += [(f"{name}: {field.replace('_', ' ')}", getattr(record, field)) for field in PROVENANCE]
    return [(name, value) for name, value in rows if value]
