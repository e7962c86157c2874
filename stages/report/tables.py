"""Turns cells and values into the tables of the report's page: pure functions without files and pictures."""

from __future__ import annotations

import csv
import io
import math
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from rats.schemas.reports import Cell
from rats.stages.measure.intervals import PairedEstimate
from rats.stages.measure.values import Values
from rats.stages.templates.render import PageData

MARKS = {"good": "✓", "even": "≈", "bad": "✗"}
LOWER_IS_BETTER = frozenset({"kid", "kid open-nsfw"})
NAMES = {"kid": "KID", "kid open-nsfw": "KID open-nsfw"}
"""Metrics that a reader knows by another name."""
JUDGE_TOLERANCE = 0.1
"""What a judge measures, such as KID and diversity, may be worse than the teacher's by this share."""


def decimals(cells: Sequence[Cell]) -> dict[str, int]:
    """Decimals by metric: two digits of the median half-width of its intervals."""
    by_metric: dict[str, list[float]] = {}
    for cell in cells:
        widths = by_metric.setdefault(cell.metric, [])
        low, high = cell.ci_low, cell.ci_high
        if low is not None and high is not None and high > low:
            widths.append((high - low) / 2)
    return {metric: _decimals(widths) for metric, widths in by_metric.items()}


def _decimals(widths: Sequence[float]) -> int:
    """From 0 to 6; 3 if there is no interval."""
    if not widths:
        return 3
    exponent = math.floor(math.log10(float(np.median(widths))))
    # one decimal more than the first digit's place gives two digits
    return max(0, min(6, 1 - exponent))


def number(value: float, places: int, sign: bool = False) -> str:
    """A number as text, with a true minus sign, and never a negative zero."""
    rounded = round(value, places) + 0.0  # adding 0.0 turns -0.0 into 0.0
    flag = "+" if sign else ""
    return f"{rounded:{flag}.{places}f}".replace("-", "−")


def interval(low: float | None, high: float | None, places: int, sign: bool = False) -> str:
    """`[low, high]`, or nothing where there is none."""
    if low is None or high is None:
        return ""
    return f"[{number(low, places, sign)}, {number(high, places, sign)}]"


def tone(low: float | None, high: float | None, metric: str) -> str:
    """Whether an interval of a difference lies on the better side of zero (good), the worse (bad), or both (even)."""
    if low is None or high is None:
        return "even"
    if metric in LOWER_IS_BETTER:
        low, high = -high, -low
    if low > 0:
        return "good"
    return "bad" if high < 0 else "even"


def full_table(cells: Sequence[Cell], main: str) -> PageData:
    """All systems in rows, by NFE and the teacher first; one column for each metric."""
    places = decimals(cells)
    roles: dict[str, str] = {}
    by_row: dict[tuple[str, str, int], dict[str, Cell]] = {}
    for cell in cells:
        # the first cell's role, the teacher's: a variant may train on another reward
        roles.setdefault(cell.metric, cell.role)
        by_row.setdefault((cell.system, cell.variant, cell.nfe), {})[cell.metric] = cell

    def row(found: dict[str, Cell]) -> PageData:
        first = next(iter(found.values()))
        return {
            "name": system_name(first),
            "evaluations": first.evaluations,
            "cells": [_cell_data(found[metric], places[metric]) if metric in found else None for metric in roles],
            "main": first.variant == main,
        }

    groups: dict[str, list[PageData]] = {}
    for (system, _, nfe), found in by_row.items():
        title = f"{nfe} steps, the teacher" if system == "teacher" else f"{nfe} steps"
        groups.setdefault(title, []).append(row(found))
    heads = [_head(metric, role) for metric, role in roles.items()]
    _mark_best([row["cells"] for rows in groups.values() for row in rows], list(roles))
    return {"metrics": heads, "groups": [{"name": name, "rows": rows} for name, rows in groups.items()]}


def _mark_best(rows: Sequence[Sequence[PageData | None]], metrics: Sequence[str]) -> None:
    for metric, column in zip(metrics, zip(*rows, strict=True), strict=True):
        found = [entry for entry in column if entry is not None]
        best = (min if metric in LOWER_IS_BETTER else max)(entry["mean"] for entry in found)
        for entry in found:
            entry["best"] = entry["mean"] == best


