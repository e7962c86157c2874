"""The README's picture from an evaluation: `python -m mini.readme_sheet WORK PROMPTS PICTURES OUT`.

WORK is the build's folder with the real drawings, PROMPTS the evaluation's .csv, PICTURES the `pictures.safetensors`
that `rats stage evaluate` leaves beside its cells.
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from mini.concepts import CONCEPTS, STYLES
from mini.workplace import Workplace
from rats.stages.measure.pictures import Pictures, SystemLabel, load_pictures

ROWS = (("teacher", 50, ""), ("base_guided", 3, ""), ("student", 3, "rats"))
NAMES = {"teacher": "teacher", "base_guided": "base", "student": "student"}


def label(column: SystemLabel) -> str:
    """What a row is and what it costs."""
    return f"{NAMES[column.system]}\n{column.evaluations} evaluations"


def real_drawings(work: Path, prompts: Path, shown: list[str]) -> list[np.ndarray]:
    """A drawing of what each shown prompt names, by the designer that it names, or else by the first."""
    with prompts.open(newline="") as file:
        concept_of = {row["prompt"]: row["concept"] for row in csv.DictReader(file)}
    place = {concept.name: index for index, concept in enumerate(CONCEPTS)}
    pictures = Workplace(work).pictures
    return [pictures[place[concept_of[prompt]], _style(prompt), 0] for prompt in shown]


def _style(prompt: str) -> int:
    named = [index for index, style in enumerate(STYLES) if prompt.endswith(f"{style} style")]
    return named[0] if named else 0


def rows_of(shown: Pictures, real: list[np.ndarray]) -> dict[str, list[np.ndarray]]:
    """Pictures by the row's label, the real ones first."""
    columns = [c for wanted in ROWS for c in shown.columns if (c.system, c.nfe, c.variant) == wanted]
    return {"real": real} | {label(column): list(shown.side[column.id]) for column in columns}


def draw(rows: dict[str, list[np.ndarray]], prompts: list[str], out: Path) -> None:
    """A column a prompt; the samples are those that the evaluation picked by seed."""
    size = (len(rows), len(prompts))
    figure, axes = plt.subplots(*size, figsize=(1.28 * size[1] + 1, 1.28 * size[0] + 0.5), squeeze=False)
    for row, (name, pictures) in enumerate(rows.items()):
        for axis, picture in zip(axes[row], pictures, strict=True):
            axis.imshow(picture, interpolation="lanczos")
            axis.set(xticks=[], yticks=[])
        axes[row][0].set_ylabel(name, fontsize=8, rotation=0, ha="right", va="center")
    for axis, prompt in zip(axes[0], prompts, strict=True):
        axis.set_title(prompt.replace(", ", ",\n"), fontsize=8)
    figure.tight_layout(pad=0.3)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=100, bbox_inches="tight", metadata={"Software": None})


def main(work: Path, prompts: Path, pictures: Path, out: Path) -> None:
    """Draws the sheet."""
    shown = load_pictures(pictures)
    draw(rows_of(shown, real_drawings(work, prompts, shown.prompts)), shown.prompts, out)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
