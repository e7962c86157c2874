"""`rats export`: a run's student as a folder that plain diffusers loads and calls, without rats."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rats.pipeline.families.open import Model
from rats.pipeline.files.atomic import atomic_folder
from rats.pipeline.machine import on_its_threads
from rats.pipeline.weights.loading import read_state, save_component
from rats.pipeline.weights.lora import export_lora, is_lora, merge_lora
from rats.pipeline.weights.movement import share_kept
from rats.schemas.errors import CannotCreateError, ConfigError
from rats.schemas.params import Params
from rats.schemas.run import RunRecord
from rats.stages.export.model_card import model_card
from rats.stages.measure.splits import shared_with_train
from rats.stages.train.origin import changed_call, check_base, check_grid
from rats.stages.train.record import checked_student, read_record

log = logging.getLogger(__name__)

LORA, PIPELINE, CALL, CARD = "lora", "pipeline", "call.json", "README.md"
EXPORTED = {LORA, PIPELINE, CALL, CARD, ".gitattributes", ".cache"}
"""Top-level names of an export, and those that the Hub's client adds. A folder with any other name is not replaced."""


@dataclass(frozen=True)
class ExportPlan:
    """What will be exported. Everything was checked."""

    record: RunRecord
    student: Path
    parts: tuple[str, ...]
    call: dict[str, int | float]
    sigmas: dict[int, tuple[float, ...]]
    """The grid of each number of steps that it was trained for."""


def plan_export(model: Model, run: Path, out: Path, merged: bool = True) -> ExportPlan:
    """Checks everything that can be wrong before anything is loaded or written; see `export_stage`."""
    record = read_record(run)
    student = checked_student(run, record)
    if not merged and not is_lora(student):
        raise ConfigError(f"{run} trained the whole network and has no adapters: leave out --no-merged")
    check_base(model, run, record, student)
    _check_call(model, run, record)
    check_grid(model, run, record)
    _check_out(out)
    parts = ((LORA,) if is_lora(student) else ()) + ((PIPELINE,) if merged else ())
    return ExportPlan(record, student, parts, model.call(), model.sigmas(record.nfe))


@on_its_threads
def export_stage(params: Params, run: Path, out: Path, merged: bool, evaluation: Path) -> dict[str, Any]:
    """Writes the folder `out` atomically; an older export is replaced.

    It holds lora/ (of a run that trained adapters), pipeline/ (with `merged`: the whole pipeline, its network the
    student's or the base's with the adapters added in), README.md (the model card) and call.json.

    Args:
        params: The whole configuration: the model that the run started from.
        run: A finished run.
        out: The folder to make.
        merged: Whether to write pipeline/; a run of the whole network has nothing else.
        evaluation: Output of `rats stage evaluate`. Its figures go on the card if it exists and is of this student.

    Raises:
        ConfigError: no such run, or parameters that are not those it was trained with.
        DataError: the student is damaged, or it is not this model that it was trained from.
        CannotCreateError: `out` holds something else than an export.
    """
    model, kept = Model.of(params), None
    export = plan_export(model, run, out, merged)
    with atomic_folder(out) as target:
        if LORA in export.parts:
            export_lora(export.student, target / LORA, model.family.comfyui_name)
        if PIPELINE in export.parts:
            kept = _write_pipeline(model, export.student, target / PIPELINE)
        call = {**export.call, "sigmas": export.sigmas}
        (target / CALL).write_text(json.dumps(call, indent=1, sort_keys=True) + "\n")
        leaks = shared_with_train(params.prompts)
        card = model_card(model, export.record, export.parts, export.sigmas, kept, evaluation, leaks)
        (target / CARD).write_text(card, encoding="utf-8")
        sizes = [path.stat().st_size for path in target.rglob("*") if path.is_file()]
    return {**summary(export, run, out), "files": len(sizes), "bytes": sum(sizes), "movement_kept": kept}


def summary(export: ExportPlan, run: Path, out: Path) -> dict[str, Any]:
    """What `rats export --dry-run` prints; without --dry-run more is added."""
    return {
        "out": str(out),
        "run": str(run),
        "variant": export.record.variant,
        "nfe": list(export.record.nfe),
        "parts": [*export.parts, CARD, CALL],
        "call": export.call,
        "sigmas": {str(steps): list(sigmas) for steps, sigmas in export.sigmas.items()},
        "push": f"hf upload USER/NAME {out} .",
    }


def _write_pipeline(model: Model, student: Path, folder: Path) -> float:
    """The share of what training moved that is left in the pipeline's dtype."""
    log.info("loading the pipeline of %s", model.params.path)
    pipeline = model.open_pipeline(student)
    kept = merge_lora(pipeline.transformer) if is_lora(student) else share_in_pipeline(model, student)
    log.info("writing the pipeline")
    save_component(pipeline, folder)
    if kept < 0.5:
        dtype = model.params.dtype
        log.warning("in %s the pipeline keeps %.2g of what training moved: --set model.dtype=float32", dtype, kept)
    return kept


def share_in_pipeline(model: Model, student: Path) -> float:
    """Share of what training moved that the pipeline's dtype keeps of a whole network (`pipeline.weights.movement`)."""
    if model.params.dtype == "float32":
        return 1.0
    files = sorted(student.glob("*.safetensors"))  # one at a time in memory
    trained = (named for file in files for named in read_state(file).items())
    return share_kept(model.base_network().state_dict(), trained)


def _check_call(model: Model, run: Path, record: RunRecord) -> None:
    """The pipeline must be called as in training."""
    for name, (there, here) in changed_call(model, record).items():
        raise ConfigError(
            f"{run} was trained with teacher.{name} = {there}, the parameters have {here}: "
            f"add --set teacher.{name}={there}"
        )


def _check_out(out: Path) -> None:
    names = {path.name for path in out.iterdir()} if out.is_dir() else set()
    other = names and not {CARD, CALL} <= names <= EXPORTED
    if other or (out.exists() and not out.is_dir()):
        raise CannotCreateError(f"{out} holds something else than an export; choose another folder or empty it")
