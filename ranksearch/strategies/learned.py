"""Prices that are learned from the trials, and what they promise.

Ours. A price says what replacing one layer alone is predicted to lose. Of a whole rank map m, the negative logarithm of
the accuracy (or, where that is the objective, the loss) is modelled as

    z(m) = b + sum over layers l of w(l, format) price(l, m_l) + e error(l, m_l),   w(l, f) = s + a_l + c_f,

a Bayesian linear regression on the trials so far: s is what the prices are worth, a_l what layer l differs by (how much
the network minds its error), c_f what the format differs by (errors compare ranks better than formats), e what the
predicted error is worth beside a price that was measured: the two err in different ways, and foretell networks together
better than either alone. The worse a trial the less it matters by how much, so its noise grows with z.
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass
from functools import lru_cache
from math import inf, isfinite, log
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ranksearch.front import non_dominated
from ranksearch.strategies.hull import Cost, layer_costs, layer_losses, whole_cost
from ranksearch.strategies.knapsack import predicted_front
from ranksearch.strategies.ladder import Choices
from ranksearch.table import PREDICTED, PriceTable
from ranksearch.trial import Trial

HISTORY: Final = 500
"""Trials that are learned from at most, the newest."""
LAYER_SPREAD: Final = 1.0
FORMAT_SPREAD: Final = 1.0
"""Standard deviations of a_l and c_f before any trial, as multiples of s."""
BOLDNESS: Final = 0.3
"""What is drawn from the posterior lies as much nearer to its mean: with a few dozen trials for some twenty weights,
draws from all of it mostly try what is worse than what is known."""
LEAST_ACCURACY: Final = 1e-3
NOISE: Final = 0.1
"""Standard deviation of a loss, as a share of what it is above the least one."""
WORST: Final = 2.0
"""A network is no worse than this many times the loss of a guess."""
LEAST_NOISE: Final = 0.01
"""The same as a share of the largest loss, at least."""
AT_THE_LIMIT: Final = 1e-6
"""What a network is worth, in accuracy, that is just as good as the budget's limit asks for."""
LEAST_WEIGHT: Final = 0.05
"""Smallest weight, as a multiple of s: no error is for nothing."""

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class _Prices:
    """The table as arrays: one column a candidate, layer after layer."""

    losses: list[list[float]]
    """Finite: a candidate that was measured to break the network counts twice the largest loss that is a number."""
    costs: list[list[int]]
    formats: tuple[str, ...]
    form: list[list[int]]
    """Index of each candidate's format; -1 for dense."""
    errors: list[list[float]]
    """Predicted; nothing where they are the price themselves."""


@lru_cache(maxsize=4)
def _prices(table: PriceTable, price: str, cost: Cost) -> _Prices:
    formats = tuple(sorted({c.format for layer in table.layers for c in layer.candidates if not c.dense}))
    losses, errors = layer_losses(table, price), layer_losses(table, PREDICTED)
    broken = 2 * max((loss for layer in losses for loss in layer if isfinite(loss)), default=0.0) or 1.0
    return _Prices(
        losses=[[loss if isfinite(loss) else broken for loss in layer] for layer in losses],
        errors=[[0.0] * len(layer) for layer in errors] if price == PREDICTED else errors,
        costs=layer_costs(table, cost),
        formats=formats,
        form=[[-1 if c.dense else formats.index(c.format) for c in layer.candidates] for layer in table.layers],
    )


@dataclass(frozen=True)
class _Quality:
    """How a trial's quality becomes a number that adds up over layers, and back to what the front is made of."""

    accuracy: bool
    """Whether the objective is the accuracy; else it is the loss."""
    least_accuracy: float = 0.0
    """The budget's limit, where the accuracy is the objective: what has less is of no use."""
    worst_loss: float = inf
    """That of a guess: what has more is of no use."""

    def of(self, trial: Trial) -> float | None:
        """Of a complete trial: the negative logarithm of its accuracy, or its loss. Less is better."""
        if trial.outcome is None:
            return None
        if self.accuracy:
            return -log(max(trial.outcome.accuracy_search, LEAST_ACCURACY))
        # A loss has no end: one that a broken network has would drown what the others differ by.
        return min(trial.outcome.loss, WORST * self.worst_loss)

    def shown(self, z: Floats) -> Floats:
        """The share of wrong answers, or the loss."""
        found: Floats = -np.expm1(-z) if self.accuracy else z
        return found

    def worst(self, z: Floats) -> float:
        """What every point of a front is better than."""
        if self.accuracy:
            return 1.0 - self.least_accuracy + AT_THE_LIMIT if self.least_accuracy > 0 else 1.0
        return min(float(z.max(initial=0.0)), self.worst_loss)


