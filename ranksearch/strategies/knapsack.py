"""The exact multiple-choice knapsack: the whole front of cost against the sum of the layers' losses.

Ours, after the textbook programme (H. Kellerer, U. Pferschy, D. Pisinger, "Knapsack Problems", 2004, chapter 11): one
candidate is to be taken per layer, over all formats, ranks and dense; losses are assumed to add up. Two ways, both one
pass over the layers:

- *merging*: the non-dominated (cost, loss) pairs of the layers so far are combined with every candidate of the next,
  and the dominated ones dropped. Exact for any costs, as long as few pairs survive.
- *grid*: the least loss at every cost up to a multiple of a unit. With the greatest common divisor of the cost
  differences for the unit it is exact. Where that takes more than ``CELLS`` cells the unit is the range of costs over
  ``CELLS`` (0.006 %), each candidate's cost rounded up to it: budgets hold, and with L layers the result at a budget
  loses no more than the best at L units less.

Merging is tried first where the grid of the divisor is too large, and given up when more than ``PAIRS`` pairs come up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ranksearch.strategies.hull import Cost, check_cost, layer_costs, layer_losses
from ranksearch.strategies.ladder import Choices
from ranksearch.table import PREDICTED, PriceTable

CELLS: Final = 16_384
"""Cells of the grid at most, one layer's rounding apart."""
PAIRS: Final = 300_000
"""Pairs that merging looks at in one layer at most."""

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Options = tuple[Ints, Floats]
"""Costs and losses of one layer's candidates."""


@dataclass(frozen=True, kw_only=True)
class Knapsack:
    """Rank maps of the predicted front."""

    price: str = PREDICTED
    cost: Cost = "macs"
    """What the front is against: ``macs``, ``params``, ``latency`` or ``bit-operations``."""

    name = "knapsack"

    def __post_init__(self) -> None:
        check_cost(self.cost)

    def maps(self, table: PriceTable) -> tuple[Choices, ...]:
        """Every rank map of the front, by rising cost."""
        return predicted_front(layer_costs(table, self.cost), layer_losses(table, self.price))


def predicted_front(
    costs: Sequence[Sequence[int]], losses: Sequence[Sequence[float]], *, cells: int = CELLS, pairs: int = PAIRS
) -> tuple[Choices, ...]:
    """The choices, one candidate a layer, that no others beat in both total cost and total loss, by rising cost.

    Args:
        costs: of every candidate of every layer.
        losses: likewise.
        cells: of the grid at most; beyond, it rounds (see above).
        pairs: looked at by merging, in one layer, at most.
    """
    options = [(np.array(c, dtype=np.int64), np.array(e, dtype=np.float64)) for c, e in zip(costs, losses, strict=True)]
    kept = [_non_dominated(*layer) for layer in options]
    reduced = [(c[i] - c[i[0]], e[i]) for (c, e), i in zip(options, kept, strict=True)]
    reach = sum(int(c[-1]) for c, _ in reduced)
    divisor = int(np.gcd.reduce(np.concatenate([np.zeros(1, dtype=np.int64), *(c for c, _ in reduced)]))) or 1
    if reach // divisor < cells:
        found = _on_grid(reduced, divisor)
    else:
        merged = _merged(reduced, pairs)
        found = _on_grid(reduced, -(-reach // max(1, cells - len(reduced)))) if merged is None else merged
    chosen = np.stack([i[column] for i, column in zip(kept, found.T, strict=True)], axis=1)
    return tuple(tuple(row) for row in chosen[_non_dominated(*_totals(options, chosen))].tolist())


def _totals(options: Sequence[Options], chosen: Ints) -> Options:
    """Cost and loss of every row of choices."""
    cost, loss = np.zeros(len(chosen), dtype=np.int64), np.zeros(len(chosen))
    for (costs, losses), column in zip(options, chosen.T, strict=True):
        cost, loss = cost + costs[column], loss + losses[column]
    return cost, loss


def _non_dominated(cost: Ints, loss: Floats) -> Ints:
    """Indices of the pairs that no other beats, by rising cost; of equal ones the first."""
    order: Ints = np.lexsort((loss, cost))
    least = np.minimum.accumulate(loss[order])
    kept: Ints = order[np.concatenate([[True], loss[order][1:] < least[:-1]])]
    return kept


def _merged(options: Sequence[Options], pairs: int) -> Ints | None:
    """The front's rows of choices by merging; None where more than ``pairs`` pairs come up."""
    cost, loss = np.zeros(1, dtype=np.int64), np.zeros(1)
    links: list[tuple[Ints, Ints]] = []
    for costs, losses in options:
        if len(cost) * len(costs) > pairs:
            return None
        every_cost, every_loss = (cost[:, None] + costs).ravel(), (loss[:, None] + losses).ravel()
        left = _non_dominated(every_cost, every_loss)
        cost, loss = every_cost[left], every_loss[left]
        links.append((left // len(costs), left % len(costs)))
    columns, state = [], np.arange(len(cost))
    for parents, picked in reversed(links):
        columns.append(picked[state])
        state = parents[state]
    return np.stack(columns[::-1], axis=1)


def _on_grid(options: Sequence[Options], unit: int) -> Ints:
    """Rows of choices of least loss at every whole number of ``unit``, costs rounded up to it."""
    rounded = [(-(-costs // unit), losses) for costs, losses in options]
    cells = sum(int(costs[-1]) for costs, _ in rounded) + 1
    least = np.full(cells, np.inf)
    least[0] = 0.0
    reach, picks = 1, []
    for costs, losses in rounded:
        reached = reach + int(costs[-1])
        best, pick = np.full(cells, np.inf), np.zeros(cells, dtype=np.int16)
        ways, better = np.empty(reach), np.empty(reach, dtype=bool)
        for i, (at, loss) in enumerate(zip(costs.tolist(), losses.tolist(), strict=True)):
            window = slice(at, at + reach)
            np.add(least[:reach], loss, out=ways)
            np.less(ways, best[window], out=better)
            np.minimum(best[window], ways, out=best[window])
            # Candidates are counted upwards, so the latest better one is the largest.
            np.maximum(pick[window], better * np.int16(i), out=pick[window])
        least, reach = best, reached
        picks.append(pick)
    state = _non_dominated(np.arange(cells), least)
    columns = []
    for (costs, _), pick in zip(reversed(rounded), reversed(picks), strict=True):
        columns.append(pick[state].astype(np.int64))
        state = state - costs[columns[-1]]
    return np.stack(columns[::-1], axis=1)
