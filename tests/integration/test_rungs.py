"""Searches with rungs: candidates are scored untrained, and the promising ones trained and shown."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ranksearch import compare
from ranksearch.cli import app
from ranksearch.driver import task_of
from ranksearch.evaluation import Evaluator
from ranksearch.export import choose, rank_map_of
from ranksearch.handover import export_trial
from ranksearch.launch import bench_of, resume, search
from ranksearch.rankmap import RankMap
from ranksearch.storage import Store
from ranksearch.study import Study
from tests.integration.test_cli import raw_study
from tests.integration.test_search import QUICKSTART, SMALL, UNTRACKED, found, runs_of

pytestmark = pytest.mark.xdist_group("rungs")  # by one worker: what its tests share is made once

RUNGS = [
    *(one for one in SMALL if not one.startswith("strategy")),
    "strategy.name=auto",
    "strategy.rungs=[0, 0.25]",
    "strategy.promote=0.4",
    "evaluation.fine_tune.steps=8",
    "evaluation.fine_tune.batch_images=32",
    "evaluation.factors=activation-aware",
    "budget.targets=[0.5]",
]


def searched(folder: Path, *settings: str, trials: int, name: str) -> Study:
    return search(QUICKSTART, settings=[*RUNGS, f"budget.trials={trials}", *settings], storage=folder, name=name)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("studies")


@pytest.fixture(scope="module")
def study(folder: Path) -> Study:
    return searched(folder, trials=14, name="rungs")


def test_only_the_promising_are_trained_and_only_trained_ones_shown(study: Study, folder: Path) -> None:
    trials = study.trials()
    levels = [trial.proposal.fidelity for trial in trials]
    assert [levels.count(level) for level in (0.0, 0.25, 1.0)] == [8, 4, 2]
    for trial in trials:
        outcome = trial.outcome
        assert outcome is not None
        assert ("fine_tune_loss" in outcome.details) == (trial.proposal.fidelity > 0)
        if trial.proposal.fidelity < 1:
            assert not trial.feasible
            assert (outcome.accuracy, outcome.weights) == (None, None), "nothing is spent on what is not shown"
            continue
        parents = [trials[trial.proposal.note["parent"]]]
        parents.append(trials[parents[0].proposal.note["parent"]])
        assert [parent.proposal.fidelity for parent in parents] == [0.25, 0.0]
        assert {parent.proposal.choices for parent in parents} == {trial.proposal.choices}
    front = study.front_trials()
    assert front
    assert all(trial.proposal.fidelity == 1 for trial in front)
    assert set(study.front()["trial"]) == {trial.number for trial in front}
    assert {trial.number for trial in raw_study(folder, "rungs").best_trials} == {trial.number for trial in front}
    frame = study.trials_frame()
    assert list(frame["fidelity"]) == levels
    assert choose(study, max_macs_ratio=1.0).proposal.fidelity == 1


def test_each_rung_is_its_share_of_the_training(study: Study, folder: Path) -> None:
    _, bench = bench_of(study, Store(folder))
    for level, steps in ((0.0, 0), (0.25, 2), (1.0, 8)):
        trial = next(trial for trial in study.trials() if trial.proposal.fidelity == level)
        evaluation = bench.space.evaluation
        tuned = evaluation.model_copy(update={"fine_tune": evaluation.fine_tune.model_copy(update={"steps": steps})})
        alone = Evaluator(replace(bench, space=bench.space.model_copy(update={"evaluation": tuned})))
        outcome = alone(replace(task_of(study, trial, ((-1.0, 0.0),)), fidelity=1.0))
        assert trial.outcome is not None
        assert outcome.loss == trial.outcome.loss
        assert outcome.details == trial.outcome.details


def test_the_same_trials_whether_interrupted_or_not(study: Study, folder: Path) -> None:
    searched(folder, UNTRACKED, trials=8, name="part")
    assert found(resume("part", storage=folder, trials=14)) == found(study)


@pytest.mark.slow
def test_the_same_trials_on_ray(study: Study, folder: Path) -> None:
    ray = ["resources.engine=ray", "resources.workers=2"]
    assert found(searched(folder, UNTRACKED, *ray, trials=14, name="on-ray")) == found(study)


def test_a_comparison_leaves_out_what_rungs_do_not_go_with(folder: Path) -> None:
    settings = [*RUNGS, UNTRACKED, "budget.trials=4", "strategy.name=uniform", "strategy.rungs=[0]"]
    found = compare(QUICKSTART, ["funnel", "uniform"], settings=settings, seeds=1, storage=folder, name="mixed")
    assert [run.strategy for run in found.runs] == ["uniform"]
    assert "a funnel run is a training of its own" in str(found.failures["funnel"])


def test_a_search_too_short_for_a_promotion_says_how_to_go_on(folder: Path) -> None:
    settings = [*RUNGS, UNTRACKED, "budget.trials=4", "strategy.rungs=[0]"]
    arguments = [part for setting in settings for part in ("--set", setting)]
    place = ["--storage", str(folder)]
    ended = CliRunner().invoke(app, ["search", str(QUICKSTART), "--study", "short", "--quiet", *arguments, *place])
    assert ended.exit_code == 1
    assert "none of 4 of short was" in ended.output
    (command,) = re.findall(r"ranksearch (resume short --trials 8)", " ".join(ended.output.split()))
    again = CliRunner().invoke(app, [*command.split(), "--quiet", *place])
    assert again.exit_code == 0, again.output
    assert Store(folder).open("short").front_trials()


def test_mlflow_and_the_table_say_how_much_each_was_trained(study: Study, folder: Path) -> None:
    _, trials = runs_of(folder)
    told = sorted(run.data.tags["fidelity"] for run in trials)
    assert told == ["0 % of the training"] * 8 + ["25 % of the training"] * 4 + ["full"] * 2
    shown = CliRunner().invoke(app, ["trials", "rungs", "--storage", str(folder)])
    assert shown.exit_code == 0
    assert shown.output.count("25 % of the training") == 4
    assert "outside the budget" not in shown.output


def test_an_untrained_trial_is_exported_as_what_it_is(study: Study, folder: Path, tmp_path: Path) -> None:
    low = next(trial for trial in study.trials() if trial.proposal.fidelity == 0)
    rank_map = rank_map_of(study, low)
    assert rank_map.provenance["fidelity"] == 0
    export_trial(study, low, Store(folder), tmp_path / "map.json", weights=tmp_path / "weights.safetensors")
    assert RankMap.load(tmp_path / "map.json").metrics["accuracy_search"] == low.outcome.accuracy_search  # type: ignore[union-attr]
    assert "fidelity" not in rank_map_of(study, study.front_trials()[0]).provenance
