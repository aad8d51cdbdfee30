"""Uniform compression: one ratio of MACs for every layer.

At the ratio rho, layer l takes its candidate of least error among those of at most rho times its dense MACs.
"""

from __future__ import annotations

from dataclasses import dataclass

from ranksearch.strategies.ladder import Choices, sweep
from ranksearch.table import PriceTable


@dataclass(frozen=True, kw_only=True)
class Uniform:
    """Rank maps of one MAC ratio."""

    name = "uniform"

    def maps(self, table: PriceTable) -> tuple[Choices, ...]:
        """Every rank map that one MAC ratio gives, by rising ratio."""
        steps = [
            [(c.macs / max(1, layer.candidates[-1].macs), layer.within(c.macs)) for c in layer.candidates]
            for layer in table.layers
        ]
        return sweep(tuple(layer.within(-1) for layer in table.layers), steps)
