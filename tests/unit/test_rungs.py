"""Rungs: who goes on to more of the training, and what the strategy below them sees."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise, product
from math import ceil

import numpy as np
import pytest

from ranksearch.errors import SpaceError
from ranksearch.launch import read_space
from ranksearch.space import Space
from ranksearch.strategies.rungs import Rungs, Strategy
from ranksearch.table import PriceTable
from ranksearch.trial import DONE, WAIT, Outcome, Proposal, Signal, Trial, best_within, objective_values
from tests.tables import price_table

TABLE = price_table(3, 6)
OBJECTIVES = ("accuracy", "macs")


@dataclass(frozen=True)
class Given:
    """Proposes rank maps in a given order and keeps what it was shown."""

    maps: tuple[tuple[int, ...], ...]
    seen: list[list[Trial]]

    def propose(self, table: PriceTable, trials: list[Trial]) -> Proposal | Signal:
        self.seen.append(list(trials))
        return Proposal(choices=self.maps[len(trials)], origin="given") if len(trials) < len(self.maps) else DONE


def outcome(accuracy: float, macs: float) -> Outcome:
    return Outcome(accuracy_search=accuracy, loss=1.0, macs=round(macs * TABLE.dense_macs), params=1, seconds=1.0)


def ended(number: int, proposal: Proposal, found: Outcome | None, limit: float = 1.0) -> Trial:
    trial = Trial(number=number, index=number, proposal=proposal, state="FAIL", reason="out of memory")
    if found is None:
        return trial
    kept = (found.macs / TABLE.dense_macs - limit,)
    return replace(
        trial,
        state="COMPLETE",
        reason=None,
        outcome=found,
        values=objective_values(found, OBJECTIVES),
        constraints=kept,
    )


def rungs(main: Strategy, **fields: object) -> Rungs:
    terms: dict[str, object] = {"shares": (0.0,), "promote": 0.25, "objectives": OBJECTIVES}
    return Rungs(main=main, **(terms | fields))  # type: ignore[arg-type]


def searched(strategy: Rungs, points: dict[tuple[int, ...], tuple[float, float] | None], most: int = 99) -> list[Trial]:
    """The trials of a search without an engine, one after the other, where rank maps have given outcomes."""
    trials: list[Trial] = []
    while len(trials) < most and isinstance(answer := strategy.propose(TABLE, trials), Proposal):
        point = points[answer.choices]
        trials.append(ended(len(trials), answer, None if point is None else outcome(*point)))
    return trials


MAPS = tuple(product(range(6), repeat=3))[:16]


def random_points(seed: int) -> dict[tuple[int, ...], tuple[float, float] | None]:
    rng = np.random.default_rng(seed)
    return {choices: (float(rng.random()), float(rng.uniform(0.1, 1))) for choices in MAPS}


@pytest.mark.parametrize("promote", [0.1, 0.25, 0.5])
@pytest.mark.parametrize("shares", [(0.0,), (0.0, 0.3)])
def test_as_many_go_on_as_are_asked_for(promote: float, shares: tuple[float, ...]) -> None:
    trials = searched(rungs(Given(MAPS, []), shares=shares, promote=promote), random_points(0))
    counts = [sum(t.proposal.fidelity == level for t in trials) for level in (*shares, 1.0)]
    assert counts[0] == len(MAPS)
    for lower, higher in pairwise(counts):
        assert higher == ceil(promote * lower)
    for number, trial in enumerate(trials):  # and never more at any time
        if trial.proposal.fidelity > shares[0]:
            before = [t.proposal.fidelity for t in trials[:number]]
            lower = (*shares, 1.0)[(*shares, 1.0).index(trial.proposal.fidelity) - 1]
            assert before.count(trial.proposal.fidelity) < promote * before.count(lower)
            assert trials[trial.proposal.note["parent"]].proposal.choices == trial.proposal.choices
            assert trials[trial.proposal.note["parent"]].proposal.fidelity == lower


@pytest.mark.parametrize("seed", range(8))
def test_the_least_dominated_that_adds_most_goes_on(seed: int) -> None:
    points = random_points(seed)
    trials = searched(rungs(Given(MAPS, [])), points)

    def volume(chosen: list[tuple[float, float]], worst: tuple[float, float]) -> float:
        """The dominated area, by counting cells: another way than the code's."""
        accuracies, costs = np.linspace(0, 1, 401), np.linspace(0, 1.2, 481)
        covered = np.zeros((len(accuracies), len(costs)), dtype=bool)
        for accuracy, macs in chosen:
            covered |= (accuracies[:, None] <= accuracy) & (costs[None, :] >= macs)
        return float(covered[accuracies >= worst[0]][:, costs <= worst[1]].sum())

    for number, trial in enumerate(trials):
        if trial.proposal.fidelity < 1:
            continue
        low = [t.proposal.choices for t in trials[:number] if t.proposal.fidelity == 0]
        gone = [t.proposal.choices for t in trials[:number] if t.proposal.fidelity == 1]
        left, depth = list(low), {}
        while left:
            layer = [a for a in left if not any(beats(points[b], points[a]) for b in left)]
            depth |= dict.fromkeys(layer, len(set(depth.values())))
            left = [a for a in left if a not in layer]
        waiting = [a for a in low if a not in gone]
        assert depth[trial.proposal.choices] == min(depth[a] for a in waiting)
        known = [points[a] for a in low]
        ends = [(min(column), max(column)) for column in zip(*known, strict=True)]
        spans = [(high - least) or 1.0 for least, high in ends]
        worst = (ends[0][0] - 0.1 * spans[0], ends[1][1] + 0.1 * spans[1])
        rivals = [a for a in waiting if depth[a] == depth[trial.proposal.choices]]
        went = [points[a] for a in gone]
        areas = {a: volume([*went, points[a]], worst) for a in rivals}  # type: ignore[list-item]
        assert areas[trial.proposal.choices] >= 0.98 * max(areas.values())


