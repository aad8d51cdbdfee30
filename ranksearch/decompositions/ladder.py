"""Predicted errors of formats that are fitted: measured at a few ranks, on a line in between.

A decomposition that is not nested has an error at every rank only where it is fitted. A price table needs hundreds, so
short fits climb a ladder of ranks (each starts from the one below), and errors in between are interpolated: the
logarithm of the error over that of the rank is nearly straight. The top of every ladder is the rank at which the format
is exact.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ranksearch.decompositions.als import Factors, cp_als

FLOOR = 1e-6
"""Where lines of log error end, at the exact rank."""
_SWEEPS = 8
_WORK = 1.5e11
"""Multiply-accumulates that a ladder may take, about ten seconds of one core."""
_CORES = (0.25, 0.5, 1.0)
"""Shares of the channels at which the errors of a Tucker-2 core are measured."""
_LARGEST = 2**20
"""Values of the largest core that is measured; above, errors are those of the largest measured, at the same share."""


def cp_ladder(tensor: Tensor, top: int) -> tuple[list[float], list[float]]:
    """Ranks 1, 2, 4, ... and their relative squared errors, the exact rank ``top`` with 0 last.

    Args:
        tensor: of any order.
        top: a rank at which CP is exact.
    """
    values = tensor.numel()
    parameters = sum(tensor.shape)
    # Up to the rank of as many parameters as values, where little is lost; which rungs depends on the sizes alone.
    ranks = [1 << i for i in range(64) if (1 << i) < min(top, 1.5 * values / parameters)]
    ranks = [rank for rank in ranks if 8.0 * _SWEEPS * values * rank <= _WORK] or [1]
    errors: list[float] = []
    fitted: Factors | None = None
    for rank in ranks:
        if errors and errors[-1] < FLOOR:
            errors.append(errors[-1])
            continue
        fit = cp_als(tensor, rank, start=fitted, sweeps=_SWEEPS)
        fitted = fit.factors
        errors.append(min([fit.error, *errors[-1:]]))
    return [*(rank for rank in ranks if rank < top), top], [*errors[: sum(rank < top for rank in ranks)], 0.0]


def interpolated(places: Sequence[float], errors: Sequence[float], place: float) -> float:
    """The error at ``place``: its logarithm is on a line over that of the place; outside, that of the end.

    The line ends at a floor, so that it can reach an error of 0.

    Args:
        places: rising; positive.
        errors: at the places, falling.
        place: positive.
    """
    at = bisect_left(places, place)
    if at == len(places) or at == 0 or places[at] == place or errors[at - 1] <= 0:
        return errors[min(at, len(places) - 1)]
    share = math.log(place / places[at - 1]) / math.log(places[at] / places[at - 1])
    below, above = (math.log(max(error, FLOOR)) for error in errors[at - 1 : at + 1])
    return math.exp(below + share * (above - below))


def resampled(ranks: Sequence[float], errors: Sequence[float], points: int) -> list[float]:
    """The ladder's errors at ``points`` ranks from 1 to its top, evenly spaced in the logarithm."""
    return [interpolated(ranks, errors, ranks[-1] ** (i / (points - 1))) for i in range(points - 1)] + [errors[-1]]


def core_errors(core: Tensor, measured: Callable[[Tensor], list[float]]) -> Tensor:
    """What is ``measured`` of the leading parts of a Tucker-2 core ``(T, S, *spatial)``, for :func:`core_error`."""
    rows: list[list[float]] = []
    for share in _CORES:
        r_out, r_in = (max(1, math.ceil(share * n)) for n in core.shape[:2])
        part = core[:r_out, :r_in]
        if not rows or part.numel() <= _LARGEST:
            rows.append(measured(part))
    rows += [rows[-1]] * (len(_CORES) - len(rows))
    return torch.tensor(rows, dtype=torch.float64)


def core_error(errors: Tensor, share: float, rank: int, top: int) -> float:
    """The error of a core at ``rank``, between those measured.

    Args:
        errors: as :func:`core_errors` gives them.
        share: product of the core's channels over that of the whole one's.
        rank: from 1 to ``top``.
        top: the rank at which the core is exact, above 1.
    """
    size = 1 + math.log(share) / (2 * math.log(1 / _CORES[0]))
    return on_grid(errors.tolist(), size, math.log(rank) / math.log(top))


def on_grid(table: Sequence[Sequence[float]], row: float, column: float) -> float:
    """The entry at a place of the table, 0 to 1 along both axes: its logarithm is bilinear."""

    def between(values: Sequence[float], share: float) -> float:
        position = min(max(share, 0.0), 1.0) * (len(values) - 1)
        low = min(int(position), max(len(values) - 2, 0))
        high = min(low + 1, len(values) - 1)
        return values[low] + (position - low) * (values[high] - values[low])

    logs = [between([math.log(max(error, FLOOR)) for error in errors], column) for errors in table]
    found = between(logs, row)
    return math.exp(found) if found > math.log(FLOOR) else 0.0
