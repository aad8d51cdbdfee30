"""Comparisons of real searches of a real network: continued, trained alike, with others' rank maps, in MLflow."""

from __future__ import annotations

import csv
import itertools
import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import optuna
import pytest
from mlflow import MlflowClient
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from ranksearch import Comparison, compare
from ranksearch.cli import main
from ranksearch.comparison.result import choice_of
from ranksearch.errors import PriceError, SpaceError, StudyError
from ranksearch.export import rank_map_of
from ranksearch.launch import open_study
from ranksearch.space import Space
from ranksearch.storage import Store
from ranksearch.study import Study
from ranksearch.trial import Trial
from tests.conftest import REPOSITORY

QUICKSTART = REPOSITORY / "search_spaces" / "quickstart.yaml"
SMALL = [
    "data.source=tests.digits:digits",  # the same images for every seed, so one network
    "data.options={train: 200, search: 100, report: 100}",
    "data.calibration_images=64",
    "evaluation.refit_images=64",
    "evaluation.select_images=64",
    "formats=[tucker2, svd]",
    "budget.trials=3",
    "strategy.seed_points=1",
    "strategy.name=optuna",
    "strategy.options={population_size: 4}",
]
UNTRACKED = "tracking.enabled=false"
STRATEGIES = ["knapsack", "uniform", "optuna:tpe"]
TARGETS = (0.7, 0.4)
TIMES = ["seconds", "wall_seconds"]


def compared(folder: Path, strategies: list[str] = STRATEGIES, *settings: str, **given: Any) -> Comparison:
    changes = [*SMALL, *([] if given.pop("tracked", False) else [UNTRACKED]), *settings]
    arguments = {"seeds": 2, "targets": TARGETS, "fine_tune_steps": 2, "name": "one"} | given
    return compare(QUICKSTART, strategies, settings=changes, storage=folder, **arguments)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Comparison]:
    """A finished comparison of three strategies and two seeds, and its folder."""
    folder = tmp_path_factory.mktemp("compared")
    return folder, compared(folder)


@pytest.fixture
def copy(whole: tuple[Path, Comparison], tmp_path: Path) -> Path:
    """A copy of the finished comparison's folder."""
    shutil.copytree(whole[0], tmp_path / "copy")
    return tmp_path / "copy"


def counted(folder: Path) -> dict[str, int]:
    """Study to how many trials it has."""
    return {name: len(open_study(name, storage=folder).trials()) for name in Store(folder).names()}


