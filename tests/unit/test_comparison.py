"""What a comparison reads off its studies, against brute force, Optuna and Pillow; no network is searched."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from optuna._hypervolume import compute_hypervolume
from PIL import Image
from rich.console import Console
from scipy.stats import ttest_rel

from ranksearch.cli.tables import targets_table
from ranksearch.comparison.pictures import (
    accuracy_band,
    comparison_figure,
    comparison_html,
    comparison_png,
    hypervolume_band,
)
from ranksearch.comparison.result import Cell, Comparison, Point, Run, choice_of, run_of
from ranksearch.comparison.variants import check_comparable, check_same, variants_of
from ranksearch.driver import Driver
from ranksearch.engine.local import LocalEngine
from ranksearch.errors import SpaceError, StudyError
from ranksearch.rankmap import LayerRanks, ModelRecord, RankMap
from ranksearch.space import StrategySpec
from ranksearch.storage import Store
from ranksearch.strategies import Terms, build_strategy
from ranksearch.study import INTERRUPTED, Study
from ranksearch.trial import Failure, Outcome, Proposal
from tests.studies import TABLE, Lookup, setting_of, space_of
from tests.tables import table_outcome

TARGETS = (0.7, 0.5, 0.05)
SPACE = space_of(budget={"trials": 12}, strategy={"sampler": "nsga2", "options": {"population_size": 4}})


def searched(folder: Path, name: str, failing: Mapping[tuple[int, ...], str] | None = None) -> Study:
    """A study of random rank maps of the table."""
    space = space_of(budget={"trials": 12}, strategy={"name": "random"}, tracking={"enabled": False})
    study = Store(folder).create(name, setting_of(space))
    strategy = build_strategy(space.strategy, Terms(seed=0, objectives=("accuracy", "macs")))
    LocalEngine().run(Lookup(failing=failing or {}), Driver(study, strategy))
    return study


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    """Twelve random rank maps, one of which fails."""
    folder = tmp_path_factory.mktemp("studies")
    first = searched(folder, "first").trials()[3].proposal.choices
    return searched(folder, "one", {first: "a kernel holds NaN"})


def scored(study: Study) -> list[Outcome]:
    return [trial.outcome for trial in study.trials() if trial.outcome is not None]


def test_a_cell_is_the_best_on_the_search_images_within_the_target(study: Study) -> None:
    after = {
        choice_of(study, trial): replace(trial.outcome, accuracy=trial.number / 100)
        for trial in study.trials()
        if trial.outcome is not None
    }
    run = run_of("random", 0, study, TARGETS, after)
    assert (run.done, run.failed) == (11, 1)
    for target, cell in zip(TARGETS, run.cells, strict=True):
        within = [one for one in scored(study) if one.macs <= target * TABLE.dense_macs]
        assert (cell.target, cell.trial is None) == (target, not within)
        if within:
            best = max(within, key=lambda one: (one.accuracy_search, -one.macs))
            assert (cell.macs, cell.accuracy_search, cell.before) == (best.macs, best.accuracy_search, best.accuracy)
            assert cell.macs_ratio == pytest.approx(best.macs / TABLE.dense_macs)
            assert cell.trial is not None
            assert cell.after == cell.trial / 100
    assert run.cells[-1] == Cell(target=0.05), "nothing costs as little"


def test_the_curve_is_optunas_hypervolume_after_each_trial(study: Study) -> None:
    run = run_of("random", 0, study, TARGETS, {})
    assert [point.trials for point in run.curve] == list(range(1, 13))
    points: list[tuple[float, float]] = []
    for trial, point in zip(study.trials(), run.curve, strict=True):
        if trial.outcome is not None:
            points.append((-trial.outcome.accuracy_search, trial.outcome.macs / TABLE.dense_macs))
        assert point.hypervolume == pytest.approx(compute_hypervolume(np.array(points), np.array([0.0, 1.0])))
    assert run.curve[-1].hypervolume == pytest.approx(run.hypervolume)


def test_time_counts_while_a_trial_runs(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two trials at once, a pause, one more; then one that a killed driver left, which was ended hours later."""
    spans = [(0, 4), (2, 6), (100, 103), (103, 9000)]
    trials = [
        replace(trial, start_ms=1000 * start, end_ms=1000 * end)
        for trial, (start, end) in zip([t for t in study.trials() if t.outcome][:4], spans, strict=True)
    ]
    trials[3] = replace(trials[3], state="FAIL", outcome=None, values=None, reason=INTERRUPTED)
    monkeypatch.setattr(study, "trials", lambda: trials)
    run = run_of("random", 0, study, (0.7,), {})
    assert [point.seconds for point in run.curve] == [4, 6, 9, 9]
    assert run.wall_seconds == 9
    monkeypatch.setattr(study, "setting", replace(study.setting, priced_seconds=20.0))
    assert [point.seconds for point in run_of("random", 0, study, (0.7,), {}).curve] == [24, 26, 29, 29], "prices too"


