"""From cells and values to what the report's page prints: pure functions, no files, no pictures."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from rats.schemas.reports import Cell
from rats.stages.measure.bootstrap import Paired
from rats.stages.measure.values import Values
from rats.stages.templates.render import Entry

MARKS = {"good": "✓", "even": "≈", "bad": "✗"}
LOWER_IS_BETTER = frozenset({"kid"})
TOLERANCE = 0.1
"""KID and diversity may be worse than the teacher's by a tenth."""


def decimals(cells: Sequence[Cell]) -> dict[str, int]:
    """Decimals by metric: two digits of the median half-width of its intervals."""
    found = {}
    for metric in dict.fromkeys(cell.metric for cell in cells):
        spans = [(c.ci_low, c.ci_high) for c in cells if c.metric == metric]
        widths = [(high - low) / 2 for low, high in spans if low is not None and high is not None and high > low]
        found[metric] = max(0, min(6, 1 - math.floor(math.log10(float(np.median(widths)))))) if widths else 3
    return found


def number(value: float, places: int, sign: bool = False) -> str:
    """With a true minus sign; never a negative zero."""
    rounded = round(value, places) + 0.0
    return f"{rounded:{'+' if sign else ''}.{places}f}".replace("-", "−")


def interval(low: float | None, high: float | None, places: int, sign: bool = False) -> str:
    """`[low, high]`, or nothing where there is none."""
    if low is None or high is None:
        return ""
    return f"[{number(low, places, sign)}, {number(high, places, sign)}]"


def tone(low: float | None, high: float | None, metric: str) -> str:
    """Whether an interval of a difference lies on the better side of zero, on the worse one, or on both."""
    if low is None or high is None:
        return "even"
    if metric in LOWER_IS_BETTER:
        low, high = -high, -low
    return "good" if low > 0 else "bad" if high < 0 else "even"


def full_table(cells: Sequence[Cell], main: str) -> Entry:
    """Rows by NFE, the teacher first; a column a metric."""
    places = decimals(cells)
    metrics = list(dict.fromkeys(c.metric for c in cells))
    by_row: dict[tuple[str, str | None, int], dict[str, Cell]] = {}
    for c in cells:
        by_row.setdefault((c.system, c.variant or None, c.nfe), {})[c.metric] = c

    def row(found: dict[str, Cell]) -> Entry:
        first = next(iter(found.values()))
        printed = [_entry(found[m], places[m]) if m in found else None for m in metrics]
        evaluations = first.evaluations
        return {"name": system_name(first), "evaluations": evaluations, "cells": printed, "main": first.variant == main}

    groups: dict[str, list[Entry]] = {}
    for (system, _, nfe), found in by_row.items():
        title = f"{nfe} steps, the teacher" if system == "teacher" else f"{nfe} steps"
        groups.setdefault(title, []).append(row(found))
    heads = [_head(metric, next(c for c in cells if c.metric == metric).role) for metric in metrics]
    return {"metrics": heads, "groups": [{"name": name, "rows": rows} for name, rows in groups.items()]}


def _head(metric: str, role: str) -> Entry:
    arrow = "↓" if metric in LOWER_IS_BETTER else "↑"
    return {"name": metric, "role": role.replace("_", " "), "arrow": arrow}


def _entry(cell: Cell, places: int) -> Entry:
    entry: Entry = {"value": number(cell.mean, places), "interval": interval(cell.ci_low, cell.ci_high, places)}
    entry |= {"delta": "", "tone": "even"}
    if cell.delta_vs_teacher is not None:
        delta = number(cell.delta_vs_teacher, places, sign=True)
        entry["delta"] = f"{delta} {interval(cell.delta_ci_low, cell.delta_ci_high, places, sign=True)}"
        entry["tone"] = tone(cell.delta_ci_low, cell.delta_ci_high, cell.metric)
    return entry


def system_name(cell: Cell) -> str:
    """In words."""
    names = {"teacher": "teacher", "base_guided": "untrained, guided", "base_unguided": "untrained, unguided"}
    return names.get(cell.system, f"student: {cell.variant}")


def claims(cells: Sequence[Cell], values: Values, main: str, n: int, seed: int) -> Entry:
    """The issue's claims, a student a row: each reward against the teacher, KID, diversity, and the untrained base."""
    metrics = list(dict.fromkeys((c.metric, c.role) for c in cells))
    places = decimals(cells)
    teacher = {c.metric: c for c in cells if c.system == "teacher"}
    students: dict[tuple[str, int], dict[str, Cell]] = {}
    for c in (c for c in cells if c.system == "student"):
        students.setdefault((c.variant or "", c.nfe), {})[c.metric] = c
    rewards = [metric for metric, role in metrics if role != "judge"]
    rows = []
    for (variant, nfe), found in students.items():
        said = [_claim(found[m], teacher[m], places[m]) if m in found else _silent() for m, _ in metrics]
        said.append(_above_base(variant, nfe, rewards, values, n, seed))
        rows.append({"name": f"{variant}, {nfe} NFE", "claims": said, "main": variant == main})
    columns = [f"{metric} ({role.replace('_', ' ')})" for metric, role in metrics]
    return {"columns": [*columns, "untrained base, guided"], "rows": rows}


