"""Allocators against brute force: every rank map of a small table, every exchange rate, every threshold."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise, product
from math import inf

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ranksearch.strategies.alds import Folded, allocate, alternate, fold, share_out
from ranksearch.strategies.energy import Energy
from ranksearch.strategies.eps import Eps
from ranksearch.strategies.greedy import Greedy
from ranksearch.strategies.hull import cost_of
from ranksearch.strategies.knapsack import Knapsack, predicted_front
from ranksearch.strategies.ladder import Rule
from ranksearch.strategies.lc import Lc
from ranksearch.strategies.uniform import Uniform
from ranksearch.strategies.water_filling import WaterFilling
from ranksearch.table import DENSE, Candidate, PriceTable
from tests.tables import every_rank_table, measured_table

Layer = tuple[list[int], list[float]]

layers = st.integers(1, 6).flatmap(
    lambda n: st.tuples(
        st.lists(st.integers(0, 10**7), min_size=n, max_size=n),
        st.lists(st.integers(-64, 640).map(lambda n: n / 64), min_size=n, max_size=n),  # they add up without rounding
    )
)
networks = st.lists(layers, min_size=1, max_size=4)
tables = st.builds(measured_table, st.integers(1, 4), st.integers(1, 5), st.integers(0, 1))
RULES: list[Rule] = [Knapsack(), Knapsack(price="loss"), Lc(), Greedy(), Greedy(price="loss"), Uniform(), Energy()]


def totals(network: list[Layer], choices: tuple[int, ...]) -> tuple[int, float]:
    costs = sum(costs[i] for (costs, _), i in zip(network, choices, strict=True))
    return costs, float(sum(losses[i] for (_, losses), i in zip(network, choices, strict=True)))


def every(network: list[Layer]) -> list[tuple[int, float]]:
    return [totals(network, choices) for choices in product(*(range(len(costs)) for costs, _ in network))]


def front(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """The points that no other beats."""
    kept: list[tuple[int, float]] = []
    for cost, loss in sorted(points):
        if not kept or loss < kept[-1][1]:
            kept.append((cost, loss))
    return kept


def priced(table: PriceTable, price: str, cost: str = "macs") -> list[Layer]:
    return [
        ([cost_of(c, cost) for c in layer.candidates], [c.price(price) for c in layer.candidates])  # type: ignore[arg-type]
        for layer in table.layers
    ]


@given(networks, st.sampled_from(["as it comes", "merging", "grid"]))
@settings(max_examples=50)
def test_the_knapsack_gives_the_front_of_all_rank_maps(network: list[Layer], way: str) -> None:
    if way == "grid":  # small enough for one cell a unit
        network = [([cost % 997 for cost in costs], losses) for costs, losses in network]
    costs, losses = zip(*network, strict=True)
    limits = {"merging": {"cells": 0, "pairs": 10**9}, "grid": {"pairs": 0}, "as it comes": {}}[way]
    found = [totals(network, choices) for choices in predicted_front(costs, losses, **limits)]
    assert found == front(every(network))


@given(st.lists(st.lists(st.integers(1, 64), min_size=2, max_size=5), min_size=2, max_size=4))
@settings(max_examples=50)
def test_a_grid_with_a_cell_for_every_cost_rounds_none(falls: list[list[int]]) -> None:
    network = [(list(range(len(fall))), [sum(fall[i:]) / 64 for i in range(len(fall))]) for fall in falls]
    costs, losses = zip(*network, strict=True)
    reach = sum(map(max, costs))
    found = [totals(network, choices) for choices in predicted_front(costs, losses, cells=reach + 1, pairs=0)]
    assert found == front(every(network))


@given(networks, st.integers(8, 60))
@settings(max_examples=50)
def test_a_coarse_knapsack_loses_no_more_than_the_best_some_units_below(network: list[Layer], cells: int) -> None:
    costs, losses = zip(*network, strict=True)
    found = [totals(network, choices) for choices in predicted_front(costs, losses, cells=cells, pairs=0)]
    reach = sum(max(c) - min(c) for c in costs)
    slack = len(network) * -(-reach // (cells - len(network)))
    for cost, loss in every(network):
        assert min(lost for spent, lost in found if spent <= cost + slack) <= loss


@given(tables, st.sampled_from(["predicted", "loss", "drop"]))
@settings(max_examples=50)
def test_greedy_is_never_worse_than_uniform_and_never_better_than_the_knapsack(table: PriceTable, price: str) -> None:
    network = priced(table, price)
    greedy = [totals(network, choices) for choices in Greedy(price=price).maps(table)]
    exact = [totals(network, choices) for choices in Knapsack(price=price).maps(table)]
    for cost, loss in (totals(network, choices) for choices in Uniform().maps(table)):
        assert min(lost for spent, lost in greedy if spent <= cost) <= loss
    for cost, loss in greedy:
        assert min(lost for spent, lost in exact if spent <= cost) <= loss + 1e-9


@given(st.lists(layers, min_size=1, max_size=3), st.lists(st.floats(1e-9, 1e-3), min_size=1, max_size=5))
@settings(max_examples=50)
def test_lc_minimises_loss_and_cost_at_every_exchange_rate(network: list[Layer], rates: list[float]) -> None:
    table = table_of(network)
    network = priced(table, "predicted")
    found = [totals(network, choices) for choices in Lc().maps(table)]
    points = every(network)

    def best(some: list[tuple[int, float]], alpha: float) -> float:
        return min(alpha * cost + loss for cost, loss in some)

    for alpha in rates:
        assert best(found, alpha) == pytest.approx(best(points, alpha), rel=1e-9, abs=1e-9)
    # And no other: each of its maps is the best at some rate, between two slopes from candidate to candidate.
    slopes = {(b - a) / (c - d) for each in network for c, a in zip(*each) for d, b in zip(*each) if c > d}  # noqa: B905
    edges = sorted({0.0, *(s for s in slopes if s > 0), 2 * max(slopes) + 1.0})
    lines = {middle: best(points, middle) for middle in ((a + b) / 2 for a, b in pairwise(edges))}
    for cost, loss in found:
        assert any(alpha * cost + loss <= least + 1e-9 for alpha, least in lines.items())


def table_of(network: list[Layer]) -> PriceTable:
    """A table of one layer for each of ``network``, dense the dearest and exact."""
    table = measured_table(len(network), 1)
    made = []
    for layer, (costs, losses) in zip(table.layers, network, strict=True):
        pairs = sorted(zip(costs, losses, strict=True))
        found = [Candidate(format="svd", ranks=(1,), macs=c, params=c, error=abs(e)) for c, e in pairs]
        dense = Candidate(format=DENSE, macs=10**7 + 1, params=10**7 + 1, error=0.0)
        made.append(replace(layer, candidates=(*found, dense)))
    return replace(table, layers=tuple(made))


@given(tables)
@settings(max_examples=50)
def test_eps_takes_of_every_layer_the_cheapest_within_the_tolerance(table: PriceTable) -> None:
    falls = [[c.price("drop") for c in layer.candidates] for layer in table.layers]
    scanned = {table.dense}
    for eps in sorted({fall for layer in falls for fall in layer}):
        scanned.add(tuple(next(i for i, fall in enumerate(layer) if fall <= eps) for layer in falls))
    assert set(Eps(price="drop").maps(table)) == scanned


folded = st.builds(measured_table, st.integers(1, 3), st.just(3), st.integers(0, 2)).map(
    lambda table: [fold(layer) for layer in table.layers]
)


def least_largest_error(network: list[Folded], groups: tuple[int, ...], budget: int) -> float:
    """By trying the errors of all ranks as thresholds, and adding up what each layer's ranks cost."""
    best = inf
    for threshold in {e for layer, k in zip(network, groups, strict=True) for e in layer.errors[k]}:
        spent = 0
        for layer, k in zip(network, groups, strict=True):
            fitting = [(j + 1) * layer.units[k] for j, e in enumerate(layer.errors[k]) if e <= threshold]
            spent += min(layer.dense, *fitting)
        if spent <= budget:
            best = min(best, threshold)
    return best


