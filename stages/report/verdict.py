"""What an evaluation says: in one sentence, and as tables for the terminal."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Iterator, Sequence

from rats.schemas.reports import Cell, LengthsReport
from rats.stages.measure.values import Values
from rats.stages.report import tables


def headline(cells: Sequence[Cell], main: str) -> str:
    """The student of the fewest steps against its teacher: "3 evaluations instead of 50: above its teacher on ..."."""
    fewest = min(cell.nfe for cell in cells if cell.variant == main)
    student = {cell.metric: cell for cell in cells if (cell.variant, cell.nfe) == (main, fewest)}
    teacher = {cell.metric: cell for cell in cells if cell.system == "teacher"}
    first, places = next(iter(teacher.values())), tables.decimals(cells)
    said = [_on_rewards([cell for cell in student.values() if cell.role != "judge"])]
    for cell in (student[metric] for metric in SAID if metric in student):
        own, other = (tables.number(c.mean, places[cell.metric]) for c in (cell, teacher[cell.metric]))
        said.append(f"{tables.NAMES.get(cell.metric, cell.metric)} {own} (teacher {other})")
    judged = [
        tables.within_a_tenth(cell, teacher[cell.metric])["tone"] for cell in student.values() if cell.role == "judge"
    ]
    rest = f"; {judged.count('good')} of {len(judged)} judged values at most a tenth worse" if judged else ""
    cost = next(iter(student.values())).evaluations
    return f"{cost} evaluations instead of {first.evaluations}: {', '.join(said)}{rest}."


SAID = ("kid", "recognition")
"""What the sentence has of the first judge; all of every judge is in the table."""


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
    for variant, rows in variants.items():
        yield ""
        columns = [[f"{row['nfe']} steps", *map(_claim, row["claims"])] for row in rows]
        yield from _aligned([variant, *found["columns"]], columns)
    yield ""
    for rule in found["rules"]:
        yield from textwrap.wrap(_ascii(rule), 110)


def length_lines(report: LengthsReport) -> Iterator[str]:
    """A table for each variant: a row a metric and number of steps, a column a length; then what was chosen."""
    places = tables.decimals(report.cells)
    for variant, chosen in report.chosen.items():
        cells = [cell for cell in report.cells if cell.variant == variant]
        rows = list(dict.fromkeys((cell.metric, cell.nfe) for cell in cells))
        lengths = sorted({cell.length for cell in cells})
        columns = [[f"length {length:g}"] for length in lengths]
        for length, column in zip(lengths, columns, strict=True):
            found = {(cell.metric, cell.nfe): cell for cell in cells if cell.length == length}
            column += [_difference(found[row], places[row[0]]) for row in rows]
        yield from _aligned([variant, *(f"{metric}, {nfe} steps" for metric, nfe in rows)], columns)
        yield f"chosen: train.update_length: {chosen:g}; then `rats stage train --variant {variant} --resume latest`"
        yield ""
    yield "Differences to the teacher. Chosen is the shortest length whose trained reward, the mean over the numbers of"
    yield "steps, is at most one standard error below the best one's."


def _difference(cell: Cell, places: int) -> str:
    span = tables.interval(cell.delta_ci_low, cell.delta_ci_high, places, sign=True)
    return _ascii(f"{tables.number(cell.delta_vs_teacher or 0.0, places, sign=True)} {span}")


def _aligned(names: Sequence[str], columns: Sequence[Sequence[str]]) -> Iterator[str]:
    """Lines of a table; each column begins with its head."""
    first, width = max(map(len, names)), 2 + max(len(text) for column in columns for text in column)
    for name, *texts in zip(names, *columns, strict=True):
        yield f"{name:<{first}}  {''.join(f'{text:<{width}}' for text in texts)}".rstrip()


def _claim(claim: tables.PageData) -> str:
    return _ascii(" ".join(filter(None, [f"{ANSWERS[claim['tone']]:<3}", claim["short"], claim["detail"]])))


def _ascii(text: str) -> str:
    for tone, answer in ANSWERS.items():
        text = text.replace(tables.MARKS[tone], answer)
    return text.replace("\N{MINUS SIGN}", "-")
