"""Retained energy: one threshold of the predicted error for every layer.

At the threshold eps, layer l takes its cheapest candidate of relative squared error at most eps, so it keeps at least
1 - eps of its energy (with statistics of the inputs, of its output's energy).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from ranksearch.strategies.ladder import Choices, next_rung, sweep
from ranksearch.table import PriceTable
from ranksearch.trial import Proposal, Signal, Trial

NAME = "energy"


@dataclass(frozen=True, kw_only=True)
class Energy:
    """Rank maps of one error threshold, spread evenly over the MACs of the network; DONE after the last of them."""

    def propose(self, table: PriceTable, trials: Sequence[Trial]) -> Proposal | Signal:
        """The next rank map, or DONE."""
        return next_rung(table, energy_maps(table), trials, NAME)


@lru_cache(maxsize=4)
def energy_maps(table: PriceTable) -> tuple[Choices, ...]:
    """Every rank map that one error threshold gives, by rising threshold."""
    steps = [[(c.error, layer.cheapest(c.error)) for c in layer.candidates] for layer in table.layers]
    return sweep(table.dense, steps)