@given(folded, st.floats(0.05, 1.0))
@settings(max_examples=30)
def test_alds_finds_the_least_largest_error_within_the_budget(network: list[Folded], share: float) -> None:
    budget = int(share * sum(layer.dense for layer in network))
    every_split = list(product(*(range(len(layer.units)) for layer in network)))
    exact = {groups: least_largest_error(network, groups, budget) for groups in every_split}
    for groups in every_split:
        costs, error = share_out(network, [(k,) for k in groups], budget)
        if exact[groups] < inf:
            assert (error, sum(costs) <= budget) == (exact[groups], True)
        else:
            assert costs == tuple(layer.units[k] for layer, k in zip(network, groups, strict=True))
    costs, error = allocate(network, budget)
    if min(exact.values()) < inf:
        assert sum(costs) <= budget
        assert error == min(exact.values())
        costs, error = alternate(network, budget)
        assert sum(costs) <= budget
        assert min(exact.values()) <= error <= exact[(0,) * len(network)]


@given(st.sampled_from(RULES), tables)
@settings(max_examples=50)
def test_a_ladder_has_its_cheapest_rank_map_and_ends_at_the_least_loss(rule: Rule, table: PriceTable) -> None:
    maps = list(rule.maps(table))
    costs = [table.macs(choices) for choices in maps]
    errors = [sum(x.candidates[i].error for x, i in zip(table.layers, choices, strict=True)) for choices in maps]
    assert min(costs) == table.least_macs
    assert min(errors) == 0
    assert max(costs) <= table.dense_macs


def test_water_filling_keeps_the_directions_of_most_energy_per_mac() -> None:
    table = every_rank_table(seed=3)
    directions = []
    for at, layer in enumerate(table.layers):
        squares = np.square(layer.spectrum("out"))
        unit = layer.candidates[0].macs
        directions += [(-s / squares.sum() / unit, at) for s in squares[1:]]  # every layer keeps one at least
    directions.sort()
    expected, ranks = [], [1] * len(table.layers)
    for step in [None, *directions]:
        if step is not None:
            ranks[step[1]] += 1
        expected.append(tuple(ranks))
    dense = [len(layer.candidates) - 1 for layer in table.layers]
    found = [
        tuple(i + 1 for i in choices)
        for choices in WaterFilling().maps(table)
        if not any(i == top for i, top in zip(choices, dense, strict=True))
    ]
    assert found == expected[: len(found)]
    assert len(found) > 10
