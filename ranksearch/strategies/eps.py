"""EPS: one tolerance of accuracy for the whole network, spent by every layer for itself.

A.-H. Phan et al., "Stable Low-rank Tensor Decomposition for Compression of Convolutional Neural Network", ECCV 2020
(arXiv:2008.05441), the choice of ranks in their experiments: per layer, a binary search finds the smallest rank whose
fall in accuracy, with only that layer decomposed, stays within EPS.

The falls are read off the price table (``price: drop`` with ``price_points: null`` is the paper's). Ours: a measured
fall need not shrink as the rank grows, so the binary search runs over the least fall at each cost or below, which finds
the cheapest candidate within EPS exactly; and EPS is swept over all the falls in the table instead of being tried by
hand.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from itertools import accumulate

from ranksearch.strategies.hull import layer_losses
from ranksearch.strategies.ladder import Choices, sweep
from ranksearch.table import PREDICTED, PriceTable


@dataclass(frozen=True, kw_only=True)
class Eps:
    """Rank maps of one tolerance."""

    price: str = PREDICTED

    name = "eps"

    def maps(self, table: PriceTable) -> tuple[Choices, ...]:
        """Every rank map that one tolerance gives, by rising tolerance, from that of dense on."""
        steps = []
        for falls in layer_losses(table, self.price):
            least = [-fall for fall in accumulate(falls, min)]
            # Candidates rise in MACs, the least fall so far only falls: its negative is sorted.
            steps.append([(eps, bisect_left(least, -eps)) for eps in sorted({-fall for fall in least})])
        return sweep(table.dense, steps)
