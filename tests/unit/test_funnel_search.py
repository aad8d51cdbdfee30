"""Funnel runs as trials: what is proposed, what is gated, and what study, driver, export and tracking make of them."""

from __future__ import annotations

import json
import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import optuna
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from ranksearch.conv import Conv
from ranksearch.decompositions import FORMATS
from ranksearch.driver import Driver
from ranksearch.engine import build_engine
from ranksearch.errors import BudgetError, SpaceError, UnsupportedLayer
from ranksearch.export import choose, rank_map_of
from ranksearch.funnel import FunnelSpec
from ranksearch.funnel.gates import _gates_of
from ranksearch.funnel.penalty import Decay, Penalty
from ranksearch.preparation import _check_gateable
from ranksearch.rankmap import LayerRanks
from ranksearch.space import ResourcesSpec, StrategySpec
from ranksearch.storage import Store
from ranksearch.strategies import Terms, build_strategy
from ranksearch.strategies.funnel import PENALTIES, RANGES
from ranksearch.strategies.history import tried
from ranksearch.study import Study
from ranksearch.surgery import geometry
from ranksearch.table import GATEABLE, Candidate, LayerPrices, PriceTable
from ranksearch.trial import DONE, Failure, Outcome, Proposal, Task, Trial
from tests.cases import PAIRS
from tests.studies import TABLE, Lookup, setting_of, space_of
from tests.tables import price_table, proposal_outcome
from tests.unit.test_strategies import search

OBJECTIVES = ("accuracy", "macs")
FUNNEL = StrategySpec(name="funnel")


def strategy_of(spec: StrategySpec = FUNNEL, **known: Any) -> Any:
    return build_strategy(spec, Terms(seed=0, objectives=OBJECTIVES, **known))


def test_the_published_settings_come_first_at_the_targets_of_the_budget() -> None:
    strategy, trials = strategy_of(targets=(0.6, 0.3)), []
    for number in range(2):
        proposal = strategy.propose(TABLE, trials)
        published = FunnelSpec(target=(0.6, 0.3)[number])
        assert FunnelSpec(**proposal.settings) == published
        trials.append(Trial(number=number, index=number, proposal=proposal, state="RUNNING"))
    explored = strategy.propose(TABLE, trials).settings
    assert 0.3 <= explored["target"] <= 0.6
    assert explored["strength"] != trials[0].proposal.settings["strength"]


def test_targets_of_the_options_are_taken_before_those_of_the_budget_and_these_before_ours() -> None:
    given = FUNNEL.model_copy(update={"options": {"targets": [0.45]}})
    assert strategy_of(given, targets=(0.6,)).propose(TABLE, []).settings["target"] == 0.45
    ours = [trial.proposal.settings["target"] for trial in search(TABLE, FUNNEL, 3)]
    assert ours == [0.5, 0.7, 0.35]


@pytest.mark.parametrize(
    ("options", "explored"),
    [
        ({}, {"target", "strength", "c_start", "c_end", "decay"}),
        ({"targets": []}, {"threshold", "strength", "c_start", "c_end", "decay"}),
        ({"targets": [0.5], "penalty": "l2"}, {"strength"}),
    ],
)
def test_what_is_explored_is_a_spec_and_within_the_ranges(options: dict[str, Any], explored: set[str]) -> None:
    changed = set()
    trials = search(TABLE, FUNNEL.model_copy(update={"options": options}), 20)
    for trial in trials:
        settings = trial.proposal.settings
        spec = FunnelSpec(**settings)  # type: ignore[arg-type]
        assert spec.penalty == options.get("penalty", "funnel")
        for name, kind in RANGES.items():
            value = settings[name]
            if value is not None and isinstance(kind, optuna.distributions.FloatDistribution):
                assert kind.low <= float(value) <= kind.high
            if value != trials[0].proposal.settings[name]:
                changed.add(name)
    assert changed == explored


def test_the_constants_are_those_of_the_funnel() -> None:
    assert get_args(Penalty) == PENALTIES
    decay = RANGES["decay"]
    assert isinstance(decay, optuna.distributions.CategoricalDistribution)
    assert get_args(Decay) == decay.choices


