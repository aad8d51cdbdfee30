"""EVBMF: ranks from the analytic solution of variational Bayesian matrix factorisation, weakened.

S. Nakajima, M. Sugiyama, S. D. Babacan, R. Tomioka, "Global Analytic Solution of Fully-observed Variational Bayesian
Matrix Factorization", JMLR 14, 2013: an L x M matrix (L <= M) is a product of two Gaussian factors plus noise of
variance s2. With empirical Bayes for the factors' variances, singular value g_h survives where x_h = g_h^2 / (M s2) is
over a threshold, and s2 minimises a function of one variable (their section on the global EVB solution):

    tau(x) = (x - (1 + a) + sqrt((x - (1 + a))^2 - 4 a)) / 2,    a = L / M,
    Omega(s2) = sum_h psi(x_h),   psi(x) = x - log x + [x > x0] (log(tau + 1) + a log(tau / a + 1) - tau),
    x0 = (1 + tau0)(1 + a / tau0),   tau0 the root of log(tau + 1) / tau + log(tau / a + 1) / (tau / a) = 1.

J. Gusak et al., "Automated Multi-Stage Compression of Neural Networks" (MUSCO), ICCV workshops 2019, weaken the rank r
of each channel unfolding towards that of EVBMF, ``max(8, r - w (r - r_EVBMF))`` with w = 0.8. Ours: w is swept over all
of its breakpoints, beyond 1 as well, to cover the range of MACs; a layer takes its cheapest candidate whose ranks are
all at least the weakened ones, of any format whose ranks are those of unfoldings, and stays dense where there is none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import inf, log1p, sqrt

import numpy as np
from numpy.typing import NDArray

from ranksearch.strategies.ladder import Choices, sweep
from ranksearch.table import UNFOLDINGS, Candidate, LayerPrices, PriceTable, unfolding_shape

_GRID = 256
"""Noise variances, evenly spread by their logarithm, between which the minimum is then narrowed down."""
_NARROWINGS = 60


@dataclass(frozen=True, kw_only=True)
class Evbmf:
    """Rank maps of one weakening."""

    weakening: float | Sequence[float] | None = None
    """w, or several; all from 0 on by default."""
    floor: int = 8
    """The least rank that weakening leads to."""

    name = "evbmf"

    def __post_init__(self) -> None:
        values = [self.weakening] if isinstance(self.weakening, int | float) else self.weakening
        if values is not None:
            if not values or not all(isinstance(w, int | float) and 0 <= w < inf for w in values):
                raise ValueError(f"weakening must be one or more numbers from 0 on, found {self.weakening!r}")
            object.__setattr__(self, "weakening", tuple(float(w) for w in values))
        if not isinstance(self.floor, int) or self.floor < 1:
            raise ValueError(f"floor must be a whole number from 1 on, found {self.floor!r}")

    def maps(self, table: PriceTable) -> tuple[Choices, ...]:
        """The rank map of every weakening, by rising weakening, or of those given."""
        steps = [_steps(layer, self.floor) for layer in table.layers]
        if isinstance(self.weakening, tuple):
            return tuple(_at(table.dense, steps, w) for w in self.weakening)
        return sweep(table.dense, steps)


def _at(dense: Choices, steps: Sequence[Sequence[tuple[float, int]]], weakening: float) -> Choices:
    """The choices at one weakening."""
    reached = [[choice for at, choice in layer if at <= weakening] for layer in steps]
    return tuple(layer[-1] if layer else top for layer, top in zip(reached, dense, strict=True))


def _steps(layer: LayerPrices, floor: int) -> list[tuple[float, int]]:
    """Weakenings at which the layer's choice changes, by rising weakening, with the choice from there on."""
    # Of several widths, which cost the same MACs, the one that errs least.
    places = sorted(range(len(layer.candidates)), key=lambda i: (layer.candidates[i].macs, layer.candidates[i].error))
    found = sorted((_least_weakening(layer, layer.candidates[i], floor), place) for place, i in enumerate(places))
    steps: list[tuple[float, int]] = []
    for at, place in found:
        if at < inf and (not steps or place < steps[-1][1]):
            steps.append((at, place))
    return [(at, places[place]) for at, place in steps]


