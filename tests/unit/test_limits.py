"""Where strategies come to an end: limits that are met exactly, or by few; cheap networks that are slow; few bits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import inf, log
from pathlib import Path

import numpy as np
import pytest

from ranksearch.conv import Conv
from ranksearch.front import hypervolume, non_dominated
from ranksearch.launch import seed_choices
from ranksearch.pricing import check_reachable
from ranksearch.space import BudgetSpec, StrategySpec
from ranksearch.strategies import Terms, build_strategy
from ranksearch.table import DENSE, PREDICTED, Candidate, LayerPrices, PriceTable, Timing
from ranksearch.trial import Outcome, Proposal, Trial, constraints, objective_values
from tests.studies import setting_of, space_of
from tests.tables import measured_table, price_table, rank_map, table_outcome

OBJECTIVES = ("accuracy", "macs")
GUESS = log(10)


def candidate(form: str, rank: int, macs: int, error: float, ms: float | None = None) -> Candidate:
    return Candidate(format=form, ranks=(rank,), macs=macs, params=macs, error=error, latency_ms=ms)


def dense(macs: int, ms: float | None = None) -> Candidate:
    return Candidate(format=DENSE, macs=macs, params=macs, error=0.0, latency_ms=ms)


def table_of(*layers: list[Candidate]) -> PriceTable:
    """Each layer's candidates, the dense one last."""
    conv = Conv(in_channels=8, out_channels=8, kernel=(3, 3), padding=(1, 1), size=(4, 4))
    priced = [LayerPrices(name=f"layer{i}", conv=conv, candidates=tuple(found)) for i, found in enumerate(layers)]
    macs = sum(found[-1].macs for found in layers)
    return PriceTable(layers=tuple(priced), other_macs=0, other_params=0, dense_macs=macs, dense_params=1)


def timed(table: PriceTable) -> PriceTable:
    whole = sum(layer.candidates[-1].latency_ms or 0.0 for layer in table.layers)
    timing = Timing(dense_ms=whole, other_ms=0.0, runtime="eager", batch_images=1, threads=1, device="any")
    return replace(table, timing=timing)


def searched(
    table: PriceTable,
    spec: StrategySpec,
    terms: Terms,
    trials: int = 1000,
    *,
    budget: BudgetSpec | None = None,
    outcome: Callable[[PriceTable, tuple[int, ...]], Outcome] = table_outcome,
) -> list[Trial]:
    """The trials of a search with one worker."""
    strategy, found = build_strategy(spec, terms), list[Trial]()
    whole = {"macs": float(table.dense_macs), "accuracy_search": 0.92}
    whole["latency_ms"] = table.timing.dense_ms if table.timing else 1.0
    while len(found) < trials and isinstance(answer := strategy.propose(table, found), Proposal):
        scored = replace(
            outcome(table, answer.choices),
            latency_ms=table.latency_ms(answer.choices),
            bit_operations=table.bit_operations(answer.choices),
        )
        found.append(
            Trial(
                number=len(found),
                index=len(found),
                proposal=answer,
                state="COMPLETE",
                outcome=scored,
                values=objective_values(scored, terms.objectives),
                constraints=tuple(constraints(scored, budget or BudgetSpec(), whole).values()),
            )
        )
    return found


def reckoning(name: str, **fields: object) -> StrategySpec:
    """The spec of a strategy, by the predicted error where it reads a price."""
    price = {"price": PREDICTED} if name in ("auto", "knapsack", "greedy", "lc", "eps") else {}
    return StrategySpec.model_validate({"name": name, **price, **fields})


@pytest.mark.parametrize("name", ["auto", "knapsack", "uniform", "energy", "lc", "greedy"])
@pytest.mark.parametrize("share", [0.29, 0.57])
def test_what_meets_a_share_exactly_is_within_it(name: str, share: float) -> None:
    """0.29 * 100 and 0.57 * 100 are less than 29 and 57."""
    table = table_of([candidate("svd", 1, 29, 0.5), candidate("svd", 2, 57, 0.2), dense(100)])
    check_reachable(table, BudgetSpec(max_macs_ratio=share))
    limited = searched(table, reckoning(name), Terms(seed=0, objectives=OBJECTIVES, max_macs_ratio=share))
    assert max(table.macs_ratio(trial.proposal.choices) for trial in limited) == share
    aimed = searched(table, reckoning(name), Terms(seed=0, objectives=OBJECTIVES, targets=(share,)), 1)
    assert table.macs_ratio(aimed[0].proposal.choices) == share


def test_greedy_multi_step_stands_at_a_target_that_it_meets_exactly() -> None:
    table = table_of(
        [candidate("svd", 1, 10, 0.9), candidate("svd", 2, 29, 0.5), candidate("svd", 3, 57, 0.2), dense(100)]
    )
    spec = StrategySpec(name="greedy-multi-step", options={"target": 0.57})
    trials = searched(table, spec, Terms(seed=0, objectives=OBJECTIVES))
    assert [table.macs_ratio(trial.proposal.choices) for trial in trials] == [1.0, 0.57]


