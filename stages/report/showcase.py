"""The pictures that the report shows: in which order, and what is said below each of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rats.schemas.reports import Cell
from rats.stages.measure.pictures import Picture, Pictures, SystemLabel
from rats.stages.measure.values import Values
from rats.stages.report.tables import decimals, number, tone

FIRST = 6
"""Prompts on the first screen."""


@dataclass(frozen=True)
class Shot:
    """One picture with its system's name, its score, and its gain over the teacher's picture, both as text."""

    picture: Picture
    name: str
    score: str
    gain: str
    tone: str


@dataclass(frozen=True)
class Showcase:
    """Pictures and their scores by the reward that trained the main variant."""

    pictures: Pictures
    values: Values
    metric: str
    places: int

    @classmethod
    def of(cls, pictures: Pictures, values: Values, cells: Sequence[Cell], main: str) -> Showcase:
        """By the first reward that trained `main`; by the first of all, if that one was not measured."""
        rewards = [cell for cell in cells if cell.role != "judge"]
        trained = [cell for cell in rewards if cell.variant == main and cell.role == "trained"]
        metric = (trained or rewards)[0].metric
        return cls(pictures, values, metric, decimals(cells)[metric])

    def gain(self, column: str, row: int) -> float:
        """Score of a system's picture minus that of the teacher's, from the same noise."""
        key = self.pictures.keys[row]
        return self.values.scores[column, self.metric][key] - self.values.scores["teacher", self.metric][key]

    def order(self, column: str) -> list[int]:
        """All prompts, from the largest gain of a system to its largest loss."""
        return sorted(range(len(self.pictures.prompts)), key=lambda row: -self.gain(column, row))

    def ends(self, column: str) -> list[int]:
        """The prompts of the first screen: the largest gains of a system, then its largest losses."""
        order = self.order(column)
        half = FIRST // 2
        return order if len(order) <= FIRST else order[:half] + order[-half:]

    def shots(self, row: int, columns: Sequence[SystemLabel]) -> list[Shot]:
        """One prompt as these systems have drawn it."""
        return [self._shot(row, column) for column in columns]

    def _shot(self, row: int, column: SystemLabel) -> Shot:
        score = self.values.scores[column.id, self.metric][self.pictures.keys[row]]
        picture, said = self.pictures.side[column.id][row], number(score, self.places)
        if column.system == "teacher":
            return Shot(picture, name_of(column), said, "", "even")
        gain = self.gain(column.id, row)
        return Shot(picture, name_of(column), said, number(gain, self.places, sign=True), tone(gain, gain, self.metric))


def name_of(column: SystemLabel) -> str:
    """Who draws at what cost, such as: teacher, 50 eval."""
    words = {"teacher": "teacher", "base_guided": "untrained", "base_unguided": "untrained, unguided"}
    return f"{words.get(column.system, column.variant)}, {column.evaluations} eval."


def first_columns(pictures: Pictures, main: str) -> list[SystemLabel]:
    """Teacher, guided base and main student, these two at the fewest steps."""
    fewest = min(column.nfe for column in pictures.columns if column.variant == main)
    wanted = ("teacher", f"base_guided-{fewest}", f"{main}-{fewest}")
    return [column for column in pictures.columns if column.id in wanted]
