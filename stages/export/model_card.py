"""The model card of an exported student: what it is, how to call it, how it was trained, and its results."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from inspect import signature
from pathlib import Path
from typing import Any

from diffusers import FlowMatchEulerDiscreteScheduler
from huggingface_hub import ModelCard, ModelCardData
from pydantic import ValidationError

from rats.pipeline.families.base import EULER
from rats.pipeline.families.open import Model
from rats.pipeline.weights.folder import FoundLora
from rats.pipeline.weights.hashes import hash_content
from rats.pipeline.weights.lora import COMFYUI, WEIGHTS
from rats.schemas.errors import DataError, reason
from rats.schemas.reports import Cell, EvaluateReport
from rats.schemas.run import RunRecord
from rats.stages.templates.render import Markdown, code, literal, quoted, render

log = logging.getLogger(__name__)


def model_card(
    model: Model,
    record: RunRecord,
    parts: Sequence[str],
    sigmas: Mapping[int, Sequence[float]],
    kept: float | None,
    evaluation: Path,
    leaks: Sequence[str] = (),
) -> str:
    """README.md of the exported folder.

    Args:
        model: What the run started from.
        record: The run's.
        parts: "lora", "pipeline" or both.
        sigmas: The grid of each number of steps, down to 0.
        kept: Share of what training moved that the pipeline's dtype keeps; None without a pipeline.
        evaluation: evaluate.json; passed over where it is not there or of another student.
        leaks: What held-out prompts share with those it was trained on, a sentence each.
    """
    named, is_video = model.params, model.family.is_video
    hub = None if Path(named.path).exists() else named.path
    base = hub or Path(named.path).name
    context = {
        "card_data": Markdown(_data(hub, "lora" in parts, is_video).to_yaml()),
        "title": f"{base} in {any_of(record.nfe)} steps",
        "steps": any_of(record.nfe),
        "base": base,
        "base_quoted": quoted(base),
        "drawn": ("video", "frames") if is_video else ("image", "images"),
        "nfe": record.nfe,
        "scheduler": _other_scheduler(model),
        "parts": parts,
        "sigmas": {steps: ", ".join(f"{sigma:.6g}" for sigma in grid) for steps, grid in sigmas.items()},
        "takes_sigmas": "sigmas" in signature(model.family.pipeline_class.__call__).parameters,
        "kept": kept,
        "weights": quoted(WEIGHTS),
        "comfyui": Markdown(COMFYUI),
        "dtype": named.dtype,
        "is_exchanged": named.transformer is not None,
        "loras": [_lora(lora) for lora in model.folder.loras],
        "run": [*_run_rows(record), *_lora_rows(model.folder.loras)],
        "leaks": [one[0].upper() + one[1:] for one in leaks],
        "cells": [_cell_row(cell) for cell in own_cells(record, evaluation)],
    }
    return str(ModelCard(render("model_card.md.j2", context)))


def any_of(numbers: Sequence[int]) -> str:
    """In words: "3, 5 or 8"."""
    *others, last = map(str, numbers)
    return f"{', '.join(others)} or {last}" if others else last


def own_cells(record: RunRecord, evaluation: Path) -> list[Cell]:
    """The evaluation's cells of this student. If it is of another student: none, and a warning."""
    if not evaluation.is_file():
        return []
    try:
        report = EvaluateReport.model_validate_json(evaluation.read_bytes())
    except (OSError, ValidationError) as error:
        raise DataError(f"{evaluation} is no evaluation ({reason(error)}): run `rats stage evaluate` again") from None
    if report.students.get(record.variant) != record.student:
        log.warning("%s is not of this student and stays off the card: run `rats stage evaluate`", evaluation)
        return []
    return [cell for cell in report.cells if cell.system == "student" and cell.variant == record.variant]


def _other_scheduler(model: Model) -> str | None:
    """Python code for the family's scheduler, if it differs from the base model's; else None."""
    if model.folder.scheduler_config.get("_class_name", EULER) == EULER:
        return None
    config = model.scheduler().config
    plain = FlowMatchEulerDiscreteScheduler().config
    changed = (f"{name}={value!r}" for name, value in config.items() if name in plain and plain[name] != value)
    return Markdown(f"{EULER}({', '.join(changed)})")


def _data(hub: str | None, adapter: bool, is_video: bool) -> ModelCardData:
    relation: dict[str, Any] = {"base_model_relation": "adapter" if adapter else "finetune"} if hub else {}
    tags = ["rats", "distillation", "few-step", *(["lora"] if adapter else [])]
    task = "text-to-video" if is_video else "text-to-image"
    return ModelCardData(base_model=hub, library_name="diffusers", pipeline_tag=task, tags=tags, **relation)


def _run_rows(record: RunRecord) -> list[tuple[str, str]]:
    """Rows of the card about the run, from `run.json`."""
    gate = "none yet" if record.gate_mean is None else f"{record.gate_mean:.3f}"
    return [
        ("variant", code(record.variant)),
        ("training steps", str(record.steps)),
        ("student's steps", ", ".join(map(str, record.nfe))),
        ("trained reward", Markdown(f"{literal(record.reward)} ({_short(record.reward_fingerprint)})")),
        ("gate", f"{record.gate_form}, tau {record.tau:.4g}, mean over training {gate}"),
        ("samples", f"{record.samples} stored trajectories, {record.samples_unscored} without a score"),
        ("shards", Markdown(f"recipe {code(record.recipe[:12])}, snapshot {code(record.snapshot[:12])}")),
        ("started from", Markdown(f"network {code(record.base[:12])}")),
        ("this student", code(record.student[:12])),
        ("training time", f"{record.seconds:.0f} s"),
    ]


def _lora(lora: FoundLora) -> dict[str, Any]:
    """Where a reader finds a LoRA of the base: on the hub, or else under its file's name."""
    is_here = Path(lora.pinned.path).exists()
    place = Path(lora.path.name) if is_here else Path(lora.pinned.path)
    repository = "." if is_here else "/".join(place.parts[:2])
    return {"repository": quoted(repository), "file": quoted(lora.path.name), "weight": lora.pinned.weight}


def _lora_rows(loras: Sequence[FoundLora]) -> list[tuple[str, str]]:
    hashed = [(lora, code(hash_content(lora.path)[:12])) for lora in loras]
    said = (f"{code(lora.path.name)} ({short}) at {lora.pinned.weight:g}" for lora, short in hashed)
    return [("LoRA in it", Markdown(text)) for text in said]


def _short(hashes: str) -> str:
    """One hash, or several with " + " between them."""
    return " + ".join(code(one[:12]) for one in hashes.split(" + "))


def _cell_row(cell: Cell) -> dict[str, Any]:
    return {
        "metric": cell.metric,
        "role": cell.role.replace("_", " "),
        "nfe": cell.nfe,
        "mean": _figure(cell.mean, cell.ci_low, cell.ci_high),
        "delta": _figure(cell.delta_vs_teacher, cell.delta_ci_low, cell.delta_ci_high),
        "prompts": f"{cell.num_prompts} {cell.split}",
    }


def _figure(mean: float | None, low: float | None, high: float | None) -> str:
    if mean is None:
        return ""
    interval = "" if low is None or high is None else f" [{low:.4g}, {high:.4g}]"
    return Markdown(f"{mean:.4g}{interval}")