def beats(a: tuple[float, float] | None, b: tuple[float, float] | None) -> bool:
    assert a is not None
    assert b is not None
    return a != b and a[0] >= b[0] and a[1] <= b[1]


def test_every_other_one_is_the_best_within_a_target() -> None:
    points = {choices: (0.5 + 0.02 * i, 0.2 + 0.05 * i) for i, choices in enumerate(MAPS)}
    trials = searched(rungs(Given(MAPS, []), promote=0.5, targets=(0.7, 0.4)), dict(points))
    numbers = [i for i, trial in enumerate(trials) if trial.proposal.fidelity == 1]
    aimed = 0
    for turn, number in enumerate(numbers):
        low = [t for t in trials[:number] if t.proposal.fidelity == 0]
        gone = {trials[i].proposal.choices for i in numbers[:turn]}
        target = (0.7, 0.4)[turn // 2 % 2]
        within = [t for t in low if t.outcome is not None and t.outcome.macs <= target * TABLE.dense_macs]
        best = max(within, key=lambda t: t.outcome.accuracy_search if t.outcome else 0.0)
        if turn % 2 == 0 and best.proposal.choices not in gone:
            assert trials[number].proposal.choices == best.proposal.choices
            aimed += 1
    assert aimed >= 2


def test_what_failed_does_not_go_on_and_is_not_waited_for() -> None:
    points = random_points(3)
    failing = {choices: None if i % 2 else points[choices] for i, choices in enumerate(MAPS)}
    trials = searched(rungs(Given(MAPS, []), promote=0.5), failing)
    above = [t for t in trials if t.proposal.fidelity == 1]
    assert len(above) == 4
    assert all(failing[t.proposal.choices] is not None for t in above)
    # One that fails above does not go on again.
    doomed = above[0].proposal.choices
    strategy, again = rungs(Given(MAPS, []), promote=0.5), list(trials)
    at = next(i for i, t in enumerate(trials) if t is above[0])
    again[at] = replace(above[0], state="FAIL", outcome=None, values=None, constraints=())
    answer = strategy.propose(TABLE, again)
    assert answer is DONE or (isinstance(answer, Proposal) and answer.choices != doomed)


def test_the_strategy_below_sees_its_own_rung_alone_in_order() -> None:
    main = Given(MAPS, [])
    trials = searched(rungs(main, promote=0.5), random_points(5))
    last = main.seen[-1]
    assert [trial.proposal.choices for trial in last] == list(MAPS)
    assert [trial.number for trial in last] == [trial.index for trial in last] == list(range(len(MAPS)))
    assert all(trial.feasible for trial in last), "to it they are trials like any other"
    assert not any(trial.feasible for trial in trials if trial.proposal.fidelity < 1)


def test_a_network_over_a_limit_does_not_go_on() -> None:
    points = {choices: (0.9, 0.9) if i % 2 else (0.5, 0.3) for i, choices in enumerate(MAPS)}
    trials: list[Trial] = []
    strategy = rungs(Given(MAPS, []), promote=0.5)
    while isinstance(answer := strategy.propose(TABLE, trials), Proposal):
        trials.append(ended(len(trials), answer, outcome(*points[answer.choices]), limit=0.5))
    assert {points[t.proposal.choices] for t in trials if t.proposal.fidelity == 1} == {(0.5, 0.3)}


def test_it_waits_for_what_may_go_on() -> None:
    strategy = rungs(Given(MAPS[:1], []))
    running = Trial(
        number=0, index=0, proposal=Proposal(choices=MAPS[0], origin="given", fidelity=0.0), state="RUNNING"
    )
    assert strategy.propose(TABLE, []) == running.proposal
    assert strategy.propose(TABLE, [running]) is WAIT
    done = ended(0, running.proposal, outcome(0.9, 0.5))
    promoted = strategy.propose(TABLE, [done])
    assert isinstance(promoted, Proposal)
    assert (promoted.choices, promoted.fidelity, promoted.note) == (MAPS[0], 1.0, {"parent": 0})
    above = replace(running, number=1, index=1, proposal=promoted)
    assert strategy.propose(TABLE, [done, above]) is DONE


def test_the_best_within_a_share_of_the_macs_is_fully_trained() -> None:
    low = ended(0, Proposal(choices=MAPS[0], origin="given", fidelity=0.0), outcome(0.9, 0.5))
    full = ended(1, Proposal(choices=MAPS[1], origin="given"), outcome(0.8, 0.5))
    assert best_within([low, full], TABLE.dense_macs) is full
    assert best_within([low], TABLE.dense_macs) is None


@pytest.mark.parametrize(
    ("strategy", "training", "said"),
    [
        ({"rungs": [0.5, 0.1]}, {"steps": 5}, "must rise"),
        ({"rungs": [0.0, 0.0]}, {"steps": 5}, "must rise"),
        ({"rungs": [1.0]}, {"steps": 5}, "less than 1"),
        ({"rungs": [0.0]}, {}, "trains nothing"),
        ({"rungs": [0.0], "promote": 1.0}, {"steps": 5}, "less than 1"),
        ({"rungs": [0.0], "name": "funnel"}, {"steps": 5}, "training of its own"),
    ],
)
def test_mistakes_are_told(strategy: dict[str, object], training: dict[str, object], said: str) -> None:
    from ranksearch import parse_space

    with pytest.raises(SpaceError, match=said):
        parse_space({"model": {"name": "digits-cnn"}, "strategy": strategy, "evaluation": {"fine_tune": training}})


def test_a_space_with_rungs_is_read() -> None:
    space = Space.model_validate(
        {
            "model": {"name": "digits-cnn"},
            "strategy": {"rungs": [0, 0.2]},
            "evaluation": {"fine_tune": {"epochs": 1}},
        }
    )
    assert read_space(space)[0].strategy.rungs == [0.0, 0.2]
