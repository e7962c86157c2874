"""Snapping: the student's sigmas are in the teacher's grid to the last bit, and nothing else moves."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rats.schemas.errors import ConfigError
from rats.schemas.horizons import rows_of, snap, union
from tests.support.shards import grid


def shifted(steps: int, shift: float) -> list[float]:
    return [shift * s / (1 + (shift - 1) * s) for s in grid(steps)]


@settings(max_examples=60, deadline=None)
@given(
    steps=st.integers(12, 60),
    nfes=st.lists(st.integers(1, 8), min_size=1, max_size=3, unique=True),
    shift=st.floats(0.5, 6),
    teacher_shift=st.floats(0.5, 6),
)
def test_a_snapped_grid_holds_every_student_sigma_and_keeps_length_ends_and_order(
    steps: int, nfes: list[int], shift: float, teacher_shift: float
) -> None:
    students = [shifted(nfe, shift) for nfe in nfes]
    if len(union(students)) > steps:
        return
    snapped = snap(shifted(steps, teacher_shift), students)
    assert len(snapped) == steps + 1
    assert (snapped[0], snapped[-1]) == (1.0, 0.0)
    assert all(a > b for a, b in zip(snapped, snapped[1:], strict=False))
    assert {snapped[row] for row in rows_of(snapped, union(students))} == set(union(students))


def test_only_the_nearest_sigmas_move() -> None:
    teacher = grid(50)
    snapped = snap(teacher, [grid(3)])
    moved = [i for i, (a, b) in enumerate(zip(teacher, snapped, strict=True)) if a != b]
    assert moved == [17, 33]
    assert (snapped[17], snapped[33]) == (grid(3)[1], grid(3)[2])


def test_two_student_sigmas_at_one_slot_take_neighbours() -> None:
    snapped = snap([1.0, 0.75, 0.5, 0.25, 0.0], [[1.0, 0.52, 0.0], [1.0, 0.49, 0.0]])
    assert snapped == [1.0, 0.52, 0.49, 0.25, 0.0]  # 0.52 is nearer to 0.75 than 0.49 to 0.25


def test_more_student_sigmas_than_slots_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"raise teacher\.steps"):
        snap(grid(3), [grid(8)])


def test_a_grid_that_is_full_becomes_the_students() -> None:
    assert snap(shifted(4, 3.0), [grid(4)]) == grid(4)


@pytest.mark.parametrize("bad", [[], [1.0], [1.0, 0.5], [0.9, 0.0], [1.0, 0.5, 0.5, 0.0], [1.0, float("nan"), 0.0]])
def test_a_grid_that_does_not_fall_from_one_to_zero_is_refused(bad: list[float]) -> None:
    with pytest.raises(ConfigError, match="fall strictly"):
        union([bad])
    with pytest.raises(ConfigError, match="fall strictly"):
        snap(bad, [grid(3)])


def test_the_union_takes_two_roundings_of_one_sigma_as_one() -> None:
    assert union([[1.0, 0.5, 0.0], [1.0, 0.5 + 3e-8, 0.0]]) == [1.0, 0.5 + 3e-8, 0.0]
    assert union([grid(3), grid(5), grid(8)]) == sorted({s for n in (3, 5, 8) for s in grid(n)}, reverse=True)


def test_rows_are_looked_up_exactly() -> None:
    horizons = union([grid(3), grid(8)])
    assert [horizons[row] for row in rows_of(horizons, grid(3))] == grid(3)
    with pytest.raises(ConfigError, match=r"add its nfe to teacher\.nfe"):
        rows_of(horizons, grid(5))
