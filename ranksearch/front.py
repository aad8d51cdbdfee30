"""Fronts of points: non-dominated sets, hypervolume, knee; no tensors.

Points are minimised in every coordinate; callers flip the sign of what is maximised.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from typing import Generic, TypeVar

Point = tuple[float, ...]
Item = TypeVar("Item")


def dominates(a: Point, b: Point) -> bool:
    """Whether ``a`` is at least as good as ``b`` everywhere and better somewhere."""
    return a != b and all(x <= y for x, y in zip(a, b, strict=True))


def non_dominated(points: Sequence[Point]) -> list[int]:
    """Indices of the points that no other dominates, by their first coordinate; of equal points the first only."""
    kept: list[int] = []
    for i in sorted(range(len(points)), key=lambda i: (points[i], i)):
        # In lexicographic order a point can be dominated only by one that was kept before it: of two objectives by the
        # last of them, if by any.
        rivals = kept[-1:] if len(points[i]) == 2 else kept
        if not any(all(x <= y for x, y in zip(points[j], points[i], strict=True)) for j in rivals):
            kept.append(i)
    return kept


class NumberedFront:
    """The points put in that no other dominates, kept up to date one after the other, each with its number.

    Of equal points the one of the least number stays. In two objectives a point takes logarithmic time, but for those
    that it pushes off.
    """

    def __init__(self) -> None:
        self.points: list[Point] = []
        """In lexicographic order."""
        self.numbers: list[int] = []

    def put(self, point: Point, number: int) -> list[int]:
        """Add a point; returns the numbers that are not on the front any more, its own where it does not get there."""
        at = bisect_left(self.points, point)
        if self.points[at : at + 1] == [point]:
            left, self.numbers[at] = max(number, self.numbers[at]), min(number, self.numbers[at])
            return [left] if left != self.numbers[at] else []
        flat = len(point) == 2  # then the second coordinate falls along the front
        if any(dominates(p, point) for p in self.points[max(0, at - 1) if flat else 0 : at]):
            return [number]
        end = at
        while flat and end < len(self.points) and dominates(point, self.points[end]):
            end += 1
        beaten = (
            range(at, end) if flat else [j for j in range(at, len(self.points)) if dominates(point, self.points[j])]
        )
        left_off = [self.numbers[j] for j in beaten]
        for j in reversed(beaten):
            del self.points[j], self.numbers[j]
        self.points.insert(at, point)
        self.numbers.insert(at, number)
        return left_off


class Front(Generic[Item]):
    """Of items that come one by one, in any order, those that no other dominates; of equal points the first by rank.

    Its members are those that :func:`non_dominated` finds among all items by their rank.

    Args:
        point: an item's point; None where it can be on no front.
        rank: a number of an item that no other item has.
    """

    def __init__(self, point: Callable[[Item], Point | None], rank: Callable[[Item], int]) -> None:
        self._point = point
        self._rank = rank
        self._front = NumberedFront()
        self._members: dict[int, Item] = {}

    def take(self, item: Item) -> bool:
        """Hear of an item; whether it is a member now."""
        point, rank = self._point(item), self._rank(item)
        if point is None:
            return False
        self._members[rank] = item
        for left in self._front.put(point, rank):
            del self._members[left]
        return rank in self._members

    def __contains__(self, item: Item) -> bool:
        return self._rank(item) in self._members

    def __iter__(self) -> Iterator[Item]:
        return (self._members[rank] for rank in sorted(self._members))

    def __len__(self) -> int:
        return len(self._members)


def hypervolume(points: Sequence[Point], reference: Point) -> float:
    """Volume dominated by ``points`` within ``reference``, by slicing along the last coordinate.

    Exact for any number of objectives; in two it is one sweep.
    """
    inside = [p for p in points if all(x < r for x, r in zip(p, reference, strict=True))]
    if not inside:
        return 0.0
    if len(reference) == 1:
        return reference[0] - min(p[0] for p in inside)
    inside.sort(key=lambda p: p[-1])
    volume, least = 0.0, reference[0]
    for i, point in enumerate(inside):
        upper = inside[i + 1][-1] if i + 1 < len(inside) else reference[-1]
        least = min(least, point[0])
        if upper > point[-1]:
            flat = len(reference) == 2
            slice_ = reference[0] - least if flat else hypervolume([p[:-1] for p in inside[: i + 1]], reference[:-1])
            volume += (upper - point[-1]) * slice_
    return volume


def knee(points: Sequence[Point]) -> int:
    """Index of the point of a two-objective front furthest below the line through its two ends.

    Both coordinates are scaled to the front's own range first. Fewer than three points make no bend: then the point
    that is best in the second coordinate (quality, by convention), as the cheaper one may be of no use.
    """
    order = sorted(range(len(points)), key=lambda i: points[i])
    if len(order) < 3:
        return min(order, key=lambda i: points[i][1])
    (x0, y0), (x1, y1) = (points[order[0]][:2], points[order[-1]][:2])
    width, height = (x1 - x0) or 1.0, (y0 - y1) or 1.0
    return max(order, key=lambda i: (x1 - points[i][0]) / width + (y0 - points[i][1]) / height)
