"""values.csv: every score that evaluate measured, one a row."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

from rats.schemas.errors import DataError
from rats.stages.measure.intervals import PairedEstimate, paired_estimate


@dataclass(frozen=True)
class Values:
    """values.csv: scores by system (`Column.id`), metric and sample, with each sample's concept and kind."""

    scores: dict[tuple[str, str], dict[str, float]]
    concepts: dict[str, str]
    kinds: dict[str, str]

    def versus(self, a: str, b: str, metric: str, kind: str | None = None) -> PairedEstimate | None:
        """Paired difference of two columns, over the samples of one kind of prompt or of all."""
        left, right = self.scores.get((a, metric)), self.scores.get((b, metric))
        if left is None or right is None:
            return None
        keys = sorted(key for key in left.keys() & right.keys() if kind in (None, self.kinds[key]))
        concepts = [self.concepts[key] for key in keys]
        if len(set(concepts)) < 2:
            return None
        return paired_estimate([left[key] for key in keys], [right[key] for key in keys], concepts)


VALUES_FILE = "values.csv"
"""The file's name, beside evaluate.json."""


VALUE_COLUMNS = ("column", "key", "prompt_id", "concept", "kind", "metric", "value")


def read_values(path: Path) -> Values:
    """Reads what `evaluate` wrote beside its report."""
    values = Values({}, {}, {})
    try:
        with path.open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                column = values.scores.setdefault((row["column"], row["metric"]), {})
                column[row["key"]] = float(row["value"])
                values.concepts[row["key"]], values.kinds[row["key"]] = row["concept"], row["kind"]
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path} holds no values of an evaluation ({error}): run `rats stage evaluate`") from error
    if not values.scores or any(column.keys() != values.concepts.keys() for column in values.scores.values()):
        raise DataError(f"{path} is not whole: run `rats stage evaluate`")
    return values
