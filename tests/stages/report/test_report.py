"""The page: offline, whole, true to its numbers, and safe with any prompt."""

from __future__ import annotations

import base64
import csv
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import get_args

import numpy as np
import pytest

from rats.schemas.errors import ConfigError, DataError
from rats.schemas.evaluate_params import JudgeName
from rats.schemas.params import Params
from rats.schemas.reports import Cell, EvaluateReport, Made
from rats.schemas.run import RunRecord
from rats.stages.measure.intervals import paired_estimate
from rats.stages.measure.pictures import Pictures, SystemLabel, choose, load_pictures, save_pictures, to_picture
from rats.stages.measure.values import VALUE_COLUMNS
from rats.stages.report import figures, tables
from rats.stages.report.cost import cost_block, duration
from rats.stages.report.report import report_stage
from rats.stages.train.record import read_record
from rats.trainer import metrics

KEYS = [f"{i:024d}-0000" for i in range(24)]
CONCEPTS = ["cat", "dog", "owl", "crab", "star", "boat"]
SCORES = {"hpsv2": "trained", "pickscore": "held_out", "image-reward": "held_out"}
LIFT = {"teacher": 0.0, "base_guided": -0.6, "base_unguided": -0.9, "rats": 0.5, "constant": 0.3}
MADE = Made(date="2026-03-04 05:06 UTC", code="rats 7.8", machine="a loom, 9 cores", command="rats stage evaluate")
TRICKY = 'a cat, <b>bold</b> & "quoted"'


def params(folder: Path) -> Params:
    return Params.model_validate(
        {
            "model": {"path": "assets/teacher"},
            "prompts": {"train": str(folder / "test.csv")},
            "teacher": {"steps": 50, "true_cfg_scale": 2.5},
            "rewards": [{"name": name, "adapter": "pickscore", "path": f"assets/{name}"} for name in SCORES],
            "train": {"reward": "hpsv2", "steps": 40, "batch": 8},
            "variants": {"rats": {}, "constant": {"gate.form": "constant"}},
            "evaluate": {"variants": ["rats", "constant"]},
        }
    )


def columns() -> list[SystemLabel]:
    base = [
        SystemLabel(f"{system}-{nfe}", system, "", nfe, nfe * cost)
        for nfe in (3, 5)
        for system, cost in (("base_guided", 2), ("base_unguided", 1))
    ]
    students = [SystemLabel(f"{v}-{nfe}", "student", v, nfe, nfe) for v in ("rats", "constant") for nfe in (3, 5)]
    return [SystemLabel("teacher", "teacher", "", 50, 100), *base, *students]


def write_values(path: Path, keys: list[str]) -> dict[tuple[str, str], list[float]]:
    rng = np.random.default_rng(0)
    effect = {(metric, key): rng.normal() for metric in SCORES for key in keys}
    rows, found = [",".join(VALUE_COLUMNS)], {}
    for column in columns():
        for metric in SCORES:
            lift = LIFT[column.variant or column.system]
            found[column.id, metric] = [effect[metric, key] + lift + 0.1 * rng.normal() for key in keys]
            for i, (key, value) in enumerate(zip(keys, found[column.id, metric], strict=True)):
                kind = "open" if i % 2 else "style"
                rows.append(f"{column.id},{key},{key[:4]},{CONCEPTS[i % 6]},{kind},{metric},{value!r}")
    path.write_text("\n".join(rows) + "\n")
    return found


def make_cells(values: dict[tuple[str, str], list[float]]) -> list[Cell]:
    concepts = [CONCEPTS[i % 6] for i in range(24)]
    made = []
    for column in columns():
        for metric, role in (*SCORES.items(), ("kid", "judge")):
            own = values.get((column.id, metric), values[column.id, "hpsv2"])
            other = values.get(("teacher", metric), values["teacher", "hpsv2"])
            result = paired_estimate(own, other, concepts)
            delta = (None, None, None) if column.id == "teacher" else (result.delta, *result.delta_ci)
            made.append(
                Cell(
                    **{"system": column.system, "variant": column.variant, "nfe": column.nfe, "metric": metric},
                    **{"evaluations": column.evaluations, "role": role, "split": "test", "mean": result.mean},
                    **dict(zip(("ci_low", "ci_high"), result.ci, strict=True)),
                    **dict(zip(("delta_vs_teacher", "delta_ci_low", "delta_ci_high"), delta, strict=True)),
                    **{"num_prompts": 12, "num_concepts": 6},
                )
            )
    return made


def write_run(run: Path, lift: float, **changes: object) -> None:
    run.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(1)
    file = metrics.CsvLog(run / "metrics.csv", metrics.metrics_columns(5))
    for step in range(40):
        nfe = (3, 5)[step % 2]
        row = {"step": step, "nfe": nfe, "reward_teacher": 1 + 0.1 * rng.normal(), "gate_std": 0.1}
        row |= {"reward_student": 0.5 + lift * step / 40 + 0.1 * rng.normal(), "gate_mean": 0.7 - step / 80}
        row |= {f"loss_shape_k{k}": 0.1 * k / (1 + step / 20) for k in range(1, nfe + 1)}
        file.append(row | ({"grad_reward": 0.3, "grad_shape": 0.2, "grad_total": 0.4} if step % 10 == 0 else {}))
    write_record(run, **changes)


