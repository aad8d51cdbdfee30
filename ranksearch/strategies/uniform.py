"""Uniform compression: one ratio of MACs for every layer.

At the ratio rho, layer l takes its candidate of least error among those of at most rho times its dense MACs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from ranksearch.strategies.ladder import Choices, next_rung, sweep
from ranksearch.table import PriceTable
from ranksearch.trial import Proposal, Signal, Trial

NAME = "uniform"


@dataclass(frozen=True, kw_only=True)
class Uniform:
    """Rank maps of one MAC ratio, spread evenly over the MACs of the network; DONE after the last of them."""

    def propose(self, table: PriceTable, trials: Sequence[Trial]) -> Proposal | Signal:
        """The next rank map, or DONE."""
        return next_rung(table, uniform_maps(table), trials, NAME)


@lru_cache(maxsize=4)
def uniform_maps(table: PriceTable) -> tuple[Choices, ...]:
    """Every rank map that one MAC ratio gives, by rising ratio."""
    steps = [
        [(c.macs / max(1, layer.candidates[-1].macs), layer.within(c.macs)) for c in layer.candidates]
        for layer in table.layers
    ]
    return sweep(tuple(layer.within(-1) for layer in table.layers), steps)
