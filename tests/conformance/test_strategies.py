"""What every strategy must keep, on tables that vary what a table can be."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace

import numpy as np
import pytest

from ranksearch.space import StrategySpec
from ranksearch.strategies import STRATEGIES, Strategy, Terms, build_strategy
from ranksearch.table import PriceTable
from ranksearch.trial import DONE, WAIT, Proposal, Signal, Trial, objective_values
from tests.tables import measured_table, price_table, proposal_outcome

OBJECTIVES = ("accuracy", "macs")

CASES: dict[str, list[StrategySpec]] = {
    "auto": [
        StrategySpec(name="auto", price="predicted"),
        StrategySpec(name="auto", price="loss", options={"first": 1}),
    ],
    "uniform": [StrategySpec(name="uniform")],
    "energy": [StrategySpec(name="energy")],
    "water-filling": [StrategySpec(name="water-filling")],
    "lc": [StrategySpec(name="lc"), StrategySpec(name="lc", price="loss", options={"cost": "params"})],
    "eps": [StrategySpec(name="eps", price="drop")],
    "evbmf": [StrategySpec(name="evbmf", options={"floor": 1})],
    "alds": [StrategySpec(name="alds"), StrategySpec(name="alds", options={"cost": "params", "exact": False})],
    "greedy": [StrategySpec(name="greedy"), StrategySpec(name="greedy", price="loss")],
    "greedy-multi-step": [
        StrategySpec(name="greedy-multi-step"),
        StrategySpec(name="greedy-multi-step", batch=1, options={"step": 8, "target": 0.3, "measure": "accuracy"}),
    ],
    "knapsack": [StrategySpec(name="knapsack"), StrategySpec(name="knapsack", price="loss")],
    "random": [StrategySpec(name="random")],
    "optuna": [
        StrategySpec(sampler="nsga2", seed_points=3, options={"population_size": 6}),
        StrategySpec(sampler="nsga3", seed_points=3, options={"population_size": 6}),
        StrategySpec(sampler="tpe", seed_points=3),
        StrategySpec(sampler="qmc", seeds=[]),
        StrategySpec(sampler="random", seeds=["random", "knapsack", "greedy-multi-step"], seed_points=4),
        StrategySpec(sampler="optuna.samplers:BruteForceSampler", seed_points=2),
    ],
    "funnel": [
        StrategySpec(name="funnel"),
        StrategySpec(name="funnel", sampler="nsga2", options={"targets": [], "penalty_steps": 20, "format": "svd"}),
        StrategySpec(name="funnel", sampler="qmc", options={"penalty": "l1", "targets": [0.4]}),
    ],
}
"""Every strategy with the settings it is tested under."""

RUNGS = [
    spec.model_copy(update={"rungs": rungs, "promote": promote})
    for spec, rungs, promote in [
        (CASES["auto"][0], [0.0], 0.25),
        (CASES["knapsack"][0], [0.0, 0.3], 0.5),
        (CASES["greedy-multi-step"][0], [0.1], 0.2),
        (CASES["optuna"][0], [0.0], 0.34),
        (CASES["random"][0], [0.0, 0.1, 0.5], 0.7),
    ]
]
"""Strategies whose candidates go from rung to rung."""

TABLES = {
    "18 layers": measured_table(18, 20),
    "3 layers": measured_table(3, 4),
    "1 layer": measured_table(1, 6),
    "only dense": measured_table(4, 1),
    "some only dense": replace(
        measured_table(4, 5), layers=(*measured_table(2, 5).layers, *measured_table(4, 1).layers[2:])
    ),
}

every_strategy = pytest.mark.parametrize(
    "spec",
    [
        pytest.param(spec, id=f"{name}-{spec.sampler}" if name == "optuna" else f"{name}-{i}")
        for name in CASES
        for i, spec in enumerate(CASES[name])
    ]
    + [pytest.param(spec, id=f"{spec.name}-rungs") for spec in RUNGS],
)
every_table = pytest.mark.parametrize("table", [pytest.param(table, id=name) for name, table in TABLES.items()])


def build(spec: StrategySpec, seed: int = 0) -> Strategy:
    return build_strategy(spec, Terms(seed=seed, objectives=OBJECTIVES))


def stored(trials: list[Trial]) -> list[Trial]:
    """The trials as a study gives them back: notes and settings went through JSON."""
    parts = [json.loads(json.dumps([trial.proposal.note, trial.proposal.settings])) for trial in trials]
    return [
        replace(trial, proposal=replace(trial.proposal, note=note, settings=settings))
        for trial, (note, settings) in zip(trials, parts, strict=True)
    ]


def tried(proposal: Proposal) -> tuple[object, ...]:
    """What is not to be tried again."""
    return proposal.choices, proposal.fidelity, *sorted(proposal.settings.items())


@dataclass
class Search:
    """A search without an engine: trials end in random order, some of them in failure."""

    table: PriceTable
    workers: int = 1
    failing: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        self.trials: list[Trial] = []
        self.asked: list[tuple[list[Trial], Proposal | Signal]] = []
        """The trials that each proposal was made from, and the proposal."""
        self.rng = np.random.default_rng(self.seed)

    def run(self, strategy: Strategy, proposals: int) -> list[Proposal]:
        answer: Proposal | Signal | None = None
        while answer is not DONE and len(self.trials) < proposals:
            running = [trial for trial in self.trials if trial.state == "RUNNING"]
            if len(running) >= self.workers or (running and answer is WAIT):
                answer = None
                self.finish(running[self.rng.integers(len(running))])
                continue
            answer = strategy.propose(self.table, tuple(self.trials))
            self.asked.append((list(self.trials), answer))
            if isinstance(answer, Proposal):
                number = len(self.trials)
                self.trials.append(Trial(number=number, index=number, proposal=answer, state="RUNNING"))
        return [trial.proposal for trial in self.trials]

    def finish(self, trial: Trial) -> None:
        if self.rng.random() < self.failing:
            self.trials[trial.number] = replace(trial, state="FAIL", reason="out of memory")
            return
        outcome = proposal_outcome(self.table, trial.proposal)
        self.trials[trial.number] = replace(
            trial,
            state="COMPLETE",
            values=objective_values(outcome, OBJECTIVES),
            constraints=(outcome.macs / self.table.dense_macs - 0.7,),
            outcome=outcome,
        )


def test_every_strategy_is_tested() -> None:
    assert CASES.keys() == STRATEGIES.keys()
    assert all(spec.name == name for name, specs in CASES.items() for spec in specs)


@every_strategy
@every_table
@pytest.mark.parametrize("workers", [1, 4, 64])
def test_proposals_are_new_rank_maps_of_the_table(spec: StrategySpec, table: PriceTable, workers: int) -> None:
    search = Search(table, workers=workers, failing=0.3)
    proposals = search.run(build(spec), 40)
    assert proposals or (spec.name == "funnel" and table.size == 1), "dense is a rank map, but no funnel run"
    for proposal in proposals:
        assert len(proposal.choices) == len(table.layers)
        assert all(type(i) is int for i in proposal.choices)
        assert all(0 <= i < len(layer.candidates) for i, layer in zip(proposal.choices, table.layers, strict=True))
        assert proposal.origin in STRATEGIES
    assert len({tried(proposal) for proposal in proposals}) == len(proposals)
    if len(proposals) < 40:
        assert search.asked[-1][1] is DONE


@every_strategy
@pytest.mark.parametrize("workers", [1, 4, 64])
def test_resumed_from_any_prefix_goes_on_as_if_never_stopped(spec: StrategySpec, workers: int) -> None:
    search = Search(TABLES["18 layers"], workers=workers, failing=0.3)
    search.run(build(spec), 36)
    for before, answer in search.asked:
        assert build(spec).propose(search.table, stored(before)) == answer


@every_strategy
def test_same_seed_same_trials(spec: StrategySpec) -> None:
    first, second = (Search(TABLES["18 layers"], workers=4).run(build(spec, seed=3), 24) for _ in range(2))
    assert first == second


@pytest.mark.parametrize("spec", [CASES["random"][0], *(s for s in CASES["optuna"] if s.sampler != "qmc")])
def test_another_seed_gives_other_trials(spec: StrategySpec) -> None:
    first, second = (Search(TABLES["18 layers"]).run(build(spec, seed=seed), 24) for seed in (0, 1))
    assert {proposal.choices for proposal in first} != {proposal.choices for proposal in second}


@pytest.mark.parametrize("spec", [*CASES["random"], *CASES["optuna"]], ids=lambda spec: f"{spec.name}-{spec.sampler}")
@pytest.mark.parametrize("workers", [1, 4])
def test_ends_when_every_rank_map_was_tried(spec: StrategySpec, workers: int) -> None:
    search = Search(price_table(2, 5), workers=workers, failing=0.3)
    assert len(search.run(build(spec), 1000)) == search.table.size == 25
    assert search.asked[-1][1] is DONE


@every_strategy
def test_a_retry_is_not_counted_as_a_proposal(spec: StrategySpec) -> None:
    search = Search(TABLES["18 layers"], workers=4)
    search.run(build(spec), 16)
    interrupted = replace(search.trials[2], state="FAIL", values=None, outcome=None, constraints=(), retry=True)
    retried = [*search.trials[:2], interrupted, *search.trials[3:], replace(search.trials[2], number=16, attempt=1)]
    answer = build(spec).propose(search.table, retried)
    assert isinstance(answer, Proposal)
    assert tried(answer) not in {tried(trial.proposal) for trial in retried}
    if spec.name not in ("optuna", "funnel") and not spec.rungs:  # a sampler may well look at the order of the trials
        assert answer == build(spec).propose(search.table, search.trials)


@every_strategy
def test_the_trials_are_left_as_they_are(spec: StrategySpec) -> None:
    search = Search(TABLES["18 layers"], workers=4)
    search.run(build(spec), 20)
    before = repr(search.trials)
    build(spec).propose(search.table, search.trials)
    assert repr(search.trials) == before