def write_record(run: Path, **changes: object) -> None:
    """run.json of a run over 40 steps."""
    needed = [name for name, field in RunRecord.model_fields.items() if field.is_required()]
    values = dict.fromkeys(needed, "ab" * 32) | {"steps": 40, "seconds": 61.5, "seconds_per_step": 1.5}
    values |= dict.fromkeys(("teacher_forwards", "teacher_reward_calls", "samples_unscored"), 0)
    values |= dict.fromkeys(("snapshot_number", "samples", "student_forwards", "threads"), 24)
    values |= {"nfe": [3, 5], "gate_form": "rats", "gate_mean": 0.41, "gate_value": None, "tau": 0.1, "call": None}
    (run / "run.json").write_text(RunRecord.model_validate(values | changes).model_dump_json())


def write_inputs(folder: Path) -> Path:
    """All that `report` reads, by the writers that the other stages use."""
    values = write_values(folder / "values.csv", KEYS)
    report = EvaluateReport(cells=tuple(make_cells(values)), snapshot="cd" * 32, seconds=12.0, made=MADE)
    (folder / "evaluate.json").write_text(report.model_dump_json())
    rng = np.random.default_rng(2)
    shown = Pictures(columns(), [TRICKY, "an owl"], KEYS[:2], ["a star"], 0, (16, 16))
    for column in columns():
        shown.side[column.id] = rng.integers(0, 255, (2, 16, 16, 3), np.uint8)
        shown.noises[column.id] = [rng.integers(0, 255, (3, 16, 16, 3), np.uint8)]
    save_pictures(folder / "pictures.safetensors", shown)
    write_run(folder / "runs/rats", 1.0)
    write_run(folder / "runs/constant", 0.6)
    rollout = {"samples": 24, "shards_total": 2, "shards_reused": 2, "teacher_forwards": 0, "seconds": 0.4}
    (folder / "rollout-test.json").write_text(json.dumps(rollout))
    return folder / "evaluate.json"


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("report")
    evaluation = write_inputs(folder)
    out, command = folder / "report.html", "rats stage report --here"
    return report_stage(params(folder), evaluation, folder / "runs", out, folder / "sheet.png", command).read_text()