def command(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert not ended.value.code


def choices(study: Study) -> set[Any]:
    return {choice_of(study, trial) for trial in study.trials()}


@pytest.mark.slow
def test_every_strategy_and_seed_is_a_study_and_what_they_chose_is_trained_once(
    whole: tuple[Path, Comparison],
) -> None:
    folder, found = whole
    names = {f"one-{slug}-{seed}" for slug in ("knapsack", "uniform", "optuna-tpe") for seed in (0, 1)}
    assert set(Store(folder).names()) == names | {"one-trained-0", "one-trained-1"}
    frame = found.frame()
    assert len(frame) == 12
    for seed in (0, 1):
        trained = open_study(f"one-trained-{seed}", storage=folder)
        assert trained.space.evaluation.fine_tune.steps == 2
        accuracies = {choice_of(trained, t): t.outcome.accuracy for t in trained.trials() if t.outcome is not None}
        assert len(accuracies) == len(trained.trials()), "each rank map is trained once, and scored"
        wanted = {}
        for row in frame[(frame["seed"] == seed) & frame["trial"].notna()].to_dict("records"):
            study = open_study(row["study"], storage=folder)
            trial = study.trials()[row["trial"]]
            assert study.space.seed == seed
            assert trial.outcome is not None
            assert trial in study.front_trials()
            assert (row["macs"], row["before"]) == (trial.outcome.macs, trial.outcome.accuracy)
            assert row["macs_ratio"] <= row["target"]
            wanted[choice_of(study, trial)] = row["after"]
        assert wanted == accuracies
    for row in found.summary().to_dict("records"):
        assert (row["done"], row["failed"], row["found_0.4"]) == (6, 0, 2)
        for when in ("before", "after"):
            best = found.summary()[f"{when}_0.4"].max()
            assert row[f"{when}_behind_0.4"] == pytest.approx(best - row[f"{when}_0.4"])
            assert row[f"{when}_behind_error_0.4"] > 0 or row[f"{when}_0.4"] == best


@pytest.mark.slow
def test_run_again_it_does_nothing_more(whole: tuple[Path, Comparison], copy: Path) -> None:
    before, begun = counted(copy), []
    again = compared(copy, began=lambda name, place, total: begun.append(name))
    assert (begun, counted(copy)) == ([], before)
    assert again == whole[1]


@pytest.mark.slow
def test_interrupted_and_continued_it_gives_the_same(whole: tuple[Path, Comparison], tmp_path: Path) -> None:
    shutil.copytree(whole[0] / "cache", tmp_path / "two" / "cache")
    for stop_at in (2, 6, 7):  # in the first search, in the second, in a training
        seen: list[Trial] = []

        def watch(study: Study, trial: Trial, seen: list[Trial] = seen, stop_at: int = stop_at) -> None:
            seen.append(trial)
            if len(seen) == stop_at:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            compared(tmp_path / "two", watch=watch)
    begun: list[tuple[str, int, int]] = []
    found = compared(tmp_path / "two", began=lambda *told: begun.append(told))
    assert begun[-1] == ("one-trained-1", 8, 8)
    assert begun[0][1] > 1, "what was finished is left alone"
    expected, actual = (one.frame().drop(columns=TIMES) for one in (whole[1], found))
    shared = [column for column in expected if column != "trial"]  # a retried trial has another number
    assert actual[shared].equals(expected[shared])


@pytest.mark.slow
def test_more_trials_and_strategies_extend_it(whole: tuple[Path, Comparison], copy: Path) -> None:
    found = compared(copy, [*STRATEGIES, "energy"], "budget.trials=4", seeds=1)
    assert {run.strategy: run.done for run in found.runs} == dict.fromkeys([*STRATEGIES, "energy"], 4)
    chosen = found.frame()
    assert chosen["after"].notna().equals(chosen["trial"].notna())
    trained = [open_study(name, storage=copy) for name in Store(copy).names() if name.startswith("one-trained-0")]
    both = [choice for study in trained for choice in choices(study)]
    assert len(set(both)) == len(both), "no rank map is trained twice"


@pytest.mark.slow
def test_rank_maps_made_elsewhere_are_evaluated_as_they_are(copy: Path, tmp_path: Path) -> None:
    study = open_study("one-uniform-0", storage=copy)
    theirs = rank_map_of(study, study.trials()[0])
    name, layer = next((n, one) for n, one in theirs.layers.items() if one.format == "tucker2")
    candidates = next(one.candidates for one in study.setting.table.layers if one.name == name)
    known = {one.ranks for one in candidates}
    odd = layer.model_copy(update={"ranks": next((8, r) for r in range(2, 16) if (8, r) not in known)})
    files = [theirs.model_copy(update={"layers": {name: odd}}).save(tmp_path / "a.json")]
    stranger = {"nowhere": layer}
    files.append(theirs.model_copy(update={"layers": stranger}).save(tmp_path / "b.json"))
    given = {"theirs": files[:1], "strangers": files[1:]}
    found = compared(copy, ["uniform"], maps=given, seeds=1, targets=(1.0,), name="one")
    uniform, mine, lost = found.summary().to_dict("records")
    (trial,) = open_study("one-theirs-0", storage=copy).trials()
    assert choice_of(open_study("one-theirs-0", storage=copy), trial) == {(name, "tucker2", odd.ranks, 32)}
    assert trial.outcome is not None
    assert mine["macs_ratio_1"] == trial.outcome.macs / theirs.dense_macs
    ends = {
        choice_of(one, t): t.outcome.accuracy
        for one in (open_study(name, storage=copy) for name in Store(copy).names() if name.startswith("one-trained-0"))
        for t in one.trials()
        if t.outcome is not None
    }
    assert mine["after_1"] == ends[choice_of(open_study("one-theirs-0", storage=copy), trial)], (
        "trained like the others"
    )
    assert uniform["done"] == 3
    assert "found nowhere" in lost["reason"]
    assert "one-strangers-0" not in Store(copy).names()


@pytest.mark.slow
def test_a_strategy_that_cannot_run_is_told_and_the_others_go_on(copy: Path) -> None:
    """A study from before price tables had spectra."""
    setting = open_study("one-uniform-0", storage=copy).setting
    bare = {"name": "evbmf", "seeds": [], "seed_points": 16}
    document = setting.space.model_dump(mode="json")
    document["strategy"] |= bare
    old = type(setting)(**{**setting.__dict__, "space": Space.model_validate(document)})
    Store(copy).create("one-evbmf-0", old)
    found = compared(copy, ["evbmf", "uniform"], seeds=1)
    assert [run.strategy for run in found.runs] == ["uniform"]
    assert "spectr" in found.summary()["reason"][0]
    with pytest.raises(PriceError, match="spectr"):
        compared(copy, ["evbmf"], seeds=1)


@pytest.mark.slow
def test_another_space_under_the_same_name_is_refused(copy: Path) -> None:
    before = counted(copy)
    with pytest.raises(StudyError, match=r"one-knapsack-0 differs: \$\.formats: .* --study"):
        compared(copy, ["energy", "knapsack"], "formats=[svd]")
    with pytest.raises(StudyError, match=r"one-trained-0 differs: \$\.evaluation\.fine_tune\.steps: 2 there, 3 here"):
        compared(copy, fine_tune_steps=3)
    assert counted(copy) == before


@pytest.mark.slow
@pytest.mark.parametrize("stranger", ["one-uniform-0", "one-trained-0"])
def test_other_images_behind_the_same_names_are_refused(stranger: str, copy: Path) -> None:
    journal = JournalStorage(JournalFileBackend(str(copy / "studies" / stranger / "journal.log")))
    study = optuna.load_study(study_name=stranger, storage=journal)
    study.set_user_attr("ranksearch", json.dumps(json.loads(study.user_attrs["ranksearch"]) | {"data_digest": "other"}))
    before = counted(copy)
    had = f"{stranger} had other weights, another forward pass or other images than one-knapsack-0"
    with pytest.raises(StudyError, match=rf"{had}\..*--study"):
        compared(copy, seeds=1)
    assert counted(copy) == before


def test_an_unknown_strategy_is_told_before_anything_runs(tmp_path: Path) -> None:
    with pytest.raises(SpaceError, match=r"strategies\[1\].*'knapsak'.*Did you mean `knapsack`"):
        compared(tmp_path, ["uniform", "knapsak"])
    with pytest.raises(SpaceError, match="targets must be over 0 and at most 1"):
        compared(tmp_path, targets=(0.5, 1.5))
    assert not any(tmp_path.iterdir())


def interrupt() -> None:
    """A data factory during which somebody presses Ctrl-C."""
    raise KeyboardInterrupt


def test_after_ctrl_c_the_command_that_continues_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = [
        "compare", str(QUICKSTART), "--strategies", "knapsack,optuna:tpe", "--seeds", "2", "--set", UNTRACKED,
        "--set", f"data.source={__name__}:interrupt", "--study", "one", "--quiet", "--storage", str(tmp_path / "a b"),
    ]  # fmt: skip
    with pytest.raises(SystemExit) as ended:
        main(given)
    assert ended.value.code == 130
    told = next(line for line in capsys.readouterr().err.splitlines() if line.startswith("Go on with: "))
    words = shlex.split(told.removeprefix("Go on with: "))
    assert words[0] == "ranksearch"
    assert sorted(words[1:]) == sorted(given)
    pairs = set(itertools.pairwise(given))
    assert {pair for pair in itertools.pairwise(words) if pair[0].startswith("--") and pair[0] != "--quiet"} <= pairs


def test_the_command_that_continues_says_nothing_of_the_environment(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANKSEARCH_STORAGE", str(tmp_path / "hidden"))
    given = ["compare", str(QUICKSTART), "--strategies", "knapsack", "--set", UNTRACKED]
    with pytest.raises(SystemExit) as ended:
        main([*given, "--set", f"data.source={__name__}:interrupt"])
    assert ended.value.code == 130
    told = capsys.readouterr().err
    assert "Go on with: ranksearch compare" in told
    assert "hidden" not in told


@pytest.mark.parametrize(
    ("option", "value", "part"),
    [("--targets", "half", "must be numbers"), ("--maps", "theirs", "NAME=FILE"), ("--csv", "nowhere/a.csv", "folder")],
)
def test_wrong_usage_is_told(option: str, value: str, part: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["compare", str(QUICKSTART), "--strategies", "uniform", option, value])
    assert ended.value.code == 2
    assert part in " ".join(capsys.readouterr().err.split())


@pytest.mark.slow
def test_the_command_prints_and_writes_what_was_found(
    whole: tuple[Path, Comparison], copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        "compare",
        str(QUICKSTART),
        "--strategies",
        ",".join(STRATEGIES),
        "--seeds",
        "2",
        "--targets",
        "0.7,0.4",
    ]
    arguments += ["--fine-tune-steps", "2", "--study", "one", "--storage", str(copy), "--quiet"]
    for setting in SMALL:
        arguments += ["--set", setting]
    files = {kind: tmp_path / f"found.{kind}" for kind in ("csv", "html", "png")}
    outputs = [part for kind, file in files.items() for part in (f"--{kind}", str(file))]
    for _ in range(2):  # tracked from now on, in one run
        command([*arguments, *outputs])
    shown = capsys.readouterr().out
    assert all(shown.count(name) >= 3 for name in STRATEGIES)
    rows = list(csv.DictReader(files["csv"].read_text().splitlines()))
    assert [row["strategy"] for row in rows] == whole[1].frame()["strategy"].tolist()
    assert len((tmp_path / "found-curves.csv").read_text().splitlines()) == 1 + 18
    assert files["png"].read_bytes().startswith(b"\x89PNG")
    assert "optuna:tpe" in files["html"].read_text()

    client = MlflowClient(tracking_uri=f"sqlite:///{copy / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("ranksearch")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id], "tags.`ranksearch.comparison` = 'one'")
    before = whole[1].frame()
    mean = before[(before["strategy"] == "knapsack") & (before["target"] == 0.4)]["before"].mean()
    assert run.data.metrics["accuracy/knapsack/0.40/before"] == pytest.approx(mean)
    assert "hypervolume/optuna-tpe" in run.data.metrics
    artifacts = {one.path for one in client.list_artifacts(run.info.run_id)}
    assert artifacts == {"comparison.csv", "comparison.json", "comparison.html", "comparison.png", "curves.csv"}

    command([*arguments, "--set", UNTRACKED, "--json"])
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(whole[1].to_json()))