class LearnedPrices:
    """What the trials say of the prices."""

    def __init__(
        self,
        table: PriceTable,
        trials: Sequence[Trial],
        *,
        price: str,
        cost: Cost,
        objectives: Sequence[str],
        max_macs_ratio: float = inf,
        max_latency_ratio: float = inf,
        least_accuracy: float = 0.0,
        worst_loss: float = inf,
    ) -> None:
        self.prices = _prices(table, price, cost)
        self.quality = _Quality(accuracy="accuracy" in objectives, least_accuracy=least_accuracy, worst_loss=worst_loss)
        self.limit, self.slowest = table.dense_macs * max_macs_ratio, max_latency_ratio
        self.table, self.layers = table, len(table.layers)
        self.whole, self.other = map(float, whole_cost(table, cost))
        self.costs = [np.array(layer) for layer in self.prices.costs]
        self.macs = [np.array([c.macs for c in layer.candidates]) for layer in table.layers]
        maps = [trial for trial in trials if not trial.proposal.funnel]
        newest = sorted(maps, key=lambda trial: trial.index)[-HISTORY:]
        seen = [(trial.proposal.choices, self.quality.of(trial)) for trial in newest]
        scored = [(choices, loss) for choices, loss in seen if loss is not None]
        self.maps = [choices for choices, _ in scored]
        self.losses = np.array([loss for _, loss in scored])
        self.front = self._measured(maps)
        self.running = [t.proposal.choices for t in maps if t.state == "RUNNING"]
        self._learn()

    def _measured(self, trials: Sequence[Trial]) -> list[tuple[tuple[float, float], Choices]]:
        """The front of all feasible trials, however old: cost and loss with the rank map, by rising cost."""
        scored = [(trial, self.quality.of(trial)) for trial in trials if trial.feasible]
        found = [(trial.proposal.choices, loss) for trial, loss in scored if loss is not None]
        costs = self._cost(self._rows([choices for choices, _ in found])).tolist()
        points = [(cost, loss) for cost, (_, loss) in zip(costs, found, strict=True)]
        return [(points[i], found[i][0]) for i in non_dominated(points)]

    def allowed(self, choices: Choices) -> bool:
        """Whether a rank map keeps the budget's limits on MACs and latency."""
        return self.table.macs(choices) <= self.limit and self.table.latency_ratio(choices) <= self.slowest

    def features(self, choices: Sequence[int]) -> Floats:
        """``(3 + L + F,)``: what b, s, every a_l, every c_f and e are multiplied with."""
        found = np.zeros(3 + self.layers + len(self.prices.formats))
        found[0] = 1.0
        for layer, choice in enumerate(choices):
            found[-1] += self.prices.errors[layer][choice]
            loss, form = self.prices.losses[layer][choice], self.prices.form[layer][choice]
            found[1] += loss
            found[2 + layer] = loss
            if form >= 0:
                found[2 + self.layers + form] += loss
        return found

    def _learn(self) -> None:
        """Mean and a root of the covariance of the weights."""
        size = 3 + self.layers + len(self.prices.formats)
        self.mean, self.root = np.zeros(size), np.zeros((size, size))
        self.scale = self.mean[1] = 1.0
        if len(self.maps) < 2:
            return
        x = np.stack([self.features(choices) for choices in self.maps])
        low, high = float(self.losses.min()), float(self.losses.max())
        span = (high - low) or 1.0
        noise = NOISE * (self.losses - low) + LEAST_NOISE * span
        mixed = bool(x[:, -1].any())
        self.scale = _slope(x[:, 1], self.losses, noise) / (1 + mixed)
        spread = np.full(size, LAYER_SPREAD * self.scale)
        spread[0], spread[1] = span, self.scale
        spread[2 + self.layers : -1] = FORMAT_SPREAD * self.scale
        prior = np.zeros(size)
        prior[0], prior[1] = low, self.scale
        # Before any trial price and error say half of it each.
        prior[-1] = spread[-1] = _slope(x[:, -1], self.losses, noise) / 2 if mixed else 0.0
        scaled = x * spread / noise[:, None]
        half = np.linalg.inv(np.linalg.cholesky(np.eye(size) + scaled.T @ scaled)).T
        self.mean = prior + spread * (half @ (half.T @ (scaled.T @ ((self.losses - x @ prior) / noise))))
        self.root = spread[:, None] * half

    def draw(self, rng: np.random.Generator) -> Floats:
        """Weights drawn from the posterior, nearer to its mean than it says."""
        return self.mean + BOLDNESS * (self.root @ rng.standard_normal(len(self.mean)))

    def weighted(self, weights: Floats) -> list[list[float]]:
        """The loss that each candidate of each layer adds under these weights."""
        shares = np.append(weights[2 + self.layers : -1], 0.0)  # dense is of no format
        prices, found = self.prices, []
        for layer, (losses, form, errors) in enumerate(zip(prices.losses, prices.form, prices.errors, strict=True)):
            each = np.maximum(weights[1] + weights[2 + layer] + shares[form], LEAST_WEIGHT * self.scale)
            found.append((each * losses + max(weights[-1], 0.0) * np.array(errors)).tolist())
        return found

    def best(
        self, weights: Floats, known: Set[Choices], *, target: float | None = None, least: float = 0.0
    ) -> tuple[Choices, float] | None:
        """Of the front under these weights the new rank map that adds most hypervolume; None where all are known.

        With a ``target``, a share of the MACs, it is the dearest within that, unless it would be of no use. With a
        ``least`` share it is one of those with no fewer, if any of these adds something. Where none is expected to be
        of use, it is the one that lacks least. With it goes what all of them would add, as a share of the hypervolume
        that there is: what the trials to come would gain, were these the weights.
        """
        added = self.weighted(weights)
        drawn = predicted_front(self.prices.costs, added)
        if self.slowest < inf:  # what is cheap need not be fast
            drawn = tuple(dict.fromkeys([*drawn, *predicted_front(layer_costs(self.table, "latency"), added)]))
        new = self._rows([c for c in drawn if c not in known])
        new = new[self._totals(new, self.macs) + self.table.other_macs <= self.limit]
        if self.slowest < inf:
            new = new[[self.table.latency_ratio(choices) <= self.slowest for choices in new.tolist()]]
        if not len(new):
            return None
        losses = [np.array(layer) for layer in added]
        running = self._rows(self.running)
        expected = zip(self._cost(running).tolist(), self._totals(running, losses).tolist(), strict=True)
        seen = [point for point, _ in self.front] + [(cost, weights[0] + loss) for cost, loss in expected]
        front = np.array([seen[i] for i in non_dominated(seen)]).reshape(-1, 2)
        points = np.column_stack([self._cost(new), self.quality.shown(weights[0] + self._totals(new, losses))])
        front[:, 1] = self.quality.shown(front[:, 1])
        reference = np.array([1.0, self.quality.worst(self.losses)])
        there = area(front, reference)
        # Two sums of the same areas may differ in their last digit.
        promise = max(area(np.concatenate([front, points]), reference) / there - 1, 0.0) if there > 0 else inf
        macs = (self._totals(new, self.macs) + self.table.other_macs) / self.table.dense_macs
        merit = gains(points, front, reference)
        between = np.where(macs >= least, merit, 0.0)
        merit = between if between.any() else merit
        if not merit.any():
            merit = -np.abs(points[:, 1] - reference[1])
        if target is not None:
            within = (macs <= target) & (points[:, 1] < reference[1])
            merit = np.where(within, macs, -1.0) if within.any() else merit
        return tuple(new[int(np.argmax(merit))].tolist()), promise

    def incumbent(self, rng: np.random.Generator) -> Choices:
        """One of the measured front's rank maps; without any, dense, the cheapest or the fastest, which is allowed."""
        if not self.front:
            plain = (self.table.dense, (0,) * self.layers)
            return next((choices for choices in plain if self.allowed(choices)), self.table.fastest)
        return self.front[rng.integers(len(self.front))][1]

    def _cost(self, maps: Ints) -> Floats:
        """The cost of rank maps, one a row, as shares of the dense network's."""
        return (self.other + self._totals(maps, self.costs)) / self.whole

    def _rows(self, maps: Sequence[Choices]) -> Ints:
        """Rank maps as a matrix, one a row."""
        return np.array(maps, dtype=np.int64).reshape(-1, self.layers)

    def _totals(self, maps: Ints, values: Sequence[NDArray[Any]]) -> Floats:
        """The sum over the layers of the candidates' values, for every row of a matrix of rank maps."""
        found = np.zeros(len(maps))
        for each, column in zip(values, maps.T, strict=True):
            found += each[column]
        return found