def test_a_retried_proposal_counts_once(tmp_path: Path) -> None:
    study = Store(tmp_path).create("one", setting_of(SPACE))
    proposal = Proposal(choices=TABLE.dense, origin="random")
    study.finish(study.begin(proposal, index=0), Failure(reason=INTERRUPTED, interrupted=True))
    study.finish(study.begin(proposal, index=0, attempt=1), table_outcome(TABLE, TABLE.dense))
    run = run_of("random", 0, study, (1.0,), {})
    assert (run.done, run.failed, len(run.curve)) == (1, 0, 1)
    assert run.cells[0].trial == 1


# Tables and pictures.


def run(strategy: str, seed: int, values: list[float | None], **changes: Any) -> Run:
    """A search with these accuracies at the targets."""
    cells = [
        Cell(target=target)
        if value is None
        else Cell(target=target, trial=1, macs=10, macs_ratio=target - 0.01 * seed, before=value, after=value + 0.02)
        for target, value in zip((0.7, 0.5), values, strict=True)
    ]
    curve = tuple(Point(trials=i + 1, seconds=60.0 * (i + 1 + seed), hypervolume=0.1 * (i + 1)) for i in range(3))
    given: dict[str, Any] = {"hypervolume": 0.3 + 0.1 * seed, "done": 3, "failed": seed, "seconds": 60.0} | changes
    return Run(
        strategy=strategy, seed=seed, study=f"s-{strategy}-{seed}", wall_seconds=120.0, dense_accuracy=0.9,
        curve=curve, cells=tuple(cells), **given,
    )  # fmt: skip


def found(**changes: Any) -> Comparison:
    given: dict[str, Any] = {
        "name": "mine<i>",
        "strategies": ("knapsack", "optuna:tpe", "lost"),
        "seeds": (0, 1, 2),
        "targets": (0.7, 0.5),
        "fine_tune_steps": 5,
        "runs": (
            run("knapsack", 0, [0.80, 0.70]),
            run("knapsack", 1, [0.84, None]),
            run("knapsack", 2, [0.85, 0.76]),
            run("optuna:tpe", 0, [0.9, None]),
        ),
        "failures": {"lost": "PriceError: none"},
    }
    return Comparison(**(given | changes))


def test_the_summary_has_means_and_half_ranges() -> None:
    knapsack, tpe, lost = found().summary().to_dict("records")
    assert knapsack["before_0.7"] == pytest.approx(np.mean([0.80, 0.84, 0.85]))
    assert knapsack["before_half_range_0.7"] == pytest.approx(0.025)
    assert knapsack["after_0.5"] == pytest.approx(0.75)
    assert (knapsack["found_0.7"], knapsack["found_0.5"], tpe["found_0.5"]) == (3, 2, 0)
    assert (knapsack["done"], knapsack["failed"], knapsack["minutes"], knapsack["wall_minutes"]) == (9, 3, 1.0, 2.0)
    assert (knapsack["hypervolume"], knapsack["hypervolume_half_range"]) == pytest.approx((0.4, 0.1))
    assert np.isnan(tpe["before_0.5"])
    assert (lost["seeds"], lost["reason"]) == (0, "PriceError: none")
    assert np.isnan(lost["hypervolume"])


