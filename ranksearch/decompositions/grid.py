"""Which ranks are offered for a layer: every ratio (or number) of the space for every rank, or what a format offers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import product

from ranksearch.conv import Conv
from ranksearch.decompositions.format import Format, OwnGrid, Ranks, max_rank
from ranksearch.space import RanksSpec


def rank_grid(form: Format, conv: Conv, spec: RanksSpec) -> list[Ranks]:
    """The rank tuples to offer within the bounds of a layer."""
    return form.grid(conv.group, spec) if isinstance(form, OwnGrid) else shares(spec, max_rank(form, conv))


def shares(spec: RanksSpec, wholes: Sequence[int], bounds: Sequence[int] | None = None) -> list[Ranks]:
    """Rank tuples by shares of ``wholes``, or by numbers, none above ``bounds`` (the wholes by default)."""
    bounds = wholes if bounds is None else bounds
    if spec.values is not None:
        return list(product(*(sorted({min(value, bound) for value in spec.values}) for bound in bounds)))
    pairs = list(zip(wholes, bounds, strict=True))
    if spec.joint:
        return distinct(tuple(_rank(spec, ratio, *pair) for pair in pairs) for ratio in sorted(spec.ratios))
    return list(product(*(sorted({_rank(spec, ratio, *pair) for ratio in spec.ratios}) for pair in pairs)))


def _rank(spec: RanksSpec, ratio: float, whole: int, bound: int) -> int:
    return rounded_up(ratio * whole, spec.multiple, bound)


def rounded_up(rank: float, multiple: int, bound: int) -> int:
    """The next multiple from ``rank`` on, at least one of them and at most ``bound``."""
    return min(bound, max(1, math.ceil(round(rank / multiple, 6))) * multiple)


def distinct(grid: Iterable[Ranks]) -> list[Ranks]:
    """The rank tuples, each once, in their order."""
    return list(dict.fromkeys(grid))
