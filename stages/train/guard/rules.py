"""Signs of reward hacking on the validation prompts: trained rewards rise while other rewards and the judge fall.

A look is one validation. For each metric it holds values (N, S) of S samples at N numbers of steps; higher is better,
and NaN stands for a failed score. All comparisons are paired by sample. Their unit is the metric's standard deviation
over the samples at the first look, which is the untrained student's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from rats.schemas.errors import DataError

Array = NDArray[np.float64]
ValidationScores = Mapping[str, Array]
PanelRow = Mapping[str, str]
"""A row of panel.csv as text, as it is read."""

PANEL_THRESHOLD = 2.0
"""Standard errors by which the panel must fall for an alarm. docs/guard.md says how often chance does that."""
METRIC_THRESHOLD = 3.0
"""Standard errors by which a single metric of the panel must fall for an alarm. Similar rewards are fooled together,
and their mean with the judge hides the one that falls."""

OWN = ("step", "trained", "trained_noise", "panel", "panel_noise", "against")
CHANGES = ("mean", "delta", "se", "since", "since_se")
SINCE = ("trained_since", "trained_since_noise", "panel_since", "panel_since_noise", "alarm")


class MeanChange(NamedTuple):
    """A mean over samples, and its standard error."""

    mean: float
    noise: float

    def is_down(self, noise: float) -> bool:
        """Below zero by more than so many standard errors."""
        return self.mean < -noise * self.noise


class Roles(NamedTuple):
    """Which metrics train, with their weights, and which are the panel."""

    trained: Mapping[str, float]
    panel: tuple[str, ...]

    @property
    def metrics(self) -> list[str]:
        """All metrics."""
        return [*self.trained, *self.panel]


def panel_columns(roles: Roles, nfe: Sequence[int]) -> list[str]:
    """Header of panel.csv.

    `trained` and `panel` are changes since the first look, in standard deviations. `*_since` are changes since the look
    `against`, the one with the best panel so far. `*_noise` and `*_se` are standard errors. Each metric has, in its own
    units: its mean over all samples, its changes since both looks, and its mean at each number of steps.
    """
    parts = [[*(f"{m}_{name}" for name in CHANGES), *(f"{m}_{n}" for n in nfe)] for m in roles.metrics]
    return [*OWN, *SINCE, *(name for part in parts for name in part)]


def mean_change(values_S: Array, concepts: Sequence[str]) -> MeanChange:
    """Mean of (S,) paired differences without NaN. Its error is clustered: samples of one concept are one draw."""
    keep = np.isfinite(values_S)
    values, labels = values_S[keep], np.asarray(concepts)[keep]
    if len(set(labels)) < 2:  # with a single concept, each prompt is its own cluster
        labels = np.arange(len(values))
    if len(values) < 2:
        return MeanChange(float("nan"), float("nan"))
    _, rows = np.unique(labels, return_inverse=True)
    sums = np.bincount(rows, weights=values - values.mean())
    clusters = len(sums)
    return MeanChange(float(values.mean()), float(np.sqrt(clusters / (clusters - 1) * (sums**2).sum()) / len(values)))


def relative_change(
    now: ValidationScores, then: ValidationScores, first: ValidationScores, weights: Mapping[str, float]
) -> Array:
    """Change between two looks, (S,), in spreads: the weighted mean over metrics, the mean over numbers of steps."""
    parts = [w * ((now[m] - then[m]) / sample_std(m, first[m])).mean(0) for m, w in weights.items()]
    return np.asarray(sum(parts) / sum(weights.values()), np.float64)


def sample_std(metric: str, values_NS: Array) -> Array:
    """Standard deviation over samples, (N, 1). Raises DataError if it is 0, as for a constant."""
    found = [row[np.isfinite(row)] for row in values_NS]
    spreads = np.array([[row.std() if len(row) > 1 else 0.0] for row in found])
    if not (spreads > 0).all():
        raise DataError(
            f"{metric} tells the validation pictures of the untrained student not apart (spread 0), so it cannot "
            "guard: raise train.guard.prompts, look at that reward, or set train.guard.every to null"
        )
    return spreads


def panel_row(
    step: int,
    looks: Mapping[int, ValidationScores],
    against: int,
    roles: Roles,
    nfe: Sequence[int],
    concepts: Sequence[str],
) -> dict[str, float | int]:
    """The row of panel.csv for the look at `step`. `looks` has it, the first one, and the one to compare with."""
    now, then, first = looks[step], looks[against], looks[min(looks)]
    panel = dict.fromkeys(roles.panel, 1.0)
    row: dict[str, float | int] = {"step": step, "against": against}
    for name, before in (("", first), ("_since", then)):
        for which, weights in (("trained", roles.trained), ("panel", panel)):
            found = mean_change(relative_change(now, before, first, weights), concepts)
            row |= {f"{which}{name}": found.mean, f"{which}{name}_noise": found.noise}
    for metric in roles.metrics:
        row |= _of_metric(metric, now[metric], (first[metric], then[metric]), nfe, concepts)
    row["alarm"] = int(bool(fallen_metrics(row, roles)) and row["trained_since"] > 0)
    return row


def fallen_metrics(row: Mapping[str, float | int], roles: Roles) -> list[str]:
    """What has fallen significantly since the best look: "the panel", or single metrics of it.

    That is an alarm unless the trained reward has fallen too. Such a run diverges, which its metrics show.
    """
    panel = MeanChange(row["panel_since"], row["panel_since_noise"])
    alone = {m: MeanChange(row[f"{m}_since"], row[f"{m}_since_se"]) for m in roles.panel}
    return (["the panel"] if panel.is_down(PANEL_THRESHOLD) else []) + [
        m for m, one in alone.items() if one.is_down(METRIC_THRESHOLD)
    ]


def _of_metric(
    metric: str, now_NS: Array, before: Sequence[Array], nfe: Sequence[int], concepts: Sequence[str]
) -> dict[str, float]:
    delta, since = (mean_change((now_NS - then_NS).mean(0), concepts) for then_NS in before)
    means = {f"{metric}_{n}": mean_change(values_S, concepts).mean for n, values_S in zip(nfe, now_NS, strict=True)}
    found = (mean_change(now_NS.mean(0), concepts).mean, *delta, *since)
    return dict(zip((f"{metric}_{name}" for name in CHANGES), found, strict=True)) | means


def best_step(rows: Sequence[PanelRow], steps: Sequence[int] | None = None) -> int | None:
    """The step of the look with the best panel, the earliest of equal ones; only those at `steps`, if given."""
    known = [row for row in rows if steps is None or int(row["step"]) in steps]
    panels = {int(row["step"]): float(row["panel"]) for row in known}
    finite = {step: panel for step, panel in panels.items() if np.isfinite(panel)}
    return max(finite, key=lambda step: finite[step]) if finite else None


def alarms_in_a_row(rows: Sequence[PanelRow]) -> int:
    """How many looks at the end raised the alarm one after the other."""
    count = 0
    for row in reversed(rows):
        if int(row["alarm"]) == 0:
            break
        count += 1
    return count