def test_what_a_row_is_behind_is_scipys_paired_difference_over_the_images() -> None:
    images, rng = 200, np.random.default_rng(0)
    right = {
        (name, seed): (rng.random(images) < share).astype(np.uint8)
        for name, share in (("knapsack", 0.8), ("optuna:tpe", 0.6))
        for seed in (0, 1)
    }
    best, other = (np.mean([right[name, seed] for seed in (0, 1)], axis=0) for name in ("knapsack", "optuna:tpe"))
    oracle = ttest_rel(best, other)

    def answered(name: str, seed: int) -> Run:
        bits = right[name, seed]
        cells = (Cell(target=0.7, trial=1, before=float(bits.mean()), before_right=bits.tobytes()), Cell(target=0.5))
        return replace(run(name, seed, [None, None]), cells=cells)

    runs = tuple(answered(name, seed) for name, seed in right)
    knapsack, tpe, lost = found(runs=runs).summary().to_dict("records")
    assert (knapsack["before_behind_0.7"], knapsack["before_behind_error_0.7"]) == (0, 0)
    assert tpe["before_behind_0.7"] == pytest.approx(knapsack["before_0.7"] - tpe["before_0.7"])
    assert tpe["before_behind_0.7"] / tpe["before_behind_error_0.7"] == pytest.approx(oracle.statistic)
    assert np.isnan([tpe["before_behind_0.5"], tpe["after_behind_0.7"], lost["before_behind_0.7"]]).all()
    # In the table what is worse beyond chance is not in bold, and what is bold is no markup.
    written = io.StringIO()
    table = targets_table(found(runs=runs, fine_tune_steps=0))
    Console(file=written, width=100, force_terminal=True, markup=False).print(table)
    lines = {name: next(x for x in written.getvalue().splitlines() if name in x) for name in ("knapsack", "tpe")}
    assert f"\x1b[1m{100 * knapsack['before_0.7']:.2f} ± " in lines["knapsack"]
    assert f" {100 * tpe['before_0.7']:.2f} ± " in lines["tpe"]
    assert f"{100 * tpe['before_behind_0.7']:.2f} ± {196 * tpe['before_behind_error_0.7']:.2f}" in lines["tpe"]
    # Of one seed alone: over what both have.
    tpe = found(runs=runs[:3]).summary().to_dict("records")[1]
    assert tpe["before_behind_0.7"] == pytest.approx(right["knapsack", 0].mean() - right["optuna:tpe", 0].mean())
    # A best one that did not keep its answers hides nothing: no other stands in its place.
    silent = tuple(replace(one, cells=(replace(one.cells[0], before_right=None), one.cells[1])) for one in runs[:2])
    assert found(runs=(*silent, *runs[2:])).summary()["before_behind_0.7"].isna().all()
    # Fewer seeds do not make the best, however good: of networks that were found as often it is the best one.
    better = replace(runs[2].cells[0], before=1.0, before_right=bytes([1] * images))
    few = (*runs[:2], replace(runs[2], cells=(better, runs[2].cells[1])))
    assert found(runs=few).summary()["before_behind_0.7"][1] < 0


def test_the_frame_and_the_json_hold_every_cell() -> None:
    frame = found().frame()
    assert len(frame) == 8
    assert frame[frame["strategy"] == "knapsack"]["before"].tolist()[:2] == [0.80, 0.70]
    assert frame["before"].isna().sum() == frame["trial"].isna().sum() == 2
    document = json.loads(json.dumps(found().to_json(), allow_nan=False))
    assert document["summary"][2]["hypervolume"] is None
    assert document["runs"][0]["cells"][1]["before"] == 0.70
    assert len(found().curves()) == 12
    metrics = found().metrics()
    assert metrics["accuracy/optuna-tpe/0.70/before"] == 0.9
    assert not {name for name in metrics if "optuna-tpe/0.50" in name or "/lost" in name} - {"done/lost", "failed/lost"}


def test_the_pictures_draw_means_and_ranges() -> None:
    drawn = found()
    runs = [one for one in drawn.runs if one.strategy == "knapsack"]
    band = hypervolume_band(runs, "minutes")
    assert band.x == (1, 2, 3, 4, 5)
    assert band.low == pytest.approx((0, 0, 0.1, 0.2, 0.3))
    assert band.high == pytest.approx((0.1, 0.2, 0.3, 0.3, 0.3))
    assert band.mean == pytest.approx((0.1 / 3, 0.1, 0.2, 0.8 / 3, 0.3))
    points = accuracy_band(runs, "after")
    assert points.x == pytest.approx((69, 49))
    assert points.low == pytest.approx((82, 72))
    assert points.high == pytest.approx((87, 78))
    figure = json.loads(comparison_figure(drawn).to_json())
    after = next(trace for trace in figure["data"] if trace["name"] == "knapsack, fine-tuned")
    assert after["y"] == pytest.approx([85, 75])
    assert after["error_y"]["array"] == pytest.approx([2, 3])
    titles = [figure["layout"][axis]["title"]["text"] for axis in ("xaxis", "xaxis2", "xaxis3", "yaxis3")]
    assert titles[0] == "Trials"
    assert "(minutes)" in titles[1]
    assert all("(%)" in title for title in titles[2:])
    page = comparison_html(drawn)
    assert "mine&lt;i&gt;" in page
    assert "mine<i>" not in page
    assert Image.open(io.BytesIO(comparison_png(drawn))).size == (2400, 900)
    nothing = found(runs=(run("knapsack", 0, [None, None], failed=1),))
    assert Image.open(io.BytesIO(comparison_png(nothing))).size == (2400, 900)


# Rows.


