"""The strategy that learns its prices, on tables whose layers matter more or less than their errors say."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from math import inf

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import spearmanr

from ranksearch.errors import SpaceError
from ranksearch.front import hypervolume, non_dominated
from ranksearch.space import StrategySpec
from ranksearch.strategies import Terms, build_strategy, learned
from ranksearch.strategies.auto import promise
from ranksearch.strategies.energy import Energy
from ranksearch.strategies.knapsack import Knapsack
from ranksearch.strategies.learned import LearnedPrices, area, gains
from ranksearch.table import PREDICTED, PriceTable
from ranksearch.trial import DONE, Outcome, Proposal, Trial, objective_values
from tests.tables import price_table

OBJECTIVES = ("accuracy", "macs")


def accuracy(table: PriceTable, choices: tuple[int, ...], seed: int) -> float:
    """Falls with the errors, each layer's times a weight of its own, and with the products of neighbours' errors."""
    rng = np.random.default_rng([seed, 7])
    weights = np.exp(rng.normal(0, 1.0, len(choices)))
    errors = weights * [layer.candidates[i].error for layer, i in zip(table.layers, choices, strict=True)]
    return float(0.1 + 0.82 * np.exp(-0.3 * errors.sum() - 0.1 * (errors[1:] * errors[:-1]).sum()))


def searched(
    name: str, table: PriceTable, trials: int, seed: int, terms: Terms, *, least_accuracy: float = 0.0, **options: int
) -> list[Trial]:
    """The trials of a search in batches of four; those of less accuracy break a limit."""
    strategy = build_strategy(StrategySpec(name=name, price=PREDICTED, options=dict(options)), terms)
    found: list[Trial] = []
    while len(found) < trials:
        batch: list[Trial] = []
        for i in range(len(found), len(found) + 4):
            proposal = strategy.propose(table, [*found, *batch])
            assert isinstance(proposal, Proposal)
            batch.append(Trial(number=i, index=i, proposal=proposal, state="RUNNING"))
        ended = [complete(table, trial.proposal, trial.number, seed) for trial in batch]
        found += [
            replace(trial, constraints=(least_accuracy - trial.outcome.accuracy_search,))
            for trial in ended
            if trial.outcome is not None
        ]
    return found


def complete(table: PriceTable, proposal: Proposal, number: int, seed: int = 0) -> Trial:
    """A trial of the proposal that has been scored."""
    choices = proposal.choices
    outcome = Outcome(
        accuracy_search=accuracy(table, choices, seed), loss=1.0, macs=table.macs(choices), params=1, seconds=0.0
    )
    values = objective_values(outcome, OBJECTIVES)
    return Trial(number=number, index=number, proposal=proposal, state="COMPLETE", outcome=outcome, values=values)


def volume(table: PriceTable, trials: list[Trial]) -> float:
    points = [(1 - t.outcome.accuracy_search, t.outcome.macs / table.dense_macs) for t in trials if t.outcome]
    return hypervolume([points[i] for i in non_dominated(points)], (1.0, 1.0))


@pytest.mark.slow
def test_learned_prices_beat_the_table_s() -> None:
    gained = []
    for seed in range(3):
        table, terms = price_table(12, 12, seed=seed), Terms(seed=seed, objectives=OBJECTIVES)
        auto, knapsack = (volume(table, searched(name, table, 48, seed, terms)) for name in ("auto", "knapsack"))
        gained.append(auto - knapsack)
    assert min(gained) > 0, gained
    assert np.mean(gained) > 0.01, gained


def test_nothing_beyond_the_limit_is_tried_and_the_targets_come_first() -> None:
    table = price_table(6, 8)
    terms = Terms(seed=0, objectives=OBJECTIVES, targets=(0.5, 0.4), max_macs_ratio=0.6)
    ratios = [table.macs_ratio(trial.proposal.choices) for trial in searched("auto", table, 24, 0, terms)]
    assert max(ratios) <= 0.6
    assert 0.45 < ratios[0] <= 0.5
    assert 0.35 < ratios[1] <= 0.4


@pytest.mark.parametrize("targets", [(), (0.7, 0.2)])
@pytest.mark.parametrize("lost", [0.005, 0.02, 0.05])
def test_what_loses_more_than_the_budget_allows_is_not_looked_for(lost: float, targets: tuple[float, ...]) -> None:
    table = price_table(8, 10)
    least = accuracy(table, table.dense, 0) - lost
    terms = Terms(seed=0, objectives=OBJECTIVES, targets=targets, least_accuracy=least)
    trials = searched("auto", table, 48, 0, terms, least_accuracy=least, first=12)
    kept = [trial.feasible for trial in trials[12:]]
    assert sum(kept) >= len(kept) // 3, "most of what is learned from lies around the limit"
    free = searched("auto", table, 48, 0, replace(terms, least_accuracy=0.0), least_accuracy=least, first=12)
    assert sum(kept) > 2 * sum(trial.feasible for trial in free[12:])
    cheapest = min(t.outcome.macs for t in trials if t.feasible and t.outcome)
    knapsack = searched("knapsack", table, 48, 0, terms, least_accuracy=least)
    assert cheapest < min(t.outcome.macs for t in knapsack if t.feasible and t.outcome)


@pytest.mark.parametrize("level", [1.0, 0.9, 0.1])
def test_trials_that_are_all_alike_are_learned_from(level: float) -> None:
    table = price_table(6, 8)
    alike = [
        replace(
            trial,
            proposal=replace(trial.proposal, origin="auto"),
            outcome=replace(trial.outcome, accuracy_search=level),
        )
        for trial in searched("random", table, 14, 0, Terms(seed=0, objectives=OBJECTIVES))
        if trial.outcome is not None
    ]
    strategy = build_strategy(StrategySpec(name="auto", price=PREDICTED), Terms(seed=0, objectives=OBJECTIVES))
    assert isinstance(strategy.propose(table, alike), Proposal)


def test_prices_that_are_all_alike_are_learned_from() -> None:
    table = price_table(6, 8)
    layers = [
        replace(
            layer,
            candidates=tuple(replace(c, prices=(("loss", 0.0 if c.dense else 0.3),)) for c in layer.candidates),
        )
        for layer in table.layers
    ]
    table = replace(table, layers=tuple(layers))
    rng = np.random.default_rng(0)
    maps = [tuple(row) for row in rng.integers(0, 7, (14, 6)).tolist()]
    trials = [complete(table, Proposal(choices=choices, origin="auto"), i) for i, choices in enumerate(maps)]
    strategy = build_strategy(StrategySpec(name="auto", price="loss"), Terms(seed=0, objectives=OBJECTIVES))
    assert isinstance(strategy.propose(table, trials), Proposal)


def test_networks_worse_than_a_guess_are_not_looked_for() -> None:
    """Where the objective is the loss, which has no end."""
    table, guess = price_table(8, 10), np.log(10.0)

    def lossy(proposal: Proposal, number: int) -> Trial:
        loss = float(-4 * np.log(accuracy(table, proposal.choices, 0)))
        outcome = Outcome(accuracy_search=0.5, loss=loss, macs=table.macs(proposal.choices), params=1, seconds=0.0)
        values = objective_values(outcome, ("loss", "macs"))
        return Trial(number=number, index=number, proposal=proposal, state="COMPLETE", outcome=outcome, values=values)

    useless = []
    for worst in (inf, guess):
        terms = Terms(seed=0, objectives=("loss", "macs"), worst_loss=worst)
        strategy = build_strategy(StrategySpec(name="auto", price=PREDICTED), terms)
        trials: list[Trial] = []
        for i in range(48):
            proposal = strategy.propose(table, trials)
            assert isinstance(proposal, Proposal)
            trials.append(lossy(proposal, i))
        useless.append(sum(t.outcome.loss > guess for t in trials[8:] if t.outcome))
    assert useless[1] < useless[0] / 2


def test_one_layer_with_many_candidates_ends_quickly_where_all_within_the_limit_were_tried() -> None:
    """By the walk that it takes the place of, one such proposal took minutes."""
    table = price_table(1, 300)
    terms = Terms(seed=0, objectives=OBJECTIVES, max_macs_ratio=0.5)
    strategy = build_strategy(StrategySpec(name="auto", price=PREDICTED), terms)
    within = [(i,) for i in range(300) if table.macs_ratio((i,)) <= 0.5]
    trials = [complete(table, Proposal(choices=c, origin="auto"), i) for i, c in enumerate(within[:-1])]
    proposal = strategy.propose(table, trials)
    assert isinstance(proposal, Proposal)
    assert proposal.choices == within[-1]
    trials.append(complete(table, proposal, len(trials)))
    assert strategy.propose(table, trials) is DONE


def test_every_target_is_tried_by_the_price_and_by_energy() -> None:
    table = price_table(6, 8)
    terms = Terms(seed=0, objectives=OBJECTIVES, targets=(0.5, 0.3))
    tried = [trial.proposal.choices for trial in searched("auto", table, 8, 0, terms)]
    assert len(set(tried)) == 8
    for rule, begin in ((Knapsack(), 0), (Energy(), 2)):
        for i, target in enumerate(terms.targets, begin):
            within = [m for m in rule.maps(table) if m not in tried[:i] and table.macs_ratio(m) <= target]
            assert tried[i] in within
            assert table.macs(tried[i]) == max(map(table.macs, within))
    assert all(choices in Knapsack().maps(table) for choices in tried[4:])


@given(
    points=st.lists(st.tuples(st.floats(0, 1.2), st.floats(0, 1.2)), min_size=1, max_size=6),
    front=st.lists(st.tuples(st.floats(0, 1.2), st.floats(0, 1.2)), max_size=6),
)
def test_the_gain_of_a_point_is_the_hypervolume_that_it_adds(
    points: list[tuple[float, float]], front: list[tuple[float, float]]
) -> None:
    members = [front[i] for i in non_dominated(front)]
    found = gains(np.array(points), np.array(members).reshape(-1, 2), np.array([1.0, 1.0]))
    before = hypervolume(members, (1.0, 1.0))
    expected = [hypervolume([*members, point], (1.0, 1.0)) - before for point in points]
    np.testing.assert_allclose(found, expected, atol=1e-12)


@pytest.mark.parametrize(
    "targets", [(0.5, 0.3), (0.3, 0.5), (0.5, 0.01, 0.3)], ids=["falling", "rising", "out-of-reach"]
)
def test_every_other_learned_proposal_is_at_a_target_that_can_be_met_the_least_first(
    targets: tuple[float, ...],
) -> None:
    table = price_table(8, 10)
    assert 0.01 < table.least_macs / table.dense_macs < 0.27
    terms = Terms(seed=0, objectives=OBJECTIVES, targets=targets)
    ratios = [table.macs_ratio(trial.proposal.choices) for trial in searched("auto", table, 24, 0, terms)]
    for turn, target in enumerate((0.3, 0.5, 0.3, 0.5, 0.3, 0.5)):
        assert target - 0.03 < ratios[8 + 2 * turn] <= target, (turn, ratios)


def test_every_fourth_learned_proposal_has_no_fewer_macs_than_the_least_target() -> None:
    table = price_table(8, 10)
    terms = Terms(seed=0, objectives=OBJECTIVES, targets=(0.6, 0.4))
    ratios = [table.macs_ratio(trial.proposal.choices) for trial in searched("auto", table, 40, 0, terms)]
    assert 0.4 <= min(ratios[9::4]) < 0.6
    assert min(ratios[11::4]) < 0.2, "others go where most hypervolume is to be had"


def test_a_promise_falls_and_ends_the_search_where_it_is_small() -> None:
    table, terms = price_table(4, 5), Terms(seed=0, objectives=OBJECTIVES)
    trials = searched("auto", table, 80, 0, terms)
    after = {n: promise(trials[:n]) for n in (12, 24, 40, 80)}
    assert after[12] is None
    early, middle, late = (after[n] or 0.0 for n in (24, 40, 80))
    assert early > middle > late >= 0
    stopping = build_strategy(StrategySpec(name="auto", price=PREDICTED, options={"min_gain": middle}), terms)
    assert isinstance(stopping.propose(table, trials[:24]), Proposal)
    assert stopping.propose(table, trials) is DONE


def test_a_search_goes_on_where_nothing_more_is_promised() -> None:
    """Under a tight limit draws promise nothing for many trials; rounding made less than nothing of it, and an end."""
    table = price_table(8, 10, seed=4)
    least = accuracy(table, table.dense, 4) - 0.005
    terms = Terms(seed=4, objectives=OBJECTIVES, least_accuracy=least)
    trials = searched("auto", table, 36, 4, terms, least_accuracy=least)
    promises = [trial.proposal.note["promise"] for trial in trials if "promise" in trial.proposal.note]
    assert min(promises) == 0.0


@given(points=st.lists(st.tuples(st.floats(0, 1.2), st.floats(0, 1.2)), max_size=8))
def test_the_area_of_points_is_their_hypervolume(points: list[tuple[float, float]]) -> None:
    found = area(np.array(points).reshape(-1, 2), np.array([1.0, 1.0]))
    assert found == pytest.approx(hypervolume(points, (1.0, 1.0)), abs=1e-12)


def test_a_search_ends_when_every_rank_map_within_the_limit_was_tried() -> None:
    table = price_table(3, 4)
    strategy = build_strategy(
        StrategySpec(name="auto", price=PREDICTED), Terms(seed=0, objectives=OBJECTIVES, max_macs_ratio=0.6)
    )
    trials: list[Trial] = []
    while isinstance(proposal := strategy.propose(table, trials), Proposal):
        trials.append(complete(table, proposal, len(trials)))
    found = {trial.proposal.choices for trial in trials}
    assert found == {choices for choices in product(range(4), repeat=3) if table.macs_ratio(choices) <= 0.6}
    assert proposal is DONE


def test_the_measured_front_holds_trials_of_any_age(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learned, "HISTORY", 8)
    table = price_table(6, 8)
    trials = searched("random", table, 40, 0, Terms(seed=0, objectives=OBJECTIVES))
    model = LearnedPrices(table, trials, price=PREDICTED, cost="macs", objectives=OBJECTIVES, max_macs_ratio=inf)
    points = [(t.outcome.macs, -t.outcome.accuracy_search) for t in trials if t.outcome]
    expected = [trials[i].proposal.choices for i in non_dominated(points)]
    assert [choices for _, choices in model.front] == expected
    assert expected[0] not in [trial.proposal.choices for trial in trials[-8:]]


def test_a_candidate_that_was_measured_to_break_the_network_is_learned_from() -> None:
    table = price_table(6, 8)
    layers = [
        replace(
            layer,
            candidates=tuple(
                replace(c, prices=(("loss", inf if i == 0 else c.error),)) for i, c in enumerate(layer.candidates)
            ),
        )
        for layer in table.layers
    ]
    table = replace(table, layers=tuple(layers))
    trials = searched("random", table, 24, 0, Terms(seed=0, objectives=OBJECTIVES))
    assert any(0 in trial.proposal.choices for trial in trials)
    strategy = build_strategy(
        StrategySpec(name="auto", price="loss", options={"first": 0}), Terms(seed=0, objectives=OBJECTIVES)
    )
    assert isinstance(strategy.propose(table, trials), Proposal)


@pytest.mark.parametrize(
    ("options", "rule"),
    [({"first": value}, "first must be a whole number") for value in ("many", 2.5, -1)]
    + [({"min_gain": value}, "min_gain must be a share") for value in ("much", -0.1, float("nan"))],
)
def test_wrong_options_are_told(options: dict[str, object], rule: str) -> None:
    with pytest.raises(SpaceError, match=rule):
        build_strategy(StrategySpec(name="auto", options=options), Terms(seed=0, objectives=OBJECTIVES))


@pytest.mark.parametrize("seed", range(3))
def test_the_predicted_error_is_learned_from_where_a_price_is_noisy(seed: int) -> None:
    """Prices are errors times noise, accuracies follow from the errors; the price alone comes to 0.67 at best."""
    table, rng = price_table(10, 12, seed=seed), np.random.default_rng(seed)
    layers = []
    for layer in table.layers:
        noise = np.exp(rng.normal(0, 1.0, len(layer.candidates)))
        priced = zip(layer.candidates, noise, strict=True)
        layers.append(
            replace(layer, candidates=tuple(replace(c, prices=(("loss", float(k * c.error)),)) for c, k in priced))
        )
    table = replace(table, layers=tuple(layers))
    maps = [tuple(row) for row in rng.integers(2, 12, (80, 10)).tolist()]
    trials = [complete(table, Proposal(choices=choices, origin="random"), i) for i, choices in enumerate(maps[:20])]
    model = LearnedPrices(table, trials, price="loss", cost="macs", objectives=OBJECTIVES)
    found = [float(model.features(choices) @ model.mean) for choices in maps[20:]]
    truth = [-np.log(accuracy(table, choices, 0)) for choices in maps[20:]]
    assert spearmanr(found, truth).statistic > 0.8