def few_bits() -> PriceTable:
    """Every candidate in 8 and in 4 bits, at equal MACs the narrow one first; it errs more."""
    table = measured_table(6, 8)
    layers = []
    for layer in table.layers:
        plain = layer.candidates[:-1]
        narrow = [replace(c, bits=4, error=c.error + 0.02) for c in plain]
        wide = [replace(c, bits=8, error=c.error + 0.0002) for c in plain]
        found = sorted([*narrow, *wide], key=lambda c: (c.macs, c.bits))
        layers.append(replace(layer, candidates=(*found, replace(layer.candidates[-1], bits=8))))
    return replace(table, layers=tuple(layers), other_bits=8, activation_bits=8)


@pytest.mark.parametrize("name", ["water-filling", "evbmf", "lc", "greedy", "knapsack"])
def test_no_layer_gets_fewer_bits_where_they_save_nothing(name: str) -> None:
    table = few_bits()
    options = {"options": {"floor": 1}} if name == "evbmf" else {}
    trials = searched(table, reckoning(name, **options), Terms(seed=0, objectives=OBJECTIVES))
    assert len(trials) > 10
    assert all(c.bits == 8 for trial in trials for c in table.picked(trial.proposal.choices).values())


@pytest.mark.parametrize("step", [1, 2])
def test_the_greedy_search_goes_all_the_way_down_in_bit_operations(step: int) -> None:
    table = few_bits()
    spec = StrategySpec(name="greedy-multi-step", options={"step": step})
    trials = searched(table, spec, Terms(seed=0, objectives=("accuracy", "bit-operations")))
    least = [min(c.macs * c.bits for c in layer.candidates) for layer in table.layers]
    other = table.other_macs * table.other_bits
    reached = min(table.bit_operations(trial.proposal.choices) for trial in trials)
    assert reached == table.activation_bits * (other + sum(least))


@pytest.mark.parametrize("step", [1, 2])
def test_the_greedy_search_passes_candidates_that_are_slow(step: int) -> None:
    """Every second candidate takes longer than the next larger one."""
    ranks = range(1, 9)
    layer = [candidate("svd", k, 10 * k, 0.9 / k, 0.1 * k + (0.25 if k % 2 else 0.0)) for k in ranks]
    table = timed(table_of(*[[*layer, dense(100, 1.0)]] * 3))
    spec = StrategySpec(name="greedy-multi-step", options={"step": step, "target": 0.4})
    trials = searched(table, spec, Terms(seed=0, objectives=("accuracy", "latency")))
    assert min(table.latency_ratio(trial.proposal.choices) for trial in trials) <= 0.4 + 1e-9


