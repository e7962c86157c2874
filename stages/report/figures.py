"""The report's figures. Each function turns plain numbers into SVG texts, the same texts every time."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from numpy.typing import NDArray

from rats.schemas.errors import DataError
from rats.schemas.reports import Cell
from rats.stages.report.tables import LOWER_IS_BETTER

INK = "#7d858f"
"""Axes and text: a grey that reads on a white page and on a dark one."""
TEACHER = "#9aa2ab"
PALETTE = ("#2f81c7", "#e08a1e", "#2a9d74", "#c95d97", "#8a6fd1", "#b6a12c")
"""Colours of the variants, in the order of `evaluate.variants`. Colour-blind readers can tell them apart."""
BASE = "#d1495b"
PANEL_WIDTH = 3.0
"""In inches, of 72 px."""

Series = NDArray[np.float64]


@dataclass(frozen=True)
class Panels:
    """A figure: an SVG for each panel, which the page puts side by side or below each other, and one legend for all.

    An entry of the legend is its name, its colour, and whether the line is dashed.
    """

    svgs: list[str]
    legend: list[tuple[str, str, bool]]


@dataclass(frozen=True)
class Curve:
    """A run's metrics.csv by column, one entry for each training step; NaN where a step logged nothing."""

    name: str
    columns: dict[str, Series]

    def at(self, nfe: int, column: str) -> tuple[Series, Series]:
        """Steps and values of the steps that trained this NFE and logged this column."""
        values = self.columns.get(column, np.full(len(self.columns["step"]), np.nan))
        keep = (self.columns["nfe"] == nfe) & np.isfinite(values)
        return self.columns["step"][keep], values[keep]

    @property
    def nfe(self) -> list[int]:
        """The NFEs that were trained."""
        return sorted({int(n) for n in self.columns["nfe"]})


def read_curve(name: str, path: Path) -> Curve:
    """Reads metrics.csv; DataError when it isn't one."""
    try:
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
        columns = {key: np.array([float(row[key] or "nan") for row in rows]) for key in (rows[0] if rows else ())}
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"{path} is no metrics file ({error}): train the run again") from error
    if not {"step", "nfe"} <= set(columns):
        raise DataError(f"{path} holds no training step: let the run finish, or train it again")
    return Curve(name, columns)


def smooth(values: Series, width: int) -> Series:
    """Centred running mean over `width` entries, narrower at both ends."""
    half = width // 2
    sums = np.concatenate([[0.0], np.cumsum(values)])
    low = np.maximum(np.arange(len(values)) - half, 0)
    high = np.minimum(np.arange(len(values)) + half + 1, len(values))
    return (sums[high] - sums[low]) / (high - low)


