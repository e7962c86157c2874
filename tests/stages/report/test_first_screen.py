"""The first screen, its sheet and the terminal's table: what is said in one sentence, and which pictures are shown."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rats.schemas.errors import DataError
from rats.schemas.reports import Cell
from rats.stages.measure.pictures import Pictures, SystemLabel, load_pictures
from rats.stages.measure.values import Values, read_values
from rats.stages.report.report import read_evaluation, report_stage, verdicts
from rats.stages.report.showcase import Showcase, first_columns
from rats.stages.report.verdict import headline
from tests.stages.report.test_report import params, write_inputs

COLUMNS = [
    SystemLabel("teacher", "teacher", "", 50, 50),
    SystemLabel("base_guided-5", "base_guided", "", 5, 5),
    SystemLabel("base_guided-3", "base_guided", "", 3, 3),
    SystemLabel("mine-5", "student", "mine", 5, 5),
    SystemLabel("mine-3", "student", "mine", 3, 3),
]
GAINS = (0.4, -0.7, 2.5, -3.5, 0.2, 1.5, -0.3, 0.9)
METRICS = (("aesthetic", "held_out"), ("hpsv2", "trained"), ("pickscore", "held_out"), ("kid", "judge"))


def cell(column: SystemLabel, metric: str, role: str, mean: float, *delta: float) -> Cell:
    low, middle, high = delta or (None, None, None)
    return Cell(
        **{"system": column.system, "variant": column.variant, "nfe": column.nfe, "evaluations": column.evaluations},
        **{"metric": metric, "role": role, "split": "test", "mean": mean, "ci_low": mean - 0.2, "ci_high": mean + 0.2},
        **{"delta_vs_teacher": middle, "delta_ci_low": low, "delta_ci_high": high, "num_prompts": 8, "num_concepts": 4},
    )


def cells() -> list[Cell]:
    teacher, student = COLUMNS[0], COLUMNS[-1]
    found = [cell(teacher, metric, role, 3.0 + i) for i, (metric, role) in enumerate(METRICS)]
    deltas = ((-0.8, -0.5, -0.2), (0.3, 0.6, 0.9), (-0.1, 0.3, 0.7), (0.4, 0.5, 0.6))
    return found + [
        cell(student, metric, role, 3.0 + i + deltas[i][1], *deltas[i]) for i, (metric, role) in enumerate(METRICS)
    ]


def showcase() -> Showcase:
    keys = [f"key-{i}" for i in range(len(GAINS))]
    own = {key: 20.0 + gain for key, gain in zip(keys, GAINS, strict=True)}
    scores = {(column.id, "hpsv2"): dict.fromkeys(keys, 20.0) for column in COLUMNS} | {("mine-3", "hpsv2"): own}
    shown = Pictures(COLUMNS, [f"prompt {i}" for i in range(len(GAINS))], keys, [], 0, (8, 8))
    shown.side = {column.id: np.full((len(GAINS), 8, 8, 3), 7, np.uint8) for column in COLUMNS}
    return Showcase.of(shown, Values(scores, {}, {}), cells(), "mine")


def test_the_sentence_counts_what_is_above_level_and_below():
    said = "3 evaluations instead of 50: above its teacher on 1 of 3 rewards, level on 1, below on 1, KID 6.50"
    assert headline(cells(), "mine") == f"{said} (teacher 6.00); 1 of 1 judged values at most a tenth worse."


def test_the_pictures_are_the_largest_gains_and_the_largest_losses_by_the_trained_reward():
    show = showcase()
    assert show.metric == "hpsv2"
    assert show.order("mine-3") == [2, 5, 7, 0, 4, 6, 1, 3]
    assert show.ends("mine-3") == [2, 5, 7, 6, 1, 3]


def test_each_picture_has_its_score_and_its_gain_over_the_teachers():
    show = showcase()
    shots = show.shots(3, first_columns(show.pictures, "mine"))
    assert [(shot.name, shot.score, shot.gain, shot.tone) for shot in shots] == [
        ("teacher, 50 eval.", "20.00", "", "even"),
        ("untrained, 3 eval.", "20.00", "+0.00", "even"),
        ("mine, 3 eval.", "16.50", "−3.50", "bad"),
    ]


def test_the_sheet_has_each_picture_once_in_its_own_pixels(tmp_path: Path):
    evaluation = write_inputs(tmp_path)
    report_stage(params(tmp_path), evaluation, tmp_path / "runs", tmp_path / "page.html", tmp_path / "sheet.png")
    sheet = np.asarray(Image.open(tmp_path / "sheet.png").convert("RGB"))
    assert sheet.shape[1] > 6 * 160
    shown = Showcase.of(*_inputs(tmp_path), "rats")
    for column in first_columns(shown.pictures, "rats"):
        for picture in shown.pictures.side[column.id]:
            assert holds(sheet, picture.repeat(10, 0).repeat(10, 1))


def _inputs(folder: Path) -> tuple[Pictures, Values, tuple[Cell, ...]]:
    found = read_evaluation(folder / "evaluate.json").cells
    return load_pictures(folder / "pictures.safetensors"), read_values(folder / "values.csv"), found


def holds(sheet: np.ndarray, picture: np.ndarray) -> bool:
    """Whether the picture is somewhere on the sheet."""
    height, width, _ = picture.shape
    corners = np.argwhere((sheet[: 1 - height, : 1 - width] == picture[0, 0]).all(-1))
    return any((sheet[y : y + height, x : x + width] == picture).all() for y, x in corners)


def test_the_terminals_table_is_plain_ascii_and_has_every_claim(tmp_path: Path):
    lines = verdicts(params(tmp_path), write_inputs(tmp_path))
    text = "\n".join(lines)
    assert text.isascii() and lines[0].startswith("3 evaluations instead of 100: above its teacher on 3 of 3 rewards")
    for variant in ("rats", "constant"):
        (head,) = [line for line in lines if line.startswith(f"{variant} ")]
        assert head.split() == [variant, "3", "steps", "5", "steps"]
    assert sum(line.startswith("hpsv2 (trained)") for line in lines) == 2 and text.count("yes") > 12


@pytest.mark.parametrize("name", ["values.csv", "evaluate.json"])
def test_verdicts_without_an_evaluation_say_the_way_out(tmp_path: Path, name: str):
    evaluation = write_inputs(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(DataError, match="rats stage evaluate"):
        verdicts(params(tmp_path), evaluation)
