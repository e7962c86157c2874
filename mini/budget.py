"""How many steps each stage of the build gets: a fixed number, or what fits into its share of some minutes."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mini.flow import Schedule

STEPS = {"vae": 2400, "polish": 3000, "rival": 700, "pickscore": 4000, "hpsv2": 4000, "image-reward": 4000}

SHARES = {
    "vae": 0.16,
    "teacher": 0.48,
    "polish": 0.06,
    "rival": 0.07,
    "pickscore": 0.05,
    "hpsv2": 0.05,
    "image-reward": 0.05,
}
"""Of the minutes; what is left over is for pictures, latents, losers and measuring."""

GUIDED_COST = 4 / 3
"""A step that learns guidance has one forward pass more for half of its batch, twice."""

WARM, TIMED = 10, 30


@dataclass
class Budget:
    """Steps by name; with `minutes`, a short trial of each stage says how many fit."""

    work: Path
    teacher: Schedule
    scale: float = 1.0
    minutes: float | None = None

    def steps(self, name: str, train: Callable[[Path, int], object]) -> int:
        """Of a stage that `train(checkpoint, steps)` trains."""
        if self.minutes is None:
            return round(STEPS[name] * self.scale)
        return self._kept(name, lambda: self._fitting(name, train))

    def schedule(self, name: str, train: Callable[[Path, Schedule], object]) -> Schedule:
        """The teacher's phases: as told, or in the same proportion as many as fit."""
        told = self.teacher
        if self.minutes is None:
            return Schedule(*(round(count * self.scale) for count in (told.plain, told.guided, told.decay)))
        plain = self._kept(name, lambda: self._fitting(name, lambda path, count: train(path, Schedule(count, 0, 0))))
        share = plain / (told.plain + GUIDED_COST * (told.guided + told.decay))
        return Schedule(*(round(count * share) for count in (told.plain, told.guided, told.decay)))

    def _kept(self, name: str, measure: Callable[[], int]) -> int:
        """A number that was measured once, so that a run that goes on has the same schedule."""
        path = self.work / f"{name}.steps"
        if not path.exists():
            path.write_text(str(measure()))
        return int(path.read_text())

    def _fitting(self, name: str, train: Callable[[Path, int], object]) -> int:
        """Steps within the stage's share, by the time of a trial that is thrown away."""
        folder = self.work / "trial"
        folder.mkdir(exist_ok=True)
        train(folder / f"{name}.pt", WARM)
        start = time.time()
        train(folder / f"{name}.pt", WARM + TIMED)
        seconds = time.time() - start
        shutil.rmtree(folder)
        return max(TIMED, round(60 * (self.minutes or 0) * SHARES[name] * TIMED / seconds))