def test_learning_beats_chance() -> None:
    """In the strength, which decides what training mends in these tables."""

    def distance(sampler: str, seed: int) -> float:
        spec = StrategySpec(name="funnel", sampler=sampler, options={"targets": [0.4]})
        strengths = [t.proposal.settings["strength"] for t in search(price_table(), spec, 40, seed=seed)[-20:]]
        return sum(abs(math.log10(float(strength or 0) / 0.02)) for strength in strengths) / 20

    seeds = range(3)
    assert sum(distance("tpe", seed) for seed in seeds) < 0.7 * sum(distance("random", seed) for seed in seeds)


def test_a_run_of_other_options_is_not_learnt_from_and_not_in_the_way() -> None:
    before = search(TABLE, FUNNEL.model_copy(update={"options": {"targets": []}}), 5)
    strategy = strategy_of()
    assert strategy.propose(TABLE, before).settings["target"] == 0.5
    later = [*before, *(replace(t, number=5 + t.number, index=5 + t.index) for t in search(TABLE, FUNNEL, 8))]
    assert isinstance(strategy.propose(TABLE, later), Proposal)


def test_gateable_formats_are_those_whose_ranks_are_channels_between_stages() -> None:
    for name, case in PAIRS:
        conv = geometry(case.build(), (1, *case.shape))
        try:
            gates = _gates_of(FORMATS[name], conv)
        except UnsupportedLayer:
            assert name not in GATEABLE or conv.groups > 1, f"{name} on {case.name}"
        else:
            assert len(gates) in (1, 2, 3)
            if name in GATEABLE:
                assert conv.groups == 1
    assert set(GATEABLE) <= {name for name, _ in PAIRS}


