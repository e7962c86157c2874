"""What an evaluation says: in one sentence, and as a table for the terminal."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Iterator, Sequence

from rats.schemas.reports import Cell
from rats.stages.measure.values import Values
from rats.stages.report import tables


def headline(cells: Sequence[Cell], main: str) -> str:
    """The student of the fewest steps against its teacher: "3 evaluations instead of 50: above its teacher on ..."."""
    fewest = min(cell.nfe for cell in cells if cell.variant == main)
    student = {cell.metric: cell for cell in cells if (cell.variant, cell.nfe) == (main, fewest)}
    teacher = {cell.metric: cell for cell in cells if cell.system == "teacher"}
    first, places = next(iter(teacher.values())), tables.decimals(cells)
    said = [_on_rewards([cell for cell in student.values() if cell.role != "judge"])]
    for cell in student.values():
        if cell.role == "judge":
            own, other = (tables.number(c.mean, places[cell.metric]) for c in (cell, teacher[cell.metric]))
            said.append(f"{tables.NAMES.get(cell.metric, cell.metric)} {own} (teacher {other})")
    cost = next(iter(student.values())).evaluations
    return f"{cost} evaluations instead of {first.evaluations}: {', '.join(said)}."


def _on_rewards(rewards: Sequence[Cell]) -> str:
    tones = Counter(tables.tone(cell.delta_ci_low, cell.delta_ci_high, cell.metric) for cell in rewards)
    said = f"above its teacher on {tones['good']} of {len(rewards)} rewards"
    rest = [f"{word} on {tones[tone]}" for tone, word in (("even", "level"), ("bad", "below")) if tones[tone]]
    return ", ".join([said, *rest])


ANSWERS = {"good": "yes", "even": "-", "bad": "no"}
"""As `rats doctor` says it: a terminal may have no ticks."""


def verdict_lines(cells: Sequence[Cell], values: Values, main: str) -> Iterator[str]:
    """The sentence, then a table for each variant: a row a metric, a column a number of steps. Plain ASCII."""
    yield _ascii(headline(cells, main))
    found = tables.claims(cells, values, main)
    variants: dict[str, list[tables.PageData]] = {}
    for row in found["rows"]:
        variants.setdefault(row["variant"], []).append(row)
    wide = max(map(len, found["columns"]))
    for variant, rows in variants.items():
        yield ""
        lines = [[f"{row['nfe']} steps", *map(_claim, row["claims"])] for row in rows]
        width = 2 + max(len(text) for line in lines for text in line)
        for name, *texts in zip([variant, *found["columns"]], *lines, strict=True):
            yield f"{name:<{wide}}  {''.join(f'{text:<{width}}' for text in texts)}".rstrip()
    yield ""
    for rule in found["rules"]:
        yield from textwrap.wrap(_ascii(rule), 110)


def _claim(claim: tables.PageData) -> str:
    return _ascii(" ".join(filter(None, [f"{ANSWERS[claim['tone']]:<3}", claim["short"], claim["detail"]])))


def _ascii(text: str) -> str:
    for tone, answer in ANSWERS.items():
        text = text.replace(tables.MARKS[tone], answer)
    return text.replace("\N{MINUS SIGN}", "-")
