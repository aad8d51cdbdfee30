"""Fronts and hypervolumes of random points against brute force."""

from __future__ import annotations

from itertools import combinations, product
from math import prod
from operator import le
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ranksearch.front import Front, NumberedFront, Point, hypervolume, knee, non_dominated

small = st.integers(0, 5)
unit = st.floats(0, 1, allow_nan=False)


def points_of(coordinate: st.SearchStrategy[float], size: int, most: int) -> st.SearchStrategy[list[Point]]:
    return st.lists(st.tuples(*[coordinate] * size), max_size=most)


@given(st.integers(1, 4).flatmap(lambda size: points_of(small, size, 8)))
def test_hypervolume_counts_the_dominated_cells_of_a_grid(points: list[Point]) -> None:
    size = len(points[0]) if points else 2
    cells = product(range(5), repeat=size)
    count = sum(any(all(x <= c for x, c in zip(p, cell, strict=True)) for p in points) for cell in cells)
    assert hypervolume(points, (5.0,) * size) == count


@given(st.integers(2, 4).flatmap(lambda size: points_of(unit, size, 6)))
def test_hypervolume_equals_inclusion_and_exclusion(points: list[Point]) -> None:
    expected = 0.0
    for taken in range(1, len(points) + 1):
        for some in combinations(points, taken):
            shared = prod(1 - max(coordinate) for coordinate in zip(*some, strict=True))
            expected += (-1) ** (taken + 1) * shared
    size = len(points[0]) if points else 2
    assert hypervolume(points, (1.0,) * size) == pytest.approx(expected, abs=1e-9)


@given(st.integers(1, 4).flatmap(lambda size: points_of(small, size, 25)))
def test_non_dominated_equals_comparing_all_pairs(points: list[Point]) -> None:
    def beaten(p: Point) -> bool:
        return any(q != p and all(y <= x for x, y in zip(p, q, strict=True)) for q in points)

    kept = non_dominated(points)
    assert {points[i] for i in kept} == {p for p in points if not beaten(p)}
    assert len(kept) == len({points[i] for i in kept})
    assert all(points.index(points[i]) == i for i in kept)
    assert [points[i] for i in kept] == sorted(points[i] for i in kept)


@given(st.integers(1, 4).flatmap(lambda size: points_of(small, size, 25)), st.randoms(use_true_random=False))
def test_a_front_kept_up_to_date_is_that_of_all_points_in_any_order(points: list[Point], random: Random) -> None:
    front, left = NumberedFront(), []
    order = list(range(len(points)))
    random.shuffle(order)
    for number in order:
        left += front.put(points[number], number)
    assert front.numbers == non_dominated(points)
    assert front.points == [points[number] for number in front.numbers]
    assert sorted(left + front.numbers) == list(range(len(points))), "each that is not there any more is told once"


@given(st.integers(1, 4).flatmap(lambda size: points_of(small, size, 25)), st.randoms(use_true_random=False))
def test_a_front_that_grows_in_any_order_equals_comparing_all_pairs(points: list[Point], order: Random) -> None:
    def beaten(i: int, p: Point) -> bool:
        return any((q == p and j < i) or (q != p and all(map(le, q, p))) for j, q in enumerate(points))

    items = list(enumerate(points))
    barred = {i for i in range(len(points)) if i % 5 == 4}  # of points that can be on no front nothing is compared
    order.shuffle(items)
    front = Front(lambda item: item[1], lambda item: item[0])
    partly = Front(lambda item: None if item[0] in barred else item[1], lambda item: item[0])
    for item in items:
        assert front.take(item) == (item in front)
        partly.take(item)
    assert list(front) == [(i, p) for i, p in enumerate(points) if not beaten(i, p)]
    assert len(front) == len(list(front))
    assert [points[i] for i, _ in partly if i in barred] == []
    allowed = [p for i, p in enumerate(points) if i not in barred]
    assert {p for _, p in partly} == {allowed[i] for i in non_dominated(allowed)}


@given(points_of(unit, 2, 20).filter(bool))
def test_the_front_alone_has_the_hypervolume_of_all_points(points: list[Point]) -> None:
    front = [points[i] for i in non_dominated(points)]
    assert hypervolume(front, (1.0, 1.0)) == pytest.approx(hypervolume(points, (1.0, 1.0)), abs=1e-12)


@given(points_of(small, 2, 20).filter(bool), st.integers(1, 7), st.integers(1, 7))
def test_the_knee_does_not_depend_on_the_scales(points: list[Point], width: int, height: int) -> None:
    front = [points[i] for i in non_dominated(points)]
    scaled = [(x * 2**width, y * 2**height) for x, y in front]
    assert 0 <= knee(front) < len(front)
    assert knee(scaled) == knee(front)