def test_what_a_space_says_of_its_strategy_goes_with_that_alone() -> None:
    nsga2, tpe, knapsack = variants_of(SPACE, ["optuna", "optuna:tpe", "knapsack"], {})
    assert nsga2.spec == SPACE.strategy
    assert (tpe.spec.sampler, tpe.spec.options, tpe.spec.seeds) == ("tpe", {}, SPACE.strategy.seeds)
    assert (knapsack.spec.name, knapsack.spec.options, knapsack.spec.seeds) == ("knapsack", {}, [])
    assert tpe.slug == "optuna-tpe"
    cold = SPACE.model_copy(update={"strategy": StrategySpec(name="auto", seeds=[])})
    assert variants_of(cold, ["optuna"], {})[0].spec.seeds == [], "seeds that are named are heeded"
    usual = SPACE.model_copy(update={"strategy": StrategySpec(name="auto")})
    assert variants_of(usual, ["optuna"], {})[0].spec.seeds == ["uniform", "energy"]
    unnamed = SPACE.model_copy(update={"strategy": SPACE.strategy.model_copy(update={"sampler": None})})
    (default,) = variants_of(unnamed, ["optuna:nsga2"], {})
    assert default.spec.options == {"population_size": 4}
    given = tpe.space(SPACE, 3, TARGETS)
    assert (given.seed, given.budget.targets, given.budget.trials) == (3, list(TARGETS), 12)


def test_all_wrong_names_are_told_at_once() -> None:
    with pytest.raises(SpaceError) as error:
        variants_of(SPACE, ["knapsak", "optuna:tep", "uniform:tpe", "greedy", "greedy"], {"trained": []})
    for part in ("`knapsack`?", "`tpe`?", "only `optuna` takes a sampler", "must differ, found 'greedy'", "'trained'"):
        assert part in str(error.value)
    with pytest.raises(SpaceError, match="one at least"):
        variants_of(SPACE, [], {})


def test_rank_maps_need_their_formats(tmp_path: Path) -> None:
    conv = TABLE.layers[0].conv
    layer = LayerRanks(format="spatial-svd", ranks=(2,), conv=conv.to_json(), macs=1, params=1)
    rank_map = RankMap(
        model=ModelRecord(name="table", input_shape=(3, 32, 32)), layers={"layer0": layer}, macs=1, params=1,
        dense_macs=TABLE.dense_macs, dense_params=TABLE.dense_params,
    )  # fmt: skip
    file = rank_map.save(tmp_path / "theirs.json")
    with pytest.raises(SpaceError, match=r"maps\.theirs.*'spatial-svd'.*--set formats=\[tucker2, svd, spatial-svd\]"):
        variants_of(SPACE, [], {"theirs": [file]})
    wider = SPACE.model_copy(update={"formats": ["svd", "spatial-svd"]})
    (theirs,) = variants_of(wider, [], {"theirs": [file]})
    assert (theirs.trials, theirs.spec.seed_maps) == (1, [str(file)])


def test_a_study_goes_on_under_its_own_space_only(tmp_path: Path) -> None:
    study = Store(tmp_path).create("one", setting_of(SPACE))
    longer = SPACE.budget.model_copy(update={"trials": 99, "minutes": 1.0, "targets": [0.5]})
    check_same(study, SPACE.model_copy(update={"budget": longer, "name": "other"}))
    strategy = SPACE.strategy.model_copy(update={"options": {"population_size": 6}})
    other = SPACE.model_copy(update={"strategy": strategy, "formats": ["svd"]})
    with pytest.raises(StudyError, match=r"formats: .*options\.population_size: 4 there, 6 here.*--study"):
        check_same(study, other)


def test_searches_of_another_network_or_images_are_not_compared(tmp_path: Path) -> None:
    setting = setting_of(SPACE)
    retrained = replace(setting, model=setting.model.model_copy(update={"weights_sha256": "0" * 64}))
    elsewhere, edited = ({**setting.dense, "loss": setting.dense["loss"] * times} for times in (1.0001, 1.01))
    others = [retrained, replace(setting, data_digest="others"), replace(setting, dense=edited)]
    changed = [setting, replace(setting, dense=elsewhere), *others]
    studies = [Store(tmp_path).create(f"study-{i}", each) for i, each in enumerate(changed)]
    check_comparable(studies[:2])
    check_comparable([])
    for stranger in studies[2:]:
        had = f"{stranger.name} had other weights, another forward pass or other images than study-0"
        with pytest.raises(StudyError, match=rf"{had}\..*--study"):
            check_comparable([studies[0], stranger])


def test_a_study_goes_on_with_the_rank_multiple_that_was_measured_for_it(tmp_path: Path) -> None:
    measured = SPACE.model_copy(update={"ranks": SPACE.ranks.model_copy(update={"rank_multiple": 8})})
    study = Store(tmp_path).create("one", setting_of(measured))
    check_same(study, SPACE)
    four = SPACE.model_copy(update={"ranks": SPACE.ranks.model_copy(update={"rank_multiple": 4})})
    with pytest.raises(StudyError, match=r"ranks\.rank_multiple: 8 there, 4 here"):
        check_same(study, four)