def _width(values: Series) -> int:
    """Window of the running mean: a twelfth of the run."""
    return max(3, len(values) // 12)


def colours(names: Sequence[str]) -> dict[str, str]:
    """A colour for each variant, the same in every figure."""
    return {name: PALETTE[i % len(PALETTE)] for i, name in enumerate(names)}


def reward_curves(curves: Sequence[Curve], nfe: Sequence[int], reward: str) -> Panels:
    """The paper's figure of reward dynamics: student against teacher over training, one panel an NFE."""
    shades = colours([curve.name for curve in curves])

    def draw(axes: Axes, steps: int) -> None:
        x, teacher = curves[0].at(steps, "reward_teacher")
        axes.plot(x, smooth(teacher, _width(teacher)), color=TEACHER, linestyle="--", label="teacher")
        for curve in curves:
            x, y = curve.at(steps, "reward_student")
            axes.plot(x, y, color=shades[curve.name], alpha=0.35, linewidth=0.7)
            axes.plot(x, smooth(y, _width(y)), color=shades[curve.name], label=curve.name)
        axes.set_title(f"{steps} NFE")
        axes.set_xlabel("training step")

    return _panels([partial(draw, steps=n) for n in nfe], ylabel=f"{reward}, training batch", share_y=True)


def gate_curves(curves: Sequence[Curve], nfe: Sequence[int]) -> Panels:
    """The gate's mean over training, with a band of one standard deviation within the batch."""
    shades = colours([curve.name for curve in curves])

    def draw(axes: Axes, steps: int) -> None:
        for curve in curves:
            x, mean = curve.at(steps, "gate_mean")
            deviation = curve.at(steps, "gate_std")[1]
            line = smooth(mean, _width(mean))
            axes.plot(x, line, color=shades[curve.name], label=curve.name)
            if len(deviation) == len(mean):
                band = smooth(deviation, _width(mean))
                axes.fill_between(x, line - band, line + band, color=shades[curve.name], alpha=0.15, linewidth=0)
        axes.set_title(f"{steps} NFE")
        axes.set_ylim(-0.03, 1.03)
        axes.set_xlabel("training step")

    return _panels([partial(draw, steps=n) for n in nfe], ylabel="gate g", share_y=True)


def loss_curves(curve: Curve, nfe: Sequence[int]) -> Panels:
    """One run's shaping loss after each student step, and the gradient norm of each term (both logarithmic)."""

    def losses(axes: Axes, steps: int) -> None:
        for k in range(1, steps + 1):
            x, y = curve.at(steps, f"loss_shape_k{k}")
            shade = matplotlib.colormaps["viridis"](0.3 + 0.55 * (k - 1) / max(1, steps - 1))
            axes.plot(x, smooth(y, _width(y)), color=shade, linewidth=1.1, label=f"k = {k}")
        axes.set_yscale("log")
        axes.set_title(f"shaping loss, {steps} NFE")
        axes.set_xlabel("training step")

    def norms(axes: Axes) -> None:
        for column, shade in (("grad_reward", PALETTE[1]), ("grad_shape", PALETTE[0]), ("grad_total", TEACHER)):
            for n, line in zip(nfe, cycle(("-", "--", ":"))):
                x, y = curve.at(n, column)
                name = column.replace("_", " ") if n == nfe[0] else None
                axes.plot(x[y > 0], y[y > 0], line, color=shade, linewidth=1.1, label=name)
        axes.set_yscale("log")
        axes.set_title("gradient norms")
        axes.set_xlabel("training step")

    draws: list[Callable[[Axes], None]] = [partial(losses, steps=n) for n in nfe]
    return _panels([*draws, norms], ylabel="", share_y=False, own_legends=True)


def forest(cells: Sequence[Cell], variants: Sequence[str]) -> Panels:
    """Difference to the 50-step teacher with its interval, one panel a metric, one line a system and NFE."""
    metrics = list(dict.fromkeys(cell.metric for cell in cells))
    shown = [c for c in cells if c.system == "student" or c.system == "base_guided"]
    nfe = sorted({cell.nfe for cell in shown})
    names = ["base_guided", *variants]
    shades = {"base_guided": BASE, **colours(variants)}
    height = {(n, name): -(i * (len(names) + 1) + j) for i, n in enumerate(nfe) for j, name in enumerate(names)}

    def draw(axes: Axes, metric: str) -> None:
        axes.axvline(0, color=TEACHER, linestyle="--", linewidth=1)
        for cell in (c for c in shown if c.metric == metric):
            name = cell.variant or cell.system
            y = height.get((cell.nfe, name))
            low, delta, high = cell.delta_ci_low, cell.delta_vs_teacher, cell.delta_ci_high
            if y is None or low is None or delta is None or high is None:
                continue
            axes.plot([low, high], [y, y], color=shades[name], linewidth=2.4, solid_capstyle="round")
            axes.plot([delta], [y], "o", color=shades[name], markersize=5)
        role = next(c.role for c in cells if c.metric == metric).replace("_", " ")
        axes.set_title(f"{metric}\n{role}, {'lower' if metric in LOWER_IS_BETTER else 'higher'} is better")
        axes.set_ylim(min(height.values()) - 0.8, 0.8)
        middle = [-(i * (len(names) + 1) + (len(names) - 1) / 2) for i in range(len(nfe))]
        axes.set_yticks(middle, [f"{n} NFE" for n in nfe])
        axes.set_xlabel("difference to the teacher")
        for name in names:
            axes.plot([], [], "o-", color=shades[name], label=name.replace("_", ", "), linewidth=2.4)

    return _panels([partial(draw, metric=m) for m in metrics], ylabel="", share_y=True, height=0.9 + 0.16 * len(height))


def histograms(columns: Sequence[tuple[str, Sequence[float]]]) -> Panels:
    """How the scores of each (name, scores) are spread, one panel each, with their mean."""

    def draw(axes: Axes, name: str, scores: Sequence[float], shade: str) -> None:
        axes.hist(scores, bins=min(40, max(5, round(len(scores) ** 0.5))), color=shade, alpha=0.75)
        axes.axvline(float(np.mean(scores)), color=TEACHER, linestyle="--", linewidth=1)
        axes.set_title(name)
        axes.set_xlabel("score")

    draws = [
        partial(draw, name=name, scores=scores, shade=PALETTE[i % len(PALETTE)])
        for i, (name, scores) in enumerate(columns)
    ]
    return _panels(draws, ylabel="samples", share_y=False)


def _panels(
    draws: Sequence[Callable[[Axes], None]],
    ylabel: str,
    share_y: bool,
    height: float = 2.6,
    own_legends: bool = False,
) -> Panels:
    """A figure a panel, of one range of y if they share it. The legend is the first panel's, or each has its own."""
    size = (PANEL_WIDTH, max(2.4, height))
    figures = [Figure(figsize=size, layout="constrained") for _ in draws]
    with matplotlib.rc_context(_STYLE):
        every = [figure.subplots() for figure in figures]
        for axes, draw in zip(every, draws, strict=True):
            _dress(axes)
            draw(axes)
            axes.set_ylabel(ylabel)
            if own_legends and axes.get_legend_handles_labels()[0]:
                axes.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=3, columnspacing=1)
        if share_y:
            low, high = zip(*(axes.get_ylim() for axes in every), strict=True)
            for axes in every:
                axes.set_ylim(min(low), max(high))
        legend = [] if own_legends else _legend(every[0])
        return Panels([_svg(figure) for figure in figures], legend)


def _legend(axes: Axes) -> list[tuple[str, str, bool]]:
    """The lines that have a name."""
    lines = [line for line in axes.get_lines() if not str(line.get_label()).startswith("_")]
    return [(str(line.get_label()), to_hex(line.get_color()), line.get_linestyle() == "--") for line in lines]


_STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 8.5,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.titlesize": 9,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "legend.labelcolor": INK,
    "svg.hashsalt": "rats",
    "svg.fonttype": "path",
}


def _dress(axes: Axes) -> None:
    """Style: two thin axes, a faint grid, a transparent background."""
    axes.patch.set_alpha(0)
    axes.grid(color=INK, alpha=0.18, linewidth=0.6)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(INK)
        axes.spines[side].set_linewidth(0.7)


def _svg(figure: Figure) -> str:
    """The figure as SVG. Without a date and with fixed ids, the same figure gives the same text."""
    figure.patch.set_alpha(0)
    buffer = io.StringIO()
    FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None})
    return buffer.getvalue()
