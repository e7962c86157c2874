"""`rats export`: a run's student as a folder that plain diffusers loads and calls, without rats."""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rats.pipeline.families.open import Model
from rats.pipeline.files.atomic import atomic_folder
from rats.pipeline.weights.hashes import NETWORK
from rats.pipeline.weights.loading import save_component
from rats.pipeline.weights.lora import is_lora, merge_lora
from rats.schemas.errors import CannotCreateError, ConfigError, DataError
from rats.schemas.params import Params
from rats.schemas.recipe import DECODER
from rats.schemas.run import RunRecord
from rats.stages.export.model_card import model_card
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


def plan_export(model: Model, run: Path, out: Path, merged: bool = True) -> ExportPlan:
    """Checks everything that can be wrong before anything is loaded or written; see `export_stage`."""
    record = read_record(run)
    student = checked_student(run, record)
    if not merged and not is_lora(student):
        raise ConfigError(f"{run} trained the whole network and has no adapters: leave out --no-merged")
    _check_model(model, run, record, student)
    _check_call(model, run, record)
    _check_out(out)
    parts = ((LORA,) if is_lora(student) else ()) + ((PIPELINE,) if merged else ())
    return ExportPlan(record, student, parts, model.call())


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
    model = Model.of(params)
    export = plan_export(model, run, out, merged)
    with atomic_folder(out) as target:
        if LORA in export.parts:
            shutil.copytree(export.student, target / LORA)
        if PIPELINE in export.parts:
            _write_pipeline(model, export.student, target / PIPELINE)
        (target / CALL).write_text(json.dumps(export.call, indent=1, sort_keys=True) + "\n")
        card = model_card(model, export.record, export.parts, evaluation)
        (target / CARD).write_text(card, encoding="utf-8")
        sizes = [path.stat().st_size for path in target.rglob("*") if path.is_file()]
    return {**summary(export, run, out), "files": len(sizes), "bytes": sum(sizes)}


def summary(export: ExportPlan, run: Path, out: Path) -> dict[str, Any]:
    """What `rats export --dry-run` prints; without --dry-run more is added."""
    return {
        "out": str(out),
        "run": str(run),
        "variant": export.record.variant,
        "nfe": list(export.record.nfe),
        "parts": [*export.parts, CARD, CALL],
        "call": export.call,
        "push": f"hf upload USER/NAME {out} .",
    }


def _write_pipeline(model: Model, student: Path, folder: Path) -> None:
    log.info("loading the pipeline of %s", model.params.path)
    pipeline = model.open_pipeline(student)
    if is_lora(student):
        merge_lora(pipeline.transformer)
    log.info("writing the pipeline")
    save_component(pipeline, folder)


def _check_model(model: Model, run: Path, record: RunRecord, student: Path) -> None:
    """The decoder must be the one of the run. For adapters, so must the network that they were trained on."""
    expected = {DECODER: record.vae} | ({NETWORK: record.base} if is_lora(student) else {})
    for name, there in expected.items():
        if (here := model.folder.hash_of(name)) != there:
            part = model.folder.parts(name)[name]
            raise DataError(
                f"{run} was trained with another {part.name}: {there[:12]} there, {here[:12]} in {part}: "
                "name the run's own model with --set model.path=DIR"
            )


def _check_call(model: Model, run: Path, record: RunRecord) -> None:
    """The pipeline must be called as in training. Records of older versions of rats do not say how."""
    for name, here in model.call().items():
        there = (record.call or {}).get(name, here)
        if there != here:
            raise ConfigError(
                f"{run} was trained with teacher.{name} = {there}, the parameters have {here}: "
                f"add --set teacher.{name}={there}"
            )


def _check_out(out: Path) -> None:
    names = {path.name for path in out.iterdir()} if out.is_dir() else set()
    other = names and not {CARD, CALL} <= names <= EXPORTED
    if other or (out.exists() and not out.is_dir()):
        raise CannotCreateError(f"{out} holds something else than an export; choose another folder or empty it")