def _silent() -> Entry:
    return {"tone": "even", "mark": "–", "text": "", "detail": ""}


def _claim(cell: Cell, teacher: Cell, places: int) -> Entry:
    span = interval(cell.delta_ci_low, cell.delta_ci_high, places, sign=True)
    detail = f"{number(cell.delta_vs_teacher or 0.0, places, sign=True)} {span}"
    if cell.role == "judge":
        return {**_within_a_tenth(cell, teacher), "detail": detail}
    verdict = tone(cell.delta_ci_low, cell.delta_ci_high, cell.metric)
    words = {"good": "beats the teacher", "even": "level with it", "bad": "below the teacher"}
    return {"tone": verdict, "mark": MARKS[verdict], "text": words[verdict], "detail": detail}


def _within_a_tenth(cell: Cell, teacher: Cell) -> Entry:
    """Judged on the means, as the issue puts it; the interval is printed beside."""
    worse = cell.mean - teacher.mean if cell.metric in LOWER_IS_BETTER else teacher.mean - cell.mean
    share = worse / abs(teacher.mean) if teacher.mean else math.inf if worse > 0 else 0.0
    verdict = "good" if share <= TOLERANCE else "bad"
    words = f"{abs(share) * 100:.0f} % {'worse' if share > 0 else 'better'}"
    return {"tone": verdict, "mark": MARKS[verdict], "text": words}


def _above_base(variant: str, nfe: int, rewards: Sequence[str], values: Values, n: int, seed: int) -> Entry:
    found = [values.versus(f"{variant}-{nfe}", f"base_guided-{nfe}", metric, n, seed) for metric in rewards]
    known = [result for result in found if result is not None]
    surely = sum(result.delta_ci[0] > 0 for result in known)
    verdict = "good" if surely == len(rewards) else "even" if all(r.delta > 0 for r in known) and known else "bad"
    text = f"above it on {surely} of {len(rewards)} rewards"
    return {"tone": verdict, "mark": MARKS[verdict], "text": text, "detail": ""}


def against_controls(values: Values, cells: Sequence[Cell], variants: Sequence[str], n: int, seed: int) -> Entry | None:
    """What the main variant has over each other one, on each reward."""
    places, rewards = decimals(cells), _rewards(cells)
    main, nfe = variants[0], sorted({c.nfe for c in cells if c.system == "student"})
    pairs = [(steps, other) for steps in nfe for other in variants[1:]]
    rows = []
    for steps, other in pairs:
        found = {m: values.versus(f"{main}-{steps}", f"{other}-{steps}", m, n, seed) for m in rewards}
        if any(found.values()):
            rows.append({"name": f"{steps} NFE: {main} − {other}", "cells": _differences(found, places)})
    return {"columns": rewards, "rows": rows} if rows else None


def by_kind(values: Values, cells: Sequence[Cell], main: str, n: int, seed: int) -> Entry | None:
    """The main variant against the teacher, by kind of prompt."""
    places, rewards = decimals(cells), _rewards(cells)
    nfe = sorted({c.nfe for c in cells if c.system == "student" and c.variant == main})
    kinds = sorted(set(values.kinds.values()) - {""})
    rows = []
    for kind in kinds if len(kinds) > 1 else []:
        count = sum(k == kind for k in values.kinds.values())
        for steps in nfe:
            found = {m: values.versus(f"{main}-{steps}", "teacher", m, n, seed, kind) for m in rewards}
            if any(found.values()):
                rows.append({"name": f"{kind} ({count}), {steps} NFE", "cells": _differences(found, places)})
    return {"columns": rewards, "rows": rows} if rows else None


def _rewards(cells: Sequence[Cell]) -> list[str]:
    return list(dict.fromkeys(c.metric for c in cells if c.role != "judge"))


def _differences(found: Mapping[str, Paired | None], places: Mapping[str, int]) -> list[Entry | None]:
    return [
        r
        and {
            "value": number(r.delta, places[metric], sign=True),
            "interval": interval(*r.delta_ci, places[metric], sign=True),
            "tone": tone(*r.delta_ci, metric),
        }
        for metric, r in found.items()
    ]
