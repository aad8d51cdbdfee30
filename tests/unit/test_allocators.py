"""What single allocators promise: EVBMF's ranks, moves of the greedy search, tables that lack what is read."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise, product
from math import log, pi

import numpy as np
import pytest
from scipy.optimize import minimize

from ranksearch.errors import PriceError, SpaceError
from ranksearch.front import non_dominated
from ranksearch.space import StrategySpec
from ranksearch.strategies import Terms, build_strategy
from ranksearch.strategies.evbmf import Evbmf, evb_noise, evb_rank
from ranksearch.strategies.greedy_multi_step import GreedyMultiStep, lower
from ranksearch.strategies.knapsack import Knapsack
from ranksearch.table import Candidate, PriceTable, unfolding_shape
from ranksearch.trial import DONE, Proposal, Trial
from tests.tables import every_rank_table, measured_table, price_table, table_outcome

OBJECTIVES = ("accuracy", "macs")


def low_rank(rows: int, columns: int, rank: int, noise: float, seed: int) -> tuple[float, ...]:
    """Singular values of a random matrix of some rank with noise."""
    rng = np.random.default_rng(seed)
    matrix = rng.standard_normal((rows, rank)) @ rng.standard_normal((rank, columns))
    return tuple(np.linalg.svd(matrix + noise * rng.standard_normal((rows, columns)), compute_uv=False).tolist())


def component_energy(value: float, rows: int, columns: int, noise: float) -> float:
    """Twice the free energy of one pair of factors, its six parameters found numerically; 0 where it vanishes."""

    def energy(logs: np.ndarray) -> float:
        mean_a, mean_b, var_a, var_b, prior = np.exp(logs)
        a, b = mean_a**2 + columns * var_a, mean_b**2 + rows * var_b
        return float(
            columns * np.log(prior / var_a)
            + rows * np.log(prior / var_b)
            + (a + b) / prior  # the scale between the two factors is free: their priors are taken equal
            - (rows + columns)
            + (a * b - 2 * value * mean_a * mean_b) / noise
        )

    root = max(value, 1e-3) ** 0.5
    spread = noise / (value + 1e-3)
    start = np.log([root, root, spread, spread, value / columns + spread])
    return min(0.0, float(minimize(energy, start, method="L-BFGS-B").fun))


@pytest.mark.parametrize(
    ("rows", "columns", "rank", "noise", "kept"), [(6, 9, 2, 0.3, 2), (5, 20, 3, 0.5, 2), (5, 14, 0, 1.0, 0)]
)
def test_evbmf_minimises_the_free_energy(rows: int, columns: int, rank: int, noise: float, kept: int) -> None:
    values = low_rank(rows, columns, rank, noise, seed=rows)

    def energies(variance: float) -> list[float]:
        return [component_energy(value, rows, columns, variance) for value in values]

    def total(variance: float) -> float:
        return rows * columns * log(2 * pi * variance) + sum(v**2 for v in values) / variance + sum(energies(variance))

    found = evb_noise(values, (rows, columns))
    best = min(np.geomspace(found / 30, 30 * found, 12), key=total)
    assert total(found) <= total(best) + 1e-4
    assert evb_rank(values, (rows, columns)) == sum(energy < -1e-6 for energy in energies(found)) == kept
    assert evb_rank(values, (columns, rows)) == kept


@pytest.mark.parametrize("rank", [3, 10, 25])
def test_evbmf_finds_the_rank_of_a_noisy_matrix(rank: int) -> None:
    assert evb_rank(low_rank(64, 576, rank, 1.0, seed=rank), (64, 576)) == rank
    assert evb_rank(low_rank(64, 576, rank, 1.0, seed=rank)[:rank], (64, 576)) == rank  # without noise
    assert evb_rank((0.0,) * 4, (4, 4)) == 0


def test_evbmf_weakens_as_musco_does() -> None:
    table = every_rank_table((24, 32), seed=1)
    for weakening in (0.3, 0.8, 0.95):
        (choices,) = Evbmf(weakening=weakening, floor=4).maps(table)
        for layer, choice in zip(table.layers, choices, strict=True):
            full = min(unfolding_shape(layer.conv, "out"))
            found = evb_rank(layer.spectrum("out"), unfolding_shape(layer.conv, "out"))
            least = max(4, full - weakening * (full - found))
            fitting = [i for i, c in enumerate(layer.candidates) if c.dense or c.ranks[0] >= least]
            assert choice == fitting[0]
    assert Evbmf(weakening=[0.3, 0.8], floor=4).maps(table)[1] in Evbmf(floor=4).maps(table)


@pytest.mark.parametrize("name", ["evbmf", "alds"])
def test_a_table_without_spectra_is_refused_with_the_remedy(name: str) -> None:
    strategy = build_strategy(StrategySpec(name=name), Terms(seed=0, objectives=OBJECTIVES))
    with pytest.raises(PriceError, match=r"layer0 must have .* Start a new search"):
        strategy.propose(price_table(3, 4), ())


@pytest.mark.parametrize("name", ["knapsack", "greedy", "lc", "eps"])
def test_a_table_without_the_price_is_refused_with_the_remedy(name: str) -> None:
    strategy = build_strategy(StrategySpec(name=name, price="divergence"), Terms(seed=0, objectives=OBJECTIVES))
    with pytest.raises(PriceError, match=r"'divergence'.*has predicted, weight, loss, drop\. Take one of these"):
        strategy.propose(measured_table(3, 4), ())


def test_a_table_keeps_prices_and_spectra_and_reads_older_ones() -> None:
    table = measured_table(3, 4)
    written = json.loads(json.dumps(table.to_json()))
    assert PriceTable.from_json(written) == table
    for layer in written["layers"]:
        del layer["spectra"]
        for candidate in layer["candidates"]:
            del candidate["prices"]
    assert PriceTable.from_json(written).layers[0].spectra == ()
    assert PriceTable.from_json(written) == replace(
        table,
        layers=tuple(
            replace(x, spectra=(), candidates=tuple(replace(c, prices=()) for c in x.candidates)) for x in table.layers
        ),
    )


def test_parameters_are_the_cost_where_they_are_the_objective() -> None:
    table = measured_table(4, 6)
    layer = table.layers[0]
    first = replace(layer.candidates[0], params=10 * layer.conv.params)  # few MACs, many parameters
    table = replace(table, layers=(replace(layer, candidates=(first, *layer.candidates[1:])), *table.layers[1:]))
    strategy = build_strategy(StrategySpec(name="knapsack"), Terms(seed=0, objectives=("accuracy", "params")))
    tried = run(strategy, table, 1000)
    assert {t.proposal.choices for t in tried} == set(Knapsack(cost="params").maps(table))
    assert all(trial.proposal.choices[0] > 0 for trial in tried)


def few_bits_table() -> PriceTable:
    """Three layers, every candidate in 8 and in 4 bits, the narrow one with more error; all else in 8."""
    table = price_table(3, 4)
    layers = []
    for layer in table.layers:
        wide = [replace(c, bits=8) for c in layer.candidates]
        narrow = [replace(c, bits=4, error=c.error + 0.02) for c in layer.candidates if not c.dense]
        found = sorted([*narrow, *wide], key=lambda c: (c.macs, c.bits))
        layers.append(replace(layer, candidates=tuple(found)))
    return replace(table, layers=tuple(layers), other_bits=8, activation_bits=8)


def test_the_knapsack_over_bit_operations_is_brute_force() -> None:
    table = few_bits_table()
    points = []
    for choices in product(*(range(len(layer.candidates)) for layer in table.layers)):
        picked = [layer.candidates[i] for layer, i in zip(table.layers, choices, strict=True)]
        operations = 8 * (8 * table.other_macs + sum(c.macs * c.bits for c in picked))
        assert table.bit_operations(choices) == operations
        points.append((operations, sum(c.error for c in picked)))
    front = {points[i] for i in non_dominated(points)}
    strategy = build_strategy(StrategySpec(name="knapsack"), Terms(seed=0, objectives=("accuracy", "bit-operations")))
    found = {
        (table.bit_operations(t.proposal.choices), sum(c.error for c in table.picked(t.proposal.choices).values()))
        for t in run(strategy, table, 1000)
    }
    assert {cost for cost, _ in found} == {cost for cost, _ in front}
    np.testing.assert_allclose(sorted(found), sorted(front), rtol=1e-9)
    widths = {c.bits for t in run(strategy, table, 1000) for c in table.picked(t.proposal.choices).values()}
    assert widths == {4, 8}


@pytest.mark.parametrize("cost", ["latency", "bit-operations"])
def test_alds_refuses_costs_that_its_groups_do_not_have(cost: str) -> None:
    with pytest.raises(SpaceError, match=f"cost must be macs or params, found '{cost}'"):
        build_strategy(StrategySpec(name="alds"), Terms(seed=0, objectives=("accuracy", cost)))


def run(strategy: object, table: PriceTable, limit: int, failing: tuple[int, ...] = ()) -> list[Trial]:
    """The trials of a search with one worker; those of these numbers fail."""
    trials: list[Trial] = []
    while len(trials) < limit:
        answer = strategy.propose(table, trials)  # type: ignore[attr-defined]
        if answer is DONE:
            break
        assert isinstance(answer, Proposal)
        number = len(trials)
        failed = number in failing
        outcome = None if failed else table_outcome(table, answer.choices)
        state = "FAIL" if failed else "COMPLETE"
        trials.append(Trial(number=number, index=number, proposal=answer, state=state, outcome=outcome))
    return trials


def way(trials: list[Trial]) -> list[tuple[int, ...]]:
    """The rank maps that moves started from, in order."""
    parents = [t.proposal.note["parent"] for t in trials if t.proposal.note["parent"] is not None]
    return [trials[i].proposal.choices for i in dict.fromkeys(parents)]


def best_moves(table: PriceTable, target: float) -> list[tuple[int, ...]]:
    """The greedy way with every move measured anew on every network."""
    current = table.dense
    path = [current]
    while table.macs_ratio(current) > target:
        here = table_outcome(table, current)
        moves = [(*current[:i], c - 1, *current[i + 1 :]) for i, c in enumerate(current) if c]
        outcomes = [table_outcome(table, move) for move in moves]
        slopes = [(o.loss - here.loss) / (here.macs - o.macs) for o in outcomes]
        current = moves[slopes.index(min(slopes))]
        path.append(current)
    return path


def test_the_lazy_greedy_search_walks_nearly_as_the_full_one_with_far_fewer_trials() -> None:
    table = measured_table(9, 12)
    trials = run(GreedyMultiStep(batch=1, target=0.5), table, 10_000)
    walked, full = way(trials), best_moves(table, 0.5)
    measured = sum(sum(choice > 0 for choice in choices) for choices in full[:-1])
    assert len(trials) < 0.5 * measured
    reached = min((t for t in trials if t.outcome and table.macs_ratio(t.proposal.choices) <= 0.5), key=_loss)
    assert _loss(reached) <= table_outcome(table, full[-1]).loss * 1.02
    assert walked[0] == table.dense
    for before, after in pairwise(walked):
        assert sum(a != b for a, b in zip(before, after, strict=True)) == 1


def _loss(trial: Trial) -> float:
    assert trial.outcome is not None
    return trial.outcome.loss


def test_the_greedy_search_captures_what_prices_of_single_layers_miss() -> None:
    table = measured_table(9, 12)
    multi = run(GreedyMultiStep(batch=4, target=0.4), table, 10_000)
    one = run(
        build_strategy(StrategySpec(name="greedy", price="loss"), Terms(seed=0, objectives=OBJECTIVES)), table, 10_000
    )

    def least(trials: list[Trial], limit: float) -> float:
        return min(_loss(t) for t in trials if table.macs_ratio(t.proposal.choices) <= limit)

    assert least(multi, 0.4) < least(one, 0.4)
    assert least(multi, 0.6) < least(one, 0.6)


def test_the_greedy_search_halves_its_steps_near_the_target_and_goes_on_after_failures() -> None:
    table = measured_table(6, 33)
    trials = run(GreedyMultiStep(batch=4, target=0.2, step=8), table, 10_000, failing=(0, 2, 9, 17, 30))
    walked = way(trials)
    steps = [max(b - a for a, b in zip(after, before, strict=True)) for before, after in pairwise(walked)]
    assert steps[0] == 8
    assert min(steps) <= 2
    assert min(table.macs_ratio(t.proposal.choices) for t in trials if t.outcome) <= 0.2
    assert all(trials[number].proposal.choices not in walked[1:] for number in (2, 9, 17, 30))


def test_moves_lower_each_rank_alone_and_all_together() -> None:
    table = price_table(1, 2)
    layer = table.layers[0]
    grid = [
        Candidate(format="tucker2", ranks=(a, b), macs=100 * a + 10 * b + a * b, params=1, error=1 / (a * b))
        for a in (2, 4, 6)
        for b in (2, 4, 6)
    ]
    chain = [Candidate(format="svd", ranks=(r,), macs=130 * r, params=1, error=1 / r) for r in (1, 3, 5)]
    layer = replace(layer, candidates=(*sorted([*grid, *chain], key=lambda c: c.macs), layer.candidates[-1]))

    def reached(at: int, stride: int) -> set[tuple[int, ...]]:
        return {layer.candidates[i].ranks for i in lower(layer, at, stride)}

    at = {c.ranks: i for i, c in enumerate(layer.candidates)}
    order = [c.ranks for c in layer.candidates]
    assert reached(at[(6, 6)], 1) == {(4, 6), (6, 4), (4, 4), order[at[(6, 6)] - 1]}
    assert reached(at[(6, 4)], 2) == {(2, 4), (6, 2), (2, 2), order[at[(6, 4)] - 2]}
    assert reached(at[(5,)], 1) == {(3,), order[at[(5,)] - 1]}
    assert reached(len(order) - 1, 1) == {(6, 6), (5,), order[-2]}
    assert reached(0, 1) == set()


@pytest.mark.parametrize(
    "name", ["uniform", "energy", "water-filling", "lc", "eps", "evbmf", "alds", "greedy", "knapsack"]
)
def test_targets_come_first_each_with_the_dearest_map_within(name: str) -> None:
    table = measured_table()
    targets = (0.7, 0.35, 0.5)
    aimed = build_strategy(StrategySpec(name=name), Terms(seed=0, objectives=OBJECTIVES, targets=targets))
    everywhere = build_strategy(StrategySpec(name=name), Terms(seed=0, objectives=OBJECTIVES))
    first = [table.macs_ratio(trial.proposal.choices) for trial in run(aimed, table, 3)]
    others = [table.macs_ratio(trial.proposal.choices) for trial in run(everywhere, table, 60)]
    for found, target in zip(first, targets, strict=True):
        assert max(other for other in others if other <= target) <= found <= target


@pytest.mark.parametrize(
    "name", ["uniform", "energy", "water-filling", "lc", "eps", "evbmf", "alds", "greedy", "knapsack"]
)
def test_nothing_beyond_the_limit_on_macs_is_tried(name: str) -> None:
    table = measured_table()
    limited = build_strategy(StrategySpec(name=name), Terms(seed=0, objectives=OBJECTIVES, max_macs_ratio=0.6))
    ratios = [table.macs_ratio(trial.proposal.choices) for trial in run(limited, table, 30)]
    assert len(ratios) > 3
    assert max(ratios) <= 0.6
