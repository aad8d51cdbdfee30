"""ALDS: one bound on the largest relative error of any layer, the folded kernels cut into groups of columns.

L. Liebenwein, A. Maalouf, D. Feldman, D. Rus, "Compressing Neural Networks: Towards Determining the Optimal Layer-wise
Decomposition", NeurIPS 2021, their algorithm ALDS. The kernel, folded to T x (S h w), is cut into k groups of input
channels, each truncated to rank j. Layer l then errs, relative to its norm, by at most

    e_l = max over groups of sigma_{j+1}(group) / sigma_1(W_l),      at the cost of j (k T + S h w) parameters.

For given k the budget is met by one threshold on e over all layers, by root finding; for given budgets of the layers
the best k of each is taken; the two alternate 4 times from 15 random starts, and the least largest error is kept.

Ours: under one threshold the layers do not depend on each other, so with the cheapest k of each layer at every
threshold one root finding gives the least largest error of all, which the alternation only comes near to; that is the
default, ``exact: false`` is theirs (with one more start, k = 1 everywhere). A MAC budget too (every parameter of the
two stages is used once an output pixel). And, as the table's candidates are other formats, what ALDS decides is each
layer's cost: the layer takes its candidate of least predicted error within that. Every budget gives a rank map, worked
out when it is its turn. Read from the table: the spectra ``columns-k``, for every k to be tried.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from math import inf, prod
from operator import neg
from typing import Final

import numpy as np

from ranksearch.errors import PriceError
from ranksearch.strategies.history import tried
from ranksearch.strategies.hull import Cost, check_cost, cost_of
from ranksearch.strategies.ladder import Choices, van_der_corput
from ranksearch.table import LayerPrices, PriceTable
from ranksearch.trial import DONE, Proposal, Signal, Trial

NAME: Final = "alds"
RUNGS: Final = 127
"""Budgets that are tried at most."""
STARTS: Final = 15
ROUNDS: Final = 4


@dataclass(frozen=True, kw_only=True, eq=False)
class Folded:
    """One layer, cut into any of the given numbers of groups."""

    errors: tuple[tuple[float, ...], ...]
    """For every number of groups: the error at the ranks 1, 2, ..., which never rises and ends with 0."""
    units: tuple[int, ...]
    """For every number of groups: what one rank costs."""
    dense: int
    """What the layer costs as it is; nothing costs more."""

    def cost(self, k: int, error: float) -> int:
        """The least cost of an error of at most ``error`` with the ``k``-th number of groups."""
        rank = 1 + bisect_left(self.errors[k], -error, key=neg)
        return min(self.dense, rank * self.units[k])

    def error(self, k: int, cost: int) -> float:
        """The error that ``cost`` buys with the ``k``-th number of groups; infinite where not even rank 1."""
        if cost >= self.dense:
            return 0.0
        rank = min(cost // self.units[k], len(self.errors[k]))
        return self.errors[k][rank - 1] if rank else inf


@dataclass(frozen=True, kw_only=True)
class Alds:
    """Rank maps of one largest error: at the targets, then at budgets spread evenly; DONE after the last new one."""

    seed: int
    targets: tuple[float, ...] = ()
    """Shares of the dense network's MACs, each for the largest budget whose rank map is within it."""
    max_macs_ratio: float = inf
    """No rank map with more MACs than this share is tried."""
    max_latency_ratio: float = inf
    """Nor any that is predicted to take more than this share of the dense latency."""
    cost: Cost = "macs"
    """What the budget is of: ``macs`` or ``params``, which ranks are in proportion to."""
    exact: bool = True
    """Whether the least largest error is found at once; else by the paper's alternation."""

    def __post_init__(self) -> None:
        check_cost(self.cost)
        if self.cost not in ("macs", "params"):
            raise ValueError(f"cost must be macs or params, found {self.cost!r}")

    def propose(self, table: PriceTable, trials: Sequence[Trial]) -> Proposal | Signal:
        """The next rank map, or DONE."""
        known, most = tried(trials), self.max_macs_ratio * table.dense_macs
        aimed = (_aimed(self, table, target) for target in self.targets)
        for choices in chain(aimed, (self.rung(table, k) for k in range(1, RUNGS + 1))):
            slow = self.max_latency_ratio < inf and table.latency_ratio(choices) > self.max_latency_ratio
            if choices not in known and table.macs(choices) <= most and not slow:
                return Proposal(choices=choices, origin=NAME)
        return DONE

    def rung(self, table: PriceTable, k: int) -> Choices:
        """The rank map at the ``k``-th budget between the cheapest and the dense network."""
        return _rung(self, table, k)


@lru_cache(maxsize=4 * RUNGS)
def _rung(rule: Alds, table: PriceTable, k: int) -> Choices:
    least, most = _range(_costs(rule, table))
    return _within(rule, table, int(least + van_der_corput(k) * (most - least)))


@lru_cache(maxsize=32)
def _aimed(rule: Alds, table: PriceTable, target: float) -> Choices:
    """The rank map of the largest budget that keeps it within a share of the MACs: layers round their costs down."""
    low, high = _range(_costs(rule, table))
    while low < high:
        middle = (low + high + 1) // 2
        fits = table.macs(_within(rule, table, middle)) <= target * table.dense_macs
        low, high = (middle, high) if fits else (low, middle - 1)
    return _within(rule, table, low)