def layer(name: str, *formats: str, groups: int = 1) -> LayerPrices:
    conv = Conv(in_channels=8, out_channels=8, kernel=(3, 3), padding=(1, 1), size=(8, 8), groups=groups)
    costs = [conv.macs * (i + 1) // (len(formats) + 1) for i in range(len(formats))]
    found = [
        Candidate(format=form, ranks=(i + 1,), macs=macs, params=macs, error=0.5)
        for i, (form, macs) in enumerate(zip(formats, costs, strict=True))
    ]
    dense = Candidate(format="dense", macs=conv.macs, params=conv.params, error=0.0)
    return LayerPrices(name=name, conv=conv, candidates=(*found, dense))


def table_of(*layers: LayerPrices) -> PriceTable:
    macs = sum(one.conv.macs for one in layers)
    return PriceTable(layers=layers, other_macs=0, other_params=0, dense_macs=macs, dense_params=macs)


def test_a_layer_is_gated_in_the_first_format_that_it_has_at_its_largest_rank() -> None:
    table = table_of(
        layer("a", "tucker2", "channel-svd", "tucker2", "cp"),
        layer("b", "cp", "channel-svd", "channel-svd"),
        layer("c", "cp", "tkd-cp"),
        layer("d", "tucker2", "tucker2", groups=2),
    )
    assert table.gated() == (2, 2, 2, 2)
    assert table.gated(["cp", "channel-svd", "tucker2"]) == (1, 2, 2, 2)
    assert table.gated(["spatial-svd"]) == table.dense
    own = FUNNEL.model_copy(update={"options": {"format": "channel-svd"}})
    assert strategy_of(own).propose(table, []).choices == (1, 2, 2, 2)
    assert strategy_of(FUNNEL).propose(table_of(layer("c", "cp")), []) is DONE


def test_formats_that_cannot_be_gated_are_told_before_anything_is_prepared() -> None:
    for name, seeds in (("funnel", []), ("optuna", ["funnel"])):
        with pytest.raises(SpaceError, match=r"channels between its stages.*cp, tkd-cp") as caught:
            strategy_of(StrategySpec(name=name, seeds=seeds), formats=("cp", "tkd-cp"))
        (problem,) = caught.value.problems
        assert problem.address == "$.formats"
        assert "`tucker2`" in problem.remedy
    own = FUNNEL.model_copy(update={"options": {"format": "svd"}})
    with pytest.raises(SpaceError, match="Add `svd`"):
        strategy_of(own, formats=("tucker2", "cp"))


def test_layers_that_cannot_be_gated_are_told_before_the_first_trial() -> None:
    grouped = table_of(layer("a", "tucker2", groups=2), layer("b", "cp"))
    for strategy in ({"name": "funnel"}, {"name": "optuna", "seeds": ["funnel"]}):
        with pytest.raises(SpaceError, match=r"\$\.formats.*without groups.*candidates in cp, tucker2"):
            _check_gateable(space_of(strategy=strategy), grouped)
        _check_gateable(space_of(strategy=strategy), TABLE)
    with pytest.raises(SpaceError, match="candidates in svd"):
        _check_gateable(space_of(strategy={"name": "funnel", "options": {"format": "tucker2"}}), TABLE)


def test_as_a_seed_its_runs_join_and_the_sampler_sees_rank_maps_only() -> None:
    spec = StrategySpec(sampler="tpe", seeds=["funnel", "uniform"], seed_points=4)
    trials = search(TABLE, spec, 20)
    assert [t.proposal.origin for t in trials] == ["funnel"] * 4 + ["uniform"] * 4 + ["optuna"] * 12
    assert [t.proposal.funnel for t in trials] == [True] * 4 + [False] * 16
    start = trials[0].proposal.choices
    assert start not in tried(trials[:4]), "what a run starts from is not a rank map that was tried"
    strategy = strategy_of(spec)
    # The same index and the same rank maps, but funnel runs that scored otherwise: nothing changes.
    others = [replace(t, values=(0.1, 1.0)) if t.proposal.funnel else t for t in trials]
    assert strategy.propose(TABLE, others) == strategy.propose(TABLE, trials)


def created(folder: Path, **sections: Any) -> Study:
    return Store(folder).create("one", setting_of(space_of(**sections)))


def driven(study: Study) -> Study:
    space = study.space
    strategy = build_strategy(space.strategy, Terms(seed=space.seed, objectives=tuple(space.objectives)))
    driver = Driver(study, strategy)
    build_engine(ResourcesSpec()).run(Lookup(), driver)
    driver.stop()
    return study


def test_a_study_gives_back_what_it_was_told_of_runs(tmp_path: Path) -> None:
    study = driven(created(tmp_path, budget={"trials": 9}, strategy={"seeds": ["funnel"], "seed_points": 5}))
    trials = Store(tmp_path).open("one").trials()
    assert trials == study.trials()
    for trial in trials[:5]:
        assert trial.proposal.settings.keys() == trials[0].proposal.settings.keys()
        assert trial.outcome == proposal_outcome(TABLE, trial.proposal)
    assert study.front_trials(), "runs and rank maps make one front"
    backend = JournalFileBackend(str(tmp_path / "studies" / "one" / "journal.log"))
    theirs = optuna.load_study(study_name="one", storage=JournalStorage(backend)).trials
    for trial, plain in zip(trials, theirs, strict=True):
        if trial.proposal.funnel:
            shown = {name for name in RANGES if trial.proposal.settings[name] is not None}
            assert plain.params == {f"funnel.{name}": trial.proposal.settings[name] for name in shown}
        else:
            assert set(plain.params) == {one.name for one in TABLE.layers}


def test_a_study_without_runs_has_none_of_their_attributes(tmp_path: Path) -> None:
    """So what was written before there were runs is read, too."""
    study = driven(created(tmp_path, budget={"trials": 2}, strategy={"name": "random"}))
    text = (study.folder / "journal.log").read_text()
    assert '"settings"' not in text
    assert '"choices"' not in text
    known = json.dumps([trial.outcome.to_json() for trial in study.trials() if trial.outcome])
    old = [{k: v for k, v in outcome.items() if k != "layers"} for outcome in json.loads(known)]
    assert [Outcome.from_json(outcome) for outcome in old] == [trial.outcome for trial in study.trials()]


def test_the_rank_map_of_a_run_is_what_it_ended_in(tmp_path: Path) -> None:
    study = driven(created(tmp_path, budget={"trials": 3}, strategy={"name": "funnel"}))
    for trial in study.trials():
        found, outcome = rank_map_of(study, trial), trial.outcome
        assert outcome is not None
        assert outcome.layers
        assert found.layers == {name: LayerRanks.model_validate(one) for name, one in outcome.layers.items()}
        assert (found.macs, found.params) == (outcome.macs, outcome.params)
        assert found.macs < TABLE.macs(trial.proposal.choices), "not what it started from"
        assert found.provenance["funnel"] == trial.proposal.settings
    assert rank_map_of(study, choose(study, knee_point=True)).layers
    failed = study.begin(study.trials()[0].proposal, index=3)
    failed = study.finish(failed, Failure(reason="FloatingPointError: the loss is nan"))
    with pytest.raises(BudgetError, match="the loss is nan"):
        rank_map_of(study, failed)


def test_the_history_stays_in_the_study(tmp_path: Path) -> None:
    study = created(tmp_path, strategy={"name": "funnel"})
    proposal = strategy_of().propose(TABLE, [])
    outcome = replace(proposal_outcome(TABLE, proposal), details={"threshold": 0.1, "history": [{"step": 1}]})
    trial = study.finish(study.begin(proposal, index=0), outcome)
    assert rank_map_of(study, trial).provenance["details"] == {"threshold": 0.1}
    assert study.trials()[0].outcome == outcome


class Tries:
    """An evaluator that is cut short the first time, and leaves a checkpoint as a funnel run does."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.found: list[tuple[int, bool]] = []

    def __call__(self, task: Task) -> Outcome:
        path = self.folder / task.checkpoint
        self.found.append((task.index, path.exists()))
        if len(self.found) == 1:
            path.parent.mkdir()
            (path.parent / "unfinished").mkdir()
            path.write_text("half way")
            raise OSError("the file server is away")
        return Lookup()()(task)


def test_a_checkpoint_is_there_for_the_next_try_and_gone_after_it(tmp_path: Path) -> None:
    study = created(tmp_path, budget={"trials": 2}, strategy={"name": "funnel", "batch": 1})
    space = study.space
    strategy = build_strategy(space.strategy, Terms(seed=0, objectives=tuple(space.objectives)))
    tries = Tries(study.checkpoints_folder)
    driver = Driver(study, strategy)
    (task,) = driver.take(1)  # type: ignore[misc]
    with pytest.raises(OSError, match="away"):
        tries(task)
    driver.stop()  # as after Ctrl-C
    assert [path.name for path in study.checkpoints_folder.iterdir()] == [task.checkpoint]
    study.recover()
    build_engine(ResourcesSpec()).run(lambda: tries, Driver(study, strategy))
    assert tries.found == [(0, False), (0, True), (1, False)]
    assert list(study.checkpoints_folder.iterdir()) == []
    states = [(t.index, t.attempt, t.state, t.proposal.settings["target"]) for t in study.trials()]
    assert states == [(0, 0, "FAIL", 0.5), (0, 1, "COMPLETE", 0.5), (1, 0, "COMPLETE", 0.7)]


def test_a_run_is_tried_again_as_long_as_it_gets_further(tmp_path: Path) -> None:
    study = created(tmp_path, budget={"trials": 1}, strategy={"name": "funnel"})
    proposal, cut = strategy_of().propose(TABLE, []), Failure(reason="killed", interrupted=True)
    checkpoint = study.checkpoints_folder / "0.pt"
    checkpoint.parent.mkdir()
    retried = []
    for attempt, moved_s in enumerate((None, 60, -3600, None)):  # the clock may jump back
        trial = study.begin(proposal, index=0, attempt=attempt)
        if moved_s is not None:
            checkpoint.write_text("further")
            os.utime(checkpoint, (trial.start_ms / 1000 + moved_s,) * 2)
        retried.append(study.finish(trial, cut).retry)
    assert retried == [True, True, True, False]
    assert [trial.retry for trial in study.trials()] == retried


def test_a_checkpoint_goes_with_a_run_that_failed_for_good(tmp_path: Path) -> None:
    study = created(tmp_path, budget={"trials": 1}, strategy={"name": "funnel"})
    driver = Driver(study, build_strategy(study.space.strategy, Terms(seed=0, objectives=OBJECTIVES)))
    (task,) = driver.take(1)  # type: ignore[misc]
    study.checkpoints_folder.mkdir()
    (study.checkpoints_folder / task.checkpoint).write_text("half way")
    driver.done(task, Failure(reason="FloatingPointError: the loss is nan"))
    assert list(study.checkpoints_folder.iterdir()) == []