def _head(metric: str, role: str) -> PageData:
    arrow = "↓" if metric in LOWER_IS_BETTER else "↑"
    return {"name": NAMES.get(metric, metric), "role": role.replace("_", " "), "arrow": arrow}


def _cell_data(cell: Cell, places: int) -> PageData:
    entry: PageData = {
        "mean": cell.mean,
        "value": number(cell.mean, places),
        "interval": interval(cell.ci_low, cell.ci_high, places),
    }
    entry |= {"delta": "", "tone": "even"}
    if cell.delta_vs_teacher is not None:
        delta = number(cell.delta_vs_teacher, places, sign=True)
        entry["delta"] = f"{delta} {interval(cell.delta_ci_low, cell.delta_ci_high, places, sign=True)}"
        entry["tone"] = tone(cell.delta_ci_low, cell.delta_ci_high, cell.metric)
    return entry


def cells_csv(cells: Sequence[Cell]) -> str:
    """All cells as CSV, in full precision."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, list(Cell.model_fields), lineterminator="\n")
    writer.writeheader()
    writer.writerows(cell.model_dump() for cell in cells)
    return buffer.getvalue()


def system_name(cell: Cell) -> str:
    """The system's name in words."""
    names = {"teacher": "teacher", "base_guided": "untrained, guided", "base_unguided": "untrained, unguided"}
    return names.get(cell.system, f"student: {cell.variant}")


def claims(cells: Sequence[Cell], values: Values, main: str) -> PageData:
    """The claims, one row for each student: rewards, KID and diversity against the teacher, and against the base."""
    metrics = list(dict.fromkeys((cell.metric, cell.role) for cell in cells))
    rewards = [metric for metric, role in metrics if role != "judge"]
    places = decimals(cells)
    teacher = {cell.metric: cell for cell in cells if cell.system == "teacher"}
    students: dict[tuple[str, int], dict[str, Cell]] = {}
    for cell in cells:
        if cell.system == "student":
            students.setdefault((cell.variant, cell.nfe), {})[cell.metric] = cell
    rows = []
    for (variant, nfe), found in students.items():
        claimed = [_claim(found[m], teacher[m], places[m]) if m in found else NO_CLAIM for m, _ in metrics]
        claimed.append(_above_base(variant, nfe, rewards, values))
        name = {"name": f"{variant}, {nfe} NFE", "variant": variant, "nfe": nfe}
        rows.append({**name, "claims": claimed, "main": variant == main})
    columns = [f"{metric} ({role.replace('_', ' ')})" for metric, role in metrics]
    judged = [teacher[metric] for metric, role in metrics if role == "judge"]
    return {"columns": [*columns, "untrained base, guided"], "rows": rows, "rules": _rules(judged, places)}


def _rules(judged: Sequence[Cell], places: Mapping[str, int]) -> list[str]:
    """What a tick stands for, with the limits that follow from the teacher's values."""
    rules = [
        "On a reward: ✓ where the whole interval of the difference to the teacher is above zero, ✗ where it is below, "
        "≈ where it holds zero.",
        "On the untrained base: ✓ where the interval of the difference to it is above zero on every reward, ≈ where "
        "every difference is.",
    ]
    if judged:
        limits = " and ".join(f"{NAMES.get(t.metric, t.metric)} {_limit(t, places[t.metric])}" for t in judged)
        worse = f"at most {JUDGE_TOLERANCE * 100:.0f} % worse than the teacher's ({limits})"
        rules.append(f"On a judge: ✓ where the mean is {worse}; the interval does not count.")
    return rules


def _limit(teacher: Cell, places: int) -> str:
    allowed = JUDGE_TOLERANCE * abs(teacher.mean)
    if teacher.metric in LOWER_IS_BETTER:
        return f"at most {number(teacher.mean + allowed, places)}"
    return f"at least {number(teacher.mean - allowed, places)}"


NO_CLAIM: PageData = {"tone": "even", "mark": "–", "text": "", "short": "", "detail": ""}
"""For a metric that a student has no cell of."""