def _costs(rule: Alds, table: PriceTable) -> list[list[int]]:
    """What every candidate of every layer costs."""
    return [[cost_of(candidate, rule.cost) for candidate in layer.candidates] for layer in table.layers]


def _range(costs: list[list[int]]) -> tuple[int, int]:
    """The least budget and that of the dense network."""
    return sum(min(layer) for layer in costs), sum(layer[-1] for layer in costs)


def _within(rule: Alds, table: PriceTable, budget: int) -> Choices:
    """The rank map at a budget."""
    costs, layers = _costs(rule, table), _folded(table, rule.cost)
    shares, _ = allocate(layers, budget) if rule.exact else alternate(layers, budget, seed=rule.seed)
    choices = []
    for layer, prices, share in zip(table.layers, costs, shares, strict=True):
        within = [i for i, cost in enumerate(prices) if cost <= share]
        cheapest = prices.index(min(prices))
        choices.append(min(within, key=lambda i: (layer.candidates[i].error, prices[i]), default=cheapest))
    return tuple(choices)


@lru_cache(maxsize=4)
def _folded(table: PriceTable, cost: Cost) -> tuple[Folded, ...]:
    """The layers with every number of groups that the table has spectra for."""
    return tuple(fold(layer, cost) for layer in table.layers)


def fold(layer: LayerPrices, cost: Cost = "macs") -> Folded:
    """A layer's errors and costs in every number of groups.

    Raises:
        PriceError: the table has no ``columns-k`` for it.
    """
    conv = layer.conv
    groups = sorted(int(name.removeprefix("columns-")) for name, _ in layer.spectra if name.startswith("columns-"))
    if 1 not in groups:
        raise PriceError(
            f"{layer.name} must have the spectra `columns-1`, `columns-2`, ... in the price table for `alds`, found: "
            f"{', '.join(name for name, _ in layer.spectra) or 'none'}. Start a new search, whose table has them, or "
            "take a strategy that needs none, such as `knapsack`."
        )
    rows, columns = conv.group.weight_shape[0], prod(conv.group.weight_shape[1:])
    pixels = conv.macs // (rows * columns) if cost == "macs" else conv.groups  # times the layer's own groups
    norm = layer.spectrum("columns-1")[0] or 1.0
    return Folded(
        errors=tuple((*(s / norm for s in layer.spectrum(f"columns-{k}")[1:]), 0.0) for k in groups),
        units=tuple(pixels * (k * rows + columns) for k in groups),
        dense=pixels * rows * columns,
    )


def allocate(layers: Sequence[Folded], budget: int) -> tuple[tuple[int, ...], float]:
    """Every layer's cost within the budget, in its best groups, and the least largest error there is.

    Where even rank 1 everywhere is dearer than the budget, that is the answer; so below.
    """
    return share_out(layers, [range(len(layer.units)) for layer in layers], budget)


def alternate(layers: Sequence[Folded], budget: int, *, seed: int = 0) -> tuple[tuple[int, ...], float]:
    """As :func:`allocate`, by the paper's alternation from random groups: the error may be larger."""
    rng = np.random.default_rng([seed, budget])
    counts = [len(layer.units) for layer in layers]
    starts = [[0] * len(layers), *(rng.integers(counts).tolist() for _ in range(STARTS))]
    found: dict[tuple[int, ...], tuple[tuple[int, ...], float]] = {}
    for start in starts:
        ks = tuple(start)
        for _ in range(ROUNDS + 1):
            if ks in found:  # another start came by here
                break
            costs, _ = found[ks] = share_out(layers, [(k,) for k in ks], budget)
            ks = tuple(_best_groups(layer, k, cost) for layer, k, cost in zip(layers, ks, costs, strict=True))
    return min(found.values(), key=lambda one: (sum(one[0]) > budget, one[1], sum(one[0])))


def share_out(layers: Sequence[Folded], allowed: Sequence[Sequence[int]], budget: int) -> tuple[tuple[int, ...], float]:
    """Every layer's cost under the least threshold on the errors that meets the budget, and that threshold.

    Each layer takes the cheapest of its ``allowed`` numbers of groups, which are given by their places.
    The thresholds that matter are the errors themselves; the root is found among them by bisection.
    """
    pairs = list(zip(layers, allowed, strict=True))
    thresholds = sorted({error for layer, ks in pairs for k in ks for error in layer.errors[k]})

    def costs(at: int) -> tuple[int, ...]:
        return tuple(min(layer.cost(k, thresholds[at]) for k in ks) for layer, ks in pairs)

    low, high = 0, len(thresholds) - 1
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if sum(costs(middle)) <= budget else (middle + 1, high)
    return costs(low), thresholds[low]


def _best_groups(layer: Folded, current: int, cost: int) -> int:
    """The number of groups of least error at this cost; the current one where none is better."""
    return min(range(len(layer.units)), key=lambda k: (layer.error(k, cost), k != current, k))
