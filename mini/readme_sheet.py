"""The README's picture from an evaluation: `python -m mini.readme_sheet PICTURES OUT`.

PICTURES is the `pictures.safetensors` that `rats stage evaluate` leaves beside its cells.
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib.pyplot as plt

from rats.stages.measure.pictures import SystemLabel, load_pictures

ROWS = (("teacher", 50, ""), ("base_guided", 3, ""), ("base_unguided", 3, ""), ("student", 3, "rats"))
NAMES = {"teacher": "teacher", "base_guided": "base, guided", "base_unguided": "base", "student": "student"}


def label(column: SystemLabel) -> str:
    """What a row is and what it costs."""
    return f"{NAMES[column.system]}\n{column.nfe} steps\n{column.evaluations} evaluations"


def draw(pictures: Path, out: Path) -> None:
    """A row a system, a column a prompt; the samples are those that the evaluation picked by seed."""
    shown = load_pictures(pictures)
    columns = [c for wanted in ROWS for c in shown.columns if (c.system, c.nfe, c.variant) == wanted]
    size = (len(columns), len(shown.prompts))
    figure, axes = plt.subplots(*size, figsize=(1.1 * size[1] + 1, 1.1 * size[0] + 0.5), squeeze=False)
    for row, column in enumerate(columns):
        for place, prompt in enumerate(shown.prompts):
            axis = axes[row][place]
            axis.imshow(shown.side[column.id][place], interpolation="nearest")
            axis.set(xticks=[], yticks=[])
            if row == 0:
                axis.set_title(prompt.replace(", ", ",\n"), fontsize=7)
        axes[row][0].set_ylabel(label(column), fontsize=7, rotation=0, ha="right", va="center")
    figure.tight_layout(pad=0.3)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=100, bbox_inches="tight", metadata={"Software": None})


if __name__ == "__main__":
    draw(Path(sys.argv[1]), Path(sys.argv[2]))
