"""Validation of a student in training: it samples the validation prompts, and rewards and judge score the pictures.

S samples, N numbers of steps, M real pictures, F features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from rats.pipeline.protocols import Reward, Student
from rats.schemas.errors import ConfigError
from rats.schemas.params import Params
from rats.stages.measure.features import diversity_by_sample, kernel, kid_by_sample, mean_off_diagonal
from rats.stages.measure.kid import RealSet, open_real
from rats.stages.measure.networks import Judge, open_network
from rats.stages.measure.pictures import to_picture
from rats.stages.train.guard.rules import Array, ValidationScores
from rats.stages.train.guard.validation import ValidationSet
from rats.trainer.data import Batch
from rats.trainer.loop import Stopped
from rats.trainer.optim import Learner
from rats.trainer.sampling import few_steps
from rats.trainer.scoring import score

KID, DIVERSITY = "minus_kid", "diversity"
"""The judge's metric, higher is better: minus the KID to real pictures, or without those the pictures' diversity."""


@dataclass(frozen=True)
class RealFeatures:
    """Features (M, F) of real pictures of the validation concepts, and their mean kernel with each other."""

    features: Array
    own: float


@dataclass(frozen=True)
class Validator:
    """Validates a student: the same samples, rewards and judge every time."""

    student: Student
    validation: ValidationSet
    rewards: Mapping[str, Reward]
    judge: Judge | None
    real: RealFeatures | None
    size: int
    """Number of samples in a batch."""

    @property
    def judged(self) -> tuple[str, ...]:
        """Name of the judge's metric, if there is a judge."""
        return () if self.judge is None else (KID if self.real else DIVERSITY,)

    def look(self, learner: Learner, nfe: Sequence[int], stopping: Callable[[], bool]) -> ValidationScores:
        """Values (N, S) by metric, for the pictures of the moving average at each number of steps in `nfe`.

        Raises Stopped when `stopping` turns true.
        """
        with averaged(learner), torch.no_grad():
            rows = [self._values(learner, steps, stopping) for steps in nfe]
        return {name: np.stack([row[name] for row in rows]) for name in rows[0]}

    def _values(self, learner: Learner, steps: int, stopping: Callable[[], bool]) -> dict[str, Array]:
        scores: dict[str, list[float]] = {name: [] for name in self.rewards}
        features: list[Tensor] = []
        for batch, images_B3HW in self.draw(learner, self.validation, steps, stopping):
            for name, reward in self.rewards.items():
                scores[name] += scores_or_nan(reward, images_B3HW, batch.prompts)
            if self.judge is not None:
                features.append(self.judge.features(images_B3HW))
        values = {name: np.array(column) for name, column in scores.items()}
        return values | self._judged(torch.cat(features).numpy().astype(np.float64) if features else None)

    def _judged(self, features_SF: Array | None) -> dict[str, Array]:
        if features_SF is None:
            return {}
        if self.real is None:
            return {DIVERSITY: diversity_by_sample(features_SF)}
        return {KID: -kid_by_sample(features_SF, self.real.features, self.real.own)}

    def draw(
        self, learner: Learner, samples: ValidationSet, steps: int, stopping: Callable[[], bool]
    ) -> Iterator[tuple[Batch, Tensor]]:
        """Batches with their images (B, 3, H, W) in [0, 1]."""
        device, sample = next(learner.network.parameters()).device, few_steps(self.student, steps)
        for batch in samples.batches(self.size, device):
            if stopping():
                raise Stopped
            with learner.ranks.autocast():
                final_BTC = sample(batch)
            yield batch, self.student.decode(final_BTC)

    def sheet(self, learner: Learner, nfe: Sequence[int], count: int, stopping: Callable[[], bool]) -> Image.Image:
        """A sheet of pictures: a row for each of the first `count` prompts, a column for each number of steps."""
        shown, columns = self.validation.first(count), []
        with averaged(learner), torch.no_grad():
            for steps in nfe:
                drawn = [images_B3HW.cpu().numpy() for _, images_B3HW in self.draw(learner, shown, steps, stopping)]
                columns.append(np.concatenate([to_picture(image) for image in np.concatenate(drawn)], axis=0))
        return Image.fromarray(np.concatenate(columns, axis=1))


def scores_or_nan(reward: Reward, images_B3HW: Tensor, prompts: Sequence[str]) -> list[float]:
    """Scores of pictures without augmentation; NaN where the reward failed."""
    found = score(reward, images_B3HW, prompts)
    return torch.where(found.good_B, found.scores_B.double(), torch.nan).cpu().tolist()


@contextmanager
def averaged(learner: Learner) -> Iterator[None]:
    """Puts the moving average's weights into the network, in evaluation mode. Restores weights and modes afterwards."""
    modes = {module: module.training for module in learner.network.modules()}
    try:
        with learner.averaged() as network:
            network.eval()
            yield
    finally:
        for module, training in modes.items():
            module.training = training


def open_judge(params: Params, concepts: Sequence[str], device: str) -> tuple[Judge | None, RealFeatures | None]:
    """The first judge of `evaluate`, and the features of the real pictures that it compares with, if there are any."""
    if not params.evaluate.judges:
        return None, None
    chosen = params.evaluate.judges[0]
    judge = open_network(chosen.name, device)
    if chosen.real_features is None:
        return judge, None
    features_MF, labels = open_real(Path(chosen.real_features))
    kept_MF = RealSet(features_MF, labels, concepts).features
    if len(kept_MF) < 2:
        raise ConfigError(f"{chosen.real_features} has {len(kept_MF)} pictures: KID needs two")
    return judge, RealFeatures(kept_MF, mean_off_diagonal(kernel(kept_MF, kept_MF)))
