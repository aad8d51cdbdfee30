"""Retained energy: one threshold of the predicted error for every layer.

At the threshold eps, layer l takes its cheapest candidate of relative squared error at most eps, so it keeps at least
1 - eps of its energy (with statistics of the inputs, of its output's energy).
"""

from __future__ import annotations

from dataclasses import dataclass

from ranksearch.strategies.ladder import Choices, sweep
from ranksearch.table import PriceTable


@dataclass(frozen=True, kw_only=True)
class Energy:
    """Rank maps of one error threshold."""

    name = "energy"

    def maps(self, table: PriceTable) -> tuple[Choices, ...]:
        """Every rank map that one error threshold gives, by rising threshold."""
        steps = [[(c.error, layer.cheapest(c.error)) for c in layer.candidates] for layer in table.layers]
        return sweep(table.dense, steps)