class Outline(HTMLParser):
    """Collects what a reader's browser would load, and checks that tags close."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.sources: list[str] = []
        self.ids: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.sources += [value or "" for name, value in attrs if name in ("src", "href", "data")]
        self.ids += [value or "" for name, value in attrs if name == "id"]
        if tag not in ("meta", "img", "br", "link", "input"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def outline(page: str) -> Outline:
    parsed = Outline()
    parsed.feed(page)
    assert not parsed.open
    return parsed


def test_the_page_loads_nothing_from_elsewhere(page: str):
    sources = outline(page).sources
    assert len(sources) > 25 and all(source.startswith(("data:", "#")) for source in sources)
    assert "<script" not in page and not re.search(r"url\(|@import", page)


def test_every_link_leads_to_a_place_of_the_page_and_every_section_can_be_linked(page: str):
    found = outline(page)
    assert {source[1:] for source in found.sources if source.startswith("#")} == set(found.ids)
    assert len(found.ids) == len(set(found.ids)) == page.count("<h2") > 6


def test_the_table_can_be_taken_along_as_csv(page: str):
    (link, again) = re.findall(r'href="data:text/csv;base64,([^"]+)"', page)
    rows = list(csv.DictReader(io.StringIO(base64.b64decode(link).decode())))
    assert link == again and len(rows) == 9 * 4 and "rats" in {row["variant"] for row in rows}


def test_the_page_says_when_where_and_by_what(page: str):
    text = " ".join(outline(page).text)
    for word in (MADE.date, MADE.code, MADE.machine, MADE.command, "rats stage report --here"):
        assert word in text


def test_the_best_value_of_each_metric_is_marked_once(page: str):
    assert page.count("★") == 4 + 1  # of four metrics, and in the note that says so


def test_a_tick_says_its_tolerance(tmp_path: Path, page: str):
    cells = make_cells(write_values(tmp_path / "values.csv", KEYS))
    teacher = next(cell for cell in cells if (cell.system, cell.metric) == ("teacher", "kid"))
    limit = tables.number(teacher.mean + 0.1 * abs(teacher.mean), tables.decimals(cells)["kid"])
    assert f"at most 10 % worse than the teacher&#39;s (KID at most {limit})" in page


def test_a_prompt_with_markup_is_shown_as_text(page: str):
    assert "<b>bold</b>" not in page
    assert TRICKY in "".join(outline(page).text)


def test_all_sections_of_the_issue_are_there(page: str):
    text = " ".join(outline(page).text)
    for heading in ("All systems", "Variety", "Training", "reused", "against its controls", "kind of prompt"):
        assert heading in text, heading
    assert "100" in text and "untrained, guided" in text and "student: constant" in text


def test_the_verdicts_follow_the_intervals(page: str):
    text = " ".join(" ".join(outline(page).text).split())
    assert "beats the teacher" in text and "above it on 3 of 3 rewards" in text
    assert "level with it" not in text and "below the teacher" not in text


def test_the_cost_counts_what_a_live_teacher_would_have_run(page: str):
    text = " ".join(" ".join(outline(page).text).split())
    assert "2 training runs read 640 teacher trajectories" in text
    assert "ran 0 times" in text and "64,000 teacher evaluations more" in text


def test_the_cost_says_where_a_run_does_not_know_its_own(tmp_path: Path):
    write_record(tmp_path, teacher_forwards=None, teacher_reward_calls=12)
    block = cost_block(params(tmp_path), {"rats": read_record(tmp_path)}, {})
    assert "the teacher ran ? times and 12 of its samples" in block["summary"]


def test_the_same_inputs_give_the_same_bytes(tmp_path: Path, page: str):
    out, command = tmp_path / "report.html", "rats stage report --here"
    again = report_stage(params(tmp_path), write_inputs(tmp_path), tmp_path / "runs", out, command=command)
    assert again.read_text().replace(str(tmp_path), "") == re.sub(r"/\S*?/report\d+", "", page)


@pytest.mark.parametrize(
    "name", ["evaluate.json", "values.csv", "pictures.safetensors", "runs/rats/metrics.csv", "runs/rats/run.json"]
)
@pytest.mark.parametrize("damage", [lambda path: path.unlink(), lambda path: path.write_bytes(path.read_bytes()[:40])])
def test_a_missing_or_cut_input_is_one_line_with_the_way_out(tmp_path: Path, name: str, damage):
    evaluation = write_inputs(tmp_path)
    damage(tmp_path / name)
    with pytest.raises((ConfigError, DataError), match="(?s)run |train ") as caught:
        report_stage(params(tmp_path), evaluation, tmp_path / "runs", tmp_path / "report.html")
    assert Path(name).parent.name in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "report.html").exists()


def test_pictures_survive_their_file_to_the_bit(tmp_path: Path):
    write_inputs(tmp_path)
    first = load_pictures(tmp_path / "pictures.safetensors")
    save_pictures(tmp_path / "again.safetensors", first)
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "pictures.safetensors").read_bytes()
    assert first.prompts == [TRICKY, "an owl"] and first.size == (16, 16)


def test_pictures_are_chosen_one_a_concept_before_a_second_of_any():
    concepts = [c for c in CONCEPTS for _ in range(4)]
    prompts = [f"{c}{i // 2}" for c in CONCEPTS for i in range(4)]
    choice = choose(concepts, prompts, 6, seed=3)
    assert len({concepts[i] for i in choice.side}) == 6
    assert [len(group) for group in choice.noises] == [2, 2, 2]
    assert all(len({prompts[i] for i in group}) == 1 for group in choice.noises)
    assert choose(concepts, prompts, 6, seed=3) == choice != choose(concepts, prompts, 6, seed=4)


def test_more_pictures_than_samples_are_all_of_them():
    assert sorted(choose(["a", "b"], ["p", "q"], 9, seed=0).side) == [0, 1]


def test_a_large_picture_is_shrunk_and_a_small_one_is_kept():
    assert to_picture(np.zeros((3, 512, 256), np.float32)).shape == (256, 128, 3)
    assert to_picture(np.full((3, 8, 8), 0.5, np.float32)).tolist() == [[[128] * 3] * 8] * 8


def test_a_lower_kid_is_the_better_one():
    assert tables.tone(-2.0, -1.0, "kid") == "good" and tables.tone(-2.0, -1.0, "hpsv2") == "bad"
    assert tables.tone(-1.0, 1.0, "kid") == "even"


@pytest.mark.parametrize("judge", get_args(JudgeName))
def test_a_lower_kid_is_the_better_one_by_whichever_judge_is_the_second(judge: str):
    assert tables.tone(-2.0, -1.0, f"kid {judge}") == "good" and tables.shown(f"kid {judge}") == f"KID {judge}"
    assert tables.tone(-2.0, -1.0, f"recognition {judge}") == "bad"


def test_numbers_have_true_minus_signs_and_no_negative_zero():
    assert tables.number(-0.0004, 2, sign=True) == "+0.00"
    assert tables.number(-1.5, 2) == "−1.50"


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.44, "0.4 s"), (61.5, "1 min 02 s"), (7500, "2 h 05 min"), (None, "–")]
)
def test_durations_read_as_people_say_them(seconds: float | None, words: str):
    assert duration(seconds) == words


def test_the_running_mean_keeps_a_constant_and_a_length():
    assert figures.smooth(np.full(7, 2.0), 4).tolist() == [2.0] * 7
