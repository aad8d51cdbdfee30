"""Fronts: the cases with known answers. Random points are in tests/properties."""

from __future__ import annotations

import pytest

from ranksearch.front import dominates, hypervolume, knee, non_dominated


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ((1.0, 2.0), (1.0, 3.0), True),
        ((1.0, 2.0), (2.0, 3.0), True),
        ((1.0, 2.0), (1.0, 2.0), False),
        ((1.0, 3.0), (2.0, 1.0), False),
        ((2.0, 3.0), (1.0, 3.0), False),
    ],
)
def test_dominates(a: tuple[float, ...], b: tuple[float, ...], expected: bool) -> None:
    assert dominates(a, b) is expected


def test_non_dominated_goes_by_the_first_coordinate_and_keeps_the_first_of_equals() -> None:
    points = [(3.0, 1.0), (1.0, 3.0), (2.0, 2.0), (1.0, 3.0), (2.0, 2.5), (3.0, 1.0)]
    assert non_dominated(points) == [1, 2, 0]


def test_nothing_has_no_front_and_no_volume() -> None:
    assert non_dominated([]) == []
    assert hypervolume([], (1.0, 1.0)) == 0.0


def test_hypervolume_of_two_steps() -> None:
    # Below the reference (4, 4): a box of 3 by 2, and 2 by 1 more that the second point adds.
    assert hypervolume([(1.0, 2.0), (2.0, 1.0)], (4.0, 4.0)) == 8.0


def test_points_at_or_beyond_the_reference_add_nothing() -> None:
    assert hypervolume([(1.0, 1.0), (0.0, 2.0), (2.0, 0.0), (5.0, -1.0)], (2.0, 2.0)) == 1.0


def test_hypervolume_of_one_objective_is_a_length() -> None:
    assert hypervolume([(0.25,), (0.5,)], (1.0,)) == 0.75


def test_hypervolume_of_a_corner_in_three_objectives() -> None:
    # Three unit bars along the axes of a cube of 2, sharing one unit cube: seen from the reference, 8 - 1 cells.
    points = [(0.0, 0.0, 1.0), (0.0, 1.0, 0.0), (1.0, 0.0, 0.0)]
    assert hypervolume(points, (2.0, 2.0, 2.0)) == 7.0


def test_knee_is_the_corner() -> None:
    front = [(0.0, 10.0), (1.0, 2.0), (5.0, 1.0), (10.0, 0.0)]
    assert knee(front) == 1
    assert knee([(1000 * x, y / 1000) for x, y in front]) == 1
    assert knee([front[2], front[1], front[3], front[0]]) == 1


def test_a_front_of_fewer_than_three_points_has_its_best_quality_as_knee() -> None:
    assert knee([(2.0, 1.0)]) == 0
    assert knee([(2.0, 1.0), (1.0, 2.0)]) == 0
    assert knee([(1.0, 2.0), (2.0, 1.0)]) == 1
