"""Predicted errors of formats that are fitted: measured at a few ranks, on a line in between.

A decomposition that is not nested has an error at every rank only where it is fitted. A price table needs hundreds, so
short fits climb a ladder of ranks (each starts from the one below), and errors in between are interpolated: the
logarithm of the error over that of the rank is nearly straight. The top of every ladder is the rank at which the format
is exact.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ranksearch.decompositions.als import Factors, cp_als

FLOOR = 1e-6
"""Where lines of log error end, at the exact rank."""
_SWEEPS = 8
_WORK = 2e11
"""Multiply-accumulates that a ladder may take, about ten seconds of one core."""


def cp_ladder(tensor: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """Ranks 1, 2, 4, ... and their relative squared errors, the exact rank ``top`` with 0 last.

    Args:
        tensor: of any order.
        top: a rank at which CP is exact.
    """
    ranks, errors, work = [], [], 0.0
    fitted: Factors | None = None
    rank, even = 1, tensor.numel() / sum(tensor.shape)  # about as many parameters as values: then CP is nearly exact
    while rank < min(top, 1.5 * even):
        work += 4.0 * _SWEEPS * tensor.numel() * rank
        if work > _WORK:
            break
        fit = cp_als(tensor, rank, start=fitted, sweeps=_SWEEPS)
        fitted = fit.factors
        ranks.append(rank)
        errors.append(fit.error)
        if fit.error < FLOOR:
            break
        rank *= 2
    falling = torch.tensor([*errors, 0.0], dtype=torch.float64).cummin(0).values
    return torch.tensor([*ranks, top], dtype=torch.float64), falling


def interpolated(ranks: Tensor, errors: Tensor, rank: float) -> float:
    """The error at ``rank``: the logarithm on a line over that of the rank between rungs, 0 at the last."""
    at = int(torch.searchsorted(ranks, torch.tensor(rank, dtype=ranks.dtype)))
    if at >= len(ranks) - 1 and rank >= float(ranks[-1]):
        return float(errors[-1])
    if float(ranks[at]) == rank or at == 0:
        return float(errors[at])
    low, high = (math.log(float(r)) for r in ranks[at - 1 : at + 1])
    share = (math.log(rank) - low) / (high - low)
    below, above = (math.log(max(float(e), FLOOR)) for e in errors[at - 1 : at + 1])
    return math.exp(below + share * (above - below))


def resampled(ranks: Tensor, errors: Tensor, points: int) -> Tensor:
    """The ladder's errors at ``points`` ranks from 1 to its top, evenly spaced in the logarithm."""
    top = math.log(float(ranks[-1]))
    at = [math.exp(top * i / (points - 1)) for i in range(points - 1)]
    return torch.tensor([*(interpolated(ranks, errors, rank) for rank in at), float(errors[-1])], dtype=torch.float64)


def on_grid(table: Tensor, place: Sequence[float]) -> float:
    """The entry of ``table`` at ``place`` (0 to 1 along every axis), linear in the logarithm in between."""
    values = table.double().clamp_min(FLOOR).log()
    for share in place:
        position = min(max(share, 0.0), 1.0) * (values.shape[0] - 1)
        low = min(int(position), max(values.shape[0] - 2, 0))
        high = min(low + 1, values.shape[0] - 1)
        values = values[low] + (position - low) * (values[high] - values[low])
    return math.exp(float(values))