def _claim(cell: Cell, teacher: Cell, places: int) -> PageData:
    span = interval(cell.delta_ci_low, cell.delta_ci_high, places, sign=True)
    detail = f"{number(cell.delta_vs_teacher or 0.0, places, sign=True)} {span}"
    if cell.role == "judge":
        return {**within_a_tenth(cell, teacher), "detail": detail}
    verdict = tone(cell.delta_ci_low, cell.delta_ci_high, cell.metric)
    words = {"good": "beats the teacher", "even": "level with it", "bad": "below the teacher"}
    return {"tone": verdict, "mark": MARKS[verdict], "text": words[verdict], "short": "", "detail": detail}


def within_a_tenth(cell: Cell, teacher: Cell) -> PageData:
    """Whether the mean is worse than the teacher's by at most a tenth; the interval is only printed."""
    worse = teacher.mean - cell.mean
    if cell.metric in LOWER_IS_BETTER:
        worse = -worse
    if teacher.mean:
        share = worse / abs(teacher.mean)
    elif worse > 0:
        share = math.inf
    else:
        share = 0.0
    verdict = "good" if share <= JUDGE_TOLERANCE else "bad"
    words = f"{abs(share) * 100:.0f} % {'worse' if share > 0 else 'better'}"
    return {"tone": verdict, "mark": MARKS[verdict], "text": words, "short": words}


def _above_base(variant: str, nfe: int, rewards: Sequence[str], values: Values) -> PageData:
    """The student against the guided base: good if it is significantly above on all rewards, even if above on all."""
    found = [values.versus(f"{variant}-{nfe}", f"base_guided-{nfe}", metric) for metric in rewards]
    known = [result for result in found if result is not None]
    surely = sum(result.delta_ci[0] > 0 for result in known)
    verdict = "bad"
    if surely == len(rewards):
        verdict = "good"
    elif known and all(result.delta > 0 for result in known):
        verdict = "even"
    text = f"above it on {surely} of {len(rewards)} rewards"
    return {"tone": verdict, "mark": MARKS[verdict], "text": text, "short": text, "detail": ""}


def against_controls(values: Values, cells: Sequence[Cell], variants: Sequence[str]) -> PageData | None:
    """Differences of the main variant to each other variant, on each reward."""
    places, rewards = decimals(cells), _rewards(cells)
    main, *others = variants
    rows = []
    for steps in sorted({cell.nfe for cell in cells if cell.system == "student"}):
        for other in others:
            found = {m: values.versus(f"{main}-{steps}", f"{other}-{steps}", m) for m in rewards}
            if any(found.values()):
                rows.append({"name": f"{steps} NFE: {main} − {other}", "cells": _differences(found, places)})
    return {"columns": rewards, "rows": rows} if rows else None


def by_kind(values: Values, cells: Sequence[Cell], main: str) -> PageData | None:
    """The main variant against the teacher, by kind of prompt."""
    places, rewards = decimals(cells), _rewards(cells)
    nfe = sorted({cell.nfe for cell in cells if cell.system == "student" and cell.variant == main})
    counts = Counter(kind for kind in values.kinds.values() if kind)
    if len(counts) < 2:
        return None
    rows = []
    for kind, count in sorted(counts.items()):
        for steps in nfe:
            found = {m: values.versus(f"{main}-{steps}", "teacher", m, kind) for m in rewards}
            if any(found.values()):
                rows.append({"name": f"{kind} ({count}), {steps} NFE", "cells": _differences(found, places)})
    return {"columns": rewards, "rows": rows} if rows else None


def _rewards(cells: Sequence[Cell]) -> list[str]:
    return list(dict.fromkeys(c.metric for c in cells if c.role != "judge"))


def _differences(found: Mapping[str, PairedEstimate | None], places: Mapping[str, int]) -> list[PageData | None]:
    return [None if result is None else _difference(metric, result, places[metric]) for metric, result in found.items()]


def _difference(metric: str, result: PairedEstimate, places: int) -> PageData:
    return {
        "value": number(result.delta, places, sign=True),
        "interval": interval(*result.delta_ci, places, sign=True),
        "tone": tone(*result.delta_ci, metric),
    }