def _least_weakening(layer: LayerPrices, candidate: Candidate, floor: int) -> float:
    """The weakening from which on the weakened ranks are at most those of the candidate."""
    if candidate.dense:
        return 0.0
    if candidate.format not in UNFOLDINGS:
        return inf
    least = 0.0
    for name, rank in zip(UNFOLDINGS[candidate.format], candidate.ranks, strict=True):
        shape = unfolding_shape(layer.conv, name)
        full = min(shape)
        target = evb_rank(layer.spectrum(name), shape)
        if rank < min(floor, full):
            return inf
        if rank < full:
            least = max(least, (full - rank) / (full - target)) if target < full else inf
    return least


@lru_cache(maxsize=4096)
def evb_rank(values: tuple[float, ...], shape: tuple[int, int]) -> int:
    """How many singular values the empirical variational Bayes solution keeps, the noise being unknown.

    Args:
        values: singular values, largest first; those left out are zero.
        shape: of the matrix, either way round.
    """
    if not values[0]:
        return 0
    rows, columns = min(shape), max(shape)
    least = columns * evb_noise(values, shape) * _threshold(rows / columns)
    return int((np.square(values) > least).sum())


def evb_noise(values: tuple[float, ...], shape: tuple[int, int]) -> float:
    """The variance s2 of the noise, of a matrix that is not zero."""
    rows, columns = min(shape), max(shape)
    squares = np.zeros(rows)
    squares[: len(values)] = np.square(values) / (columns * values[0] ** 2)
    ratio = rows / columns
    return values[0] ** 2 * _noise(squares, ratio, _threshold(ratio))


def _threshold(ratio: float) -> float:
    """x0: the least x at which a singular value is kept; tau0 by bisection."""
    low, high = 1e-9 * sqrt(ratio), 10.0
    for _ in range(100):
        middle = (low + high) / 2
        above = log1p(middle) / middle + log1p(middle / ratio) / (middle / ratio) > 1
        low, high = (middle, high) if above else (low, middle)
    return (1 + low) * (1 + ratio / low)


def _noise(squares: NDArray[np.float64], ratio: float, threshold: float) -> float:
    """The noise variance that minimises Omega, within the bounds that the solution must lie in."""
    rows = len(squares)
    most = max(1, int(np.ceil(rows / (1 + ratio))) - 1)
    """No more singular values than this can be kept."""
    upper = float(squares.mean())
    tail = squares[min(most, rows - 1) :]
    lower = min(max(float(tail[0]) / threshold, float(tail.mean()), 1e-16 * upper), upper)
    grid = np.geomspace(lower, upper, _GRID)
    best = int(np.argmin(_omega(grid, squares, ratio, threshold)))
    # Golden section between the grid's neighbours of its best point.
    low, high = np.log(grid[max(best - 1, 0)]), np.log(grid[min(best + 1, _GRID - 1)])
    golden = (sqrt(5) - 1) / 2
    for _ in range(_NARROWINGS):
        inner = np.array([high - golden * (high - low), low + golden * (high - low)])
        left, right = _omega(np.exp(inner), squares, ratio, threshold)
        low, high = (low, inner[1]) if left <= right else (inner[0], high)
    return float(np.exp((low + high) / 2))


def _omega(
    noise: NDArray[np.float64], squares: NDArray[np.float64], ratio: float, threshold: float
) -> NDArray[np.float64]:
    """Omega at every ``noise``, but for the logarithms of the singular values, which do not depend on it."""
    x = squares / noise[:, None]
    over = np.maximum(x, threshold)
    tau = (over - (1 + ratio) + np.sqrt(np.maximum((over - (1 + ratio)) ** 2 - 4 * ratio, 0.0))) / 2
    kept = np.log1p(tau) + ratio * np.log1p(tau / ratio) - tau
    terms = x + np.log(noise)[:, None] + np.where(x > threshold, kept, 0.0)
    total: NDArray[np.float64] = terms.sum(axis=1)
    return total