def test_a_limit_on_latency_that_only_dear_networks_keep_is_kept() -> None:
    """Small layers get slower when they are factorised, so the cheapest network takes longer than dense."""
    rng = np.random.default_rng(0)

    def layer(macs: int) -> list[Candidate]:
        decay = rng.uniform(2, 7)
        errors = [(np.exp(-decay * k / 12) - np.exp(-decay)) / (1 - np.exp(-decay)) for k in range(1, 12)]
        found = [
            candidate("svd", k, macs * k // 12, float(error), 1 + macs * k / 12 / 2.4e6)
            for k, error in enumerate(errors, 1)
        ]
        return [*found, dense(macs, 0.5 + macs / 2.4e6)]

    table = timed(table_of(*(layer(200_000 if i < 12 else 3_000_000) for i in range(18))))
    budget = BudgetSpec(max_latency_ratio=0.9)
    check_reachable(table, budget)
    assert table.latency_ratio((0,) * 18) > 1
    best = {}
    for objectives in (OBJECTIVES, ("accuracy", "latency")):
        terms = Terms(seed=0, objectives=objectives, max_latency_ratio=0.9)
        trials = searched(table, reckoning("auto"), terms, 48, budget=budget)
        assert len(trials) == 48
        assert all(table.latency_ratio(trial.proposal.choices) <= 0.9 for trial in trials)
        best[objectives] = max(t.outcome.accuracy_search for t in trials if t.outcome)
    assert best[OBJECTIVES] > best["accuracy", "latency"] - 0.03


@pytest.mark.parametrize("layers", [2, 18])
def test_every_rank_map_within_a_tight_limit_is_found(layers: int) -> None:
    """One layer alone may move, by steps of one candidate, among so many that must not."""
    ranks = range(1, 21)
    mixed = [
        c for k in ranks for c in (candidate("tucker2", k, 2 * k - 1, 1 / k), candidate("svd", k, 2 * k, 1 + 1 / k))
    ]
    other = [*(candidate("svd", k, 100 * k, 0.5 / k) for k in range(1, 10)), dense(1000)]
    table = table_of([*mixed, dense(1000)], *[other] * (layers - 1))
    limit = (100 * (layers - 1) + 50) / table.dense_macs
    terms = Terms(seed=0, objectives=OBJECTIVES, max_macs_ratio=limit)
    trials = searched(table, reckoning("auto"), terms, budget=BudgetSpec(max_macs_ratio=limit))
    assert {trial.proposal.choices for trial in trials} == {(i,) + (0,) * (layers - 1) for i in range(40)}
    assert len(trials) == 40


@pytest.mark.parametrize("broken", [20.0, 1e6])
def test_a_loss_out_of_all_bounds_does_not_drown_the_others(broken: float) -> None:
    table = price_table(8, 10)
    weights = np.exp(np.random.default_rng([7, 8]).normal(0, 1, 8))
    terms = Terms(seed=0, objectives=("loss", "macs"), worst_loss=GUESS)

    def volume(most: float) -> float:
        def outcome(table: PriceTable, choices: tuple[int, ...]) -> Outcome:
            errors = [layer.candidates[i].error for layer, i in zip(table.layers, choices, strict=True)]
            loss = 0.3 + 0.5 * float(weights @ errors)
            return replace(table_outcome(table, choices), loss=loss if loss <= 3 else max(loss, most))

        trials = searched(table, reckoning("auto"), terms, 40, outcome=outcome)
        points = [(t.outcome.loss / GUESS, t.outcome.macs / table.dense_macs) for t in trials if t.outcome]
        return hypervolume([points[i] for i in non_dominated(points)], (1.0, 1.0))

    assert volume(broken) > volume(-inf) - 0.005


def test_networks_that_are_all_at_chance_are_learned_from_whatever_the_prices() -> None:
    table = price_table(6, 8)
    layers = []
    for layer in table.layers:
        prices = [0.0 if c.dense else c.error * (1e6 if i == 0 else 1) for i, c in enumerate(layer.candidates)]
        priced = [
            replace(c, prices=(("divergence", price),)) for c, price in zip(layer.candidates, prices, strict=True)
        ]
        layers.append(replace(layer, candidates=tuple(priced)))
    terms = Terms(seed=0, objectives=OBJECTIVES, max_macs_ratio=0.3)
    trials = searched(
        replace(table, layers=tuple(layers)),
        StrategySpec(name="auto"),
        terms,
        30,
        outcome=lambda table, choices: replace(table_outcome(table, choices), accuracy_search=0.1),
    )
    assert len(trials) == 30


def test_rungs_around_the_greedy_search_name_the_parents_by_the_study_s_numbers() -> None:
    spec = StrategySpec(name="greedy-multi-step", rungs=[0.1])
    trials = searched(measured_table(3, 5), spec, Terms(seed=0, objectives=OBJECTIVES), 30)
    moves = [trial for trial in trials if trial.proposal.note.get("move")]
    assert any(trial.proposal.fidelity == 1 for trial in trials[: moves[-1].number])
    for trial in moves:
        parent = trials[trial.proposal.note["parent"]].proposal
        assert parent.fidelity == trial.proposal.fidelity
        assert sum(a != b for a, b in zip(parent.choices, trial.proposal.choices, strict=True)) == 1


def test_a_share_of_a_rung_is_rounded_up_only_where_it_is_no_whole_number() -> None:
    """0.14 * 50 is more than 7."""
    table = price_table(3, 8)
    spec = StrategySpec(name="random", rungs=[0.0], promote=0.14)
    trials = searched(table, spec, Terms(seed=0, objectives=OBJECTIVES), 58)
    assert [trial.proposal.fidelity for trial in trials[:57]].count(1.0) == 7
    assert trials[57].proposal.fidelity == 0.0


@pytest.mark.parametrize("bits", [4, 8])
def test_a_map_of_one_s_own_keeps_its_bits(bits: int, tmp_path: Path) -> None:
    table = few_bits()
    choices = tuple(i for i in (1, 3, 5, 0, 2, 4))
    made = rank_map(table, choices, "table", (3, 32, 32))
    layers = {name: layer.model_copy(update={"bits": bits}) for name, layer in made.layers.items()}
    made.model_copy(update={"layers": layers}).save(tmp_path / "map.json")
    space = space_of(
        strategy={"name": "uniform", "seed_maps": [str(tmp_path / "map.json")]}, quantise={"weight_bits": [4, 8]}
    )
    (found,) = seed_choices(setting_of(space, table))
    for layer, at in zip(table.layers, found, strict=True):
        assert (layer.candidates[at].ranks, layer.candidates[at].bits) == (made.layers[layer.name].ranks, bits)