def _slope(x: Floats, z: Floats, noise: Floats) -> float:
    """Of a line through the points ``(N,)``, weighted by their noise; where it does not rise, that of their ranges.

    1 where all the points have one x: they say nothing of it; that of a range of 1 where they have one z.
    """
    if not np.ptp(x) > 0:
        return 1.0
    centred = x - np.average(x, weights=noise**-2)
    slope = float((noise**-2 * centred * z).sum() / max((noise**-2 * centred**2).sum(), 1e-300))
    rise = float(np.ptp(z)) / max(float(np.ptp(x)), 1e-12)
    return slope if isfinite(slope) and slope > 0.01 * rise else rise or 1.0 / float(np.ptp(x))


def gains(points: Floats, front: Floats, reference: Floats) -> Floats:
    """The area that each of the points ``(N, 2)`` would add to that dominated by a front ``(M, 2)``, both minimised.

    The front is sorted by its first coordinate, no point of it dominating another.
    """
    inside = front[(front < reference).all(axis=1)]
    lefts = np.concatenate([[-np.inf], inside[:, 0]])
    rights = np.append(inside[:, 0], reference[0])
    heights = np.concatenate([[reference[1]], inside[:, 1]])
    # Between two neighbours of the front everything above the left one's height is dominated already.
    widths = np.clip(rights - np.maximum(lefts, points[:, :1]), 0.0, None)
    found: Floats = (widths * np.clip(heights - points[:, 1:], 0.0, None)).sum(axis=1)
    return found


def area(points: Floats, reference: Floats) -> float:
    """The hypervolume of points ``(N, 2)``, both coordinates minimised."""
    inside = points[(points < reference).all(axis=1)]
    inside = inside[np.lexsort((inside[:, 1], inside[:, 0]))]
    lowest = np.minimum.accumulate(inside[:, 1])
    widths = np.diff(np.append(inside[:, 0], reference[0]))
    return float((widths * (reference[1] - lowest)).sum())
