"""Sigma-aligned horizons: the teacher's grid is moved onto the students' sigmas, so that both meet exactly.

The paper is arXiv 2604.14910; see docs/design.md#sigma-aligned-horizons.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rats.schemas.errors import ConfigError

SIGMA_TOLERANCE = 1e-6
"""Sigmas closer than this are one sigma, rounded differently. Two steps of a grid are always farther apart."""


def aligned(
    stock: Callable[[int], Sequence[float]], steps: int, nfe: Sequence[int], kept: str
) -> tuple[list[float], list[float]]:
    """The teacher's snapped grid of `steps` + 1 sigmas, and those of them whose states are kept.

    Args:
        stock: Gives a family's own grid for a number of steps, from 1.0 to 0.0.
        steps: Number of steps of the teacher.
        nfe: Numbers of steps of the students.
        kept: "nfe" for the sigmas of the students' grids, "all" for the whole snapped grid.
    """
    students = [stock(count) for count in nfe]
    sigmas = snap(stock(steps), students)
    return sigmas, union(students) if kept == "nfe" else sigmas


def union(students: Sequence[Sequence[float]]) -> list[float]:
    """All sigmas of the students' grids in falling order, each once (within `SIGMA_TOLERANCE`).

    Raises:
        ConfigError: a grid that does not fall strictly from 1.0 to 0.0.
    """
    for grid in students:
        _check(grid)
    merged: list[float] = []
    for sigma in sorted({sigma for grid in students for sigma in grid}, reverse=True):
        if not merged or merged[-1] - sigma > SIGMA_TOLERANCE:
            merged.append(sigma)
    return merged


def snap(teacher: Sequence[float], students: Sequence[Sequence[float]]) -> list[float]:
    """The teacher's grid, in which each student sigma replaces the nearest inner one; length and ends stay.

    Two student sigmas may be nearest to the same slot. Then one of them takes the neighbouring slot, so that the
    total shift is the smallest of all assignments that keep the order (docs/design.md, equation 6). The result falls
    strictly.

    Raises:
        ConfigError: a grid that does not fall strictly from 1.0 to 0.0, or more student sigmas than slots.
    """
    _check(teacher)
    wanted, slots = union(students)[1:-1], list(teacher[1:-1])
    if len(wanted) > len(slots):
        raise ConfigError(
            f"{len(wanted)} student sigmas do not fit into the {len(slots)} inner ones of the teacher's "
            f"{len(teacher) - 1} steps; raise teacher.steps or shorten teacher.nfe"
        )
    for slot, sigma in zip(_assign(slots, wanted), wanted, strict=True):
        slots[slot] = sigma
    grid = [teacher[0], *slots, teacher[-1]]
    _check(grid)
    return grid


def rows_of(horizons: Sequence[float], sigmas: Sequence[float]) -> list[int]:
    """Row of each sigma among the stored horizons.

    Raises:
        ConfigError: a sigma that is not stored.
    """
    rows = []
    for sigma in sigmas:
        row = min(range(len(horizons)), key=lambda i: abs(horizons[i] - sigma))
        if abs(horizons[row] - sigma) > SIGMA_TOLERANCE:
            raise ConfigError(
                f"no state is stored at sigma {sigma} (nearest {horizons[row]}); add its nfe to teacher.nfe"
            )
        rows.append(row)
    return rows


def evenly(total: int, count: int) -> list[int]:
    """`count` of `total` rows, evenly spaced, with both ends; all if there are fewer. One row is the middle one."""
    if count >= total:
        return list(range(total))
    return [round(i * (total - 1) / (count - 1)) for i in range(count)] if count > 1 else [total // 2]


def _check(grid: Sequence[float]) -> None:
    falls = all(a > b for a, b in zip(grid, grid[1:], strict=False))
    if len(grid) < 2 or grid[0] != 1.0 or grid[-1] != 0.0 or not falls:
        raise ConfigError(
            f"sigmas must fall strictly from 1.0 to 0.0, got {list(grid)}; check the scheduler's settings"
        )


def _assign(slots: list[float], wanted: list[float]) -> list[int]:
    """The slot of each wanted sigma, in order, with the least total distance (dynamic programming over slots)."""
    infinity = float("inf")
    # best[i][j]: least distance with the first i wanted sigmas in the first j slots
    best = [[0.0] * (len(slots) + 1)] + [[infinity] * (len(slots) + 1) for _ in wanted]
    for i, sigma in enumerate(wanted, start=1):
        for j, slot in enumerate(slots, start=1):
            best[i][j] = min(best[i][j - 1], best[i - 1][j - 1] + abs(sigma - slot))
    chosen, j = [], len(slots)
    for i in range(len(wanted), 0, -1):
        while best[i][j - 1] == best[i][j]:
            j -= 1
        j -= 1
        chosen.append(j)
    return chosen[::-1]
