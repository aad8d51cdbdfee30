"""Greedy one-step: start dense and, until the budget is met, take the step of least loss per cost over all layers.

After N. Kozyrskiy and A.-H. Phan, "CNN Acceleration by Low-rank Approximation with Quantized Factors", 2020
(arXiv:2006.08878), section on greedy multilinear rank selection; the paper's body was not at hand, so all that follows
is our reconstruction. Every candidate has the loss of replacing its layer alone; each layer offers the corners of its
lower convex hull of (cost, loss), so that the way down never runs into a step that looks dear but opens a cheap one.

Ours too: hull steps overshoot, so just under a budget one can lose to the uniform rank map that meets it. Wherever
that happens, the uniform one is taken: on the table's price the ladder is never worse than uniform at equal cost.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass

from ranksearch.strategies.hull import Cost, check_cost, climb, layer_costs, layer_losses, lower_hull
from ranksearch.strategies.ladder import Choices
from ranksearch.strategies.uniform import Uniform
from ranksearch.table import PREDICTED, PriceTable


@dataclass(frozen=True, kw_only=True)
class Greedy:
    """Rank maps on the greedy way down from dense, and the uniform ones that beat them."""

    price: str = PREDICTED
    cost: Cost = "macs"
    """What a step saves: ``macs``, ``params``, ``latency`` or ``bit-operations``."""

    name = "greedy"

    def __post_init__(self) -> None:
        check_cost(self.cost)

    def maps(self, table: PriceTable) -> tuple[Choices, ...]:
        """Dense, the way down to the cheapest rank map, and the uniform ones that lose less than it at their cost."""
        costs, losses = layer_costs(table, self.cost), layer_losses(table, self.price)

        def total(choices: Choices) -> tuple[int, float]:
            return (
                sum(layer[i] for layer, i in zip(costs, choices, strict=True)),
                sum(layer[i] for layer, i in zip(losses, choices, strict=True)),
            )

        # A hull has the same corners from either end: the way down is the way up, walked back.
        way = list(climb([lower_hull(*pair) for pair in zip(costs, losses, strict=True)]))
        spent = [total(choices) for choices in way]
        better = []
        for choices in Uniform().maps(table):
            cost, loss = total(choices)
            within = bisect_right([c for c, _ in spent], cost)
            if not within or spent[within - 1][1] > loss:
                better.append(choices)
        return (table.dense, *reversed(way), *better)
