"""Lower convex hulls of cost against loss, and the rank maps met when climbing them all together.

Allocators that trade loss for cost at one exchange rate (water-filling, LC, greedy one-step) only ever choose from a
layer's lower convex hull: its corners are the candidates that minimise ``loss + alpha cost`` for some alpha >= 0. The
corners are found by one sweep over the candidates sorted by cost (A. M. Andrew, "Another efficient algorithm for convex
hulls in two dimensions", 1979).
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from ranksearch.errors import PriceError
from ranksearch.strategies.ladder import Choices
from ranksearch.table import Candidate, PriceTable

Cost = Literal["macs", "params", "latency", "bit-operations"]


@dataclass(frozen=True, kw_only=True)
class Corner:
    """One candidate on a layer's hull."""

    choice: int
    cost: int
    loss: float
    gain: float
    """Loss saved per unit of cost from the corner before; infinite for the first. It falls from corner to corner."""


def cost_of(candidate: Candidate, cost: Cost) -> int:
    """MACs per image, parameters, whole nanoseconds of a batch, or bit operations with activations of one bit."""
    if cost == "latency":
        return round(1e6 * (candidate.latency_ms or 0.0))
    if cost == "bit-operations":
        return candidate.macs * candidate.bits
    return candidate.macs if cost == "macs" else candidate.params


def check_cost(cost: str) -> None:
    """Raise ValueError unless ``cost`` is known."""
    if cost not in get_args(Cost):
        raise ValueError(f"cost must be one of {', '.join(get_args(Cost))}, found {cost!r}")


def whole_cost(table: PriceTable, cost: Cost) -> tuple[int, int]:
    """What the dense network costs, and what of that is not the searched layers'.

    Raises:
        PriceError: the cost is the latency, and the table has none.
    """
    if cost == "latency":
        if table.timing is None:
            raise PriceError("the price table must have latencies, found none. Give the space a `latency` section.")
        return round(1e6 * table.timing.dense_ms), round(1e6 * table.timing.other_ms)
    if cost == "bit-operations":
        return table.dense_bit_operations // table.activation_bits, table.other_macs * table.other_bits
    return (table.dense_macs, table.other_macs) if cost == "macs" else (table.dense_params, table.other_params)


def layer_losses(table: PriceTable, price: str) -> list[list[float]]:
    """The price called ``price`` of every candidate of every layer; raises PriceError where the table lacks it."""
    return [[candidate.price(price) for candidate in layer.candidates] for layer in table.layers]


def layer_costs(table: PriceTable, cost: Cost) -> list[list[int]]:
    """The cost of every candidate of every layer; raises PriceError where the table lacks it."""
    whole_cost(table, cost)
    return [[cost_of(candidate, cost) for candidate in layer.candidates] for layer in table.layers]


def lower_hull(costs: Sequence[int], losses: Sequence[float]) -> list[Corner]:
    """Corners from the cheapest candidate to that of least loss, by rising cost, each of less gain than before."""
    corners: list[Corner] = []
    for choice in sorted(range(len(costs)), key=lambda i: (costs[i], losses[i], i)):
        if corners and losses[choice] >= corners[-1].loss:
            continue
        gain = _gain(corners, costs[choice], losses[choice])
        while len(corners) > 1 and gain >= corners[-1].gain:
            corners.pop()
            gain = _gain(corners, costs[choice], losses[choice])
        corners.append(Corner(choice=choice, cost=costs[choice], loss=losses[choice], gain=gain))
    return corners


def _gain(corners: Sequence[Corner], cost: int, loss: float) -> float:
    """Loss saved per unit of cost from the last corner; of equal costs the first has the least loss, and is kept."""
    return (corners[-1].loss - loss) / (cost - corners[-1].cost) if corners else float("inf")


def climb(hulls: Sequence[Sequence[Corner]]) -> Iterator[Choices]:
    """The rank maps from all layers at their cheapest corner up, each one step of most gain further; ties by layer."""
    place = [0] * len(hulls)
    current = [hull[0].choice for hull in hulls]
    queue = [(-hull[1].gain, layer) for layer, hull in enumerate(hulls) if len(hull) > 1]
    heapq.heapify(queue)
    yield tuple(current)
    while queue:
        _, layer = heapq.heappop(queue)
        place[layer] += 1
        hull = hulls[layer]
        current[layer] = hull[place[layer]].choice
        yield tuple(current)
        if place[layer] + 1 < len(hull):
            heapq.heappush(queue, (-hull[place[layer] + 1].gain, layer))
