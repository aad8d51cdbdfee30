"""Pictures of a search, read back through Plotly's and Pillow's own eyes."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from ranksearch import pictures
from ranksearch.composition import composition
from ranksearch.drawing import Cells, Guide, Picture, Series, figure, page, png
from ranksearch.errors import StudyError
from ranksearch.storage import Store
from ranksearch.strategies import Terms, build_strategy
from ranksearch.study import Study
from ranksearch.trial import Failure, Proposal, Trial
from tests.studies import TABLE, setting_of, space_of
from tests.tables import proposal_outcome

OBJECTIVES = ("accuracy", "macs")


def searched(trials: int = 30, name: str = "seen", **sections: object) -> Study:
    """A study of random rank maps, whose every seventh trial failed."""
    study = Store().create(name, setting_of(space_of(**sections)))
    strategy = build_strategy(
        space_of(strategy={"name": "random"}).strategy, Terms(seed=len(name), objectives=OBJECTIVES)
    )
    for index in range(trials):
        proposal = strategy.propose(TABLE, study.trials())
        assert isinstance(proposal, Proposal)
        trial = study.begin(proposal, index=index)
        study.finish(trial, Failure(reason="spoilt") if index % 7 == 3 else proposal_outcome(TABLE, proposal))
    return study


def test_composition_adds_up_to_the_trial(storage: Path) -> None:
    study = searched(4)
    trial = study.front_trials()[0]
    layers = composition(study.setting, trial)
    assert trial.outcome is not None
    assert sum(layer.macs for layer in layers) + TABLE.other_macs == trial.outcome.macs
    assert sum(layer.params for layer in layers) + TABLE.other_params == trial.outcome.params
    assert sum(layer.dense_macs for layer in layers) + TABLE.other_macs == TABLE.dense_macs
    assert [layer.name for layer in layers] == [layer.name for layer in TABLE.layers]


def funnel_trial(study: Study) -> Trial:
    settings = {"target": 0.5, "strength": 0.02}
    proposal = Proposal(choices=TABLE.gated(("svd",)), origin="funnel", settings=settings)
    trial = study.begin(proposal, index=99)
    outcome = proposal_outcome(TABLE, proposal)
    names = [layer.name for layer in TABLE.layers]
    alive = [{name: [8 - s] for name in names[:-1]} | {names[-1]: [8]} for s in range(4)]
    outcome.details["history"] = [
        *({"step": 10 * i, "phase": "penalty", "loss": 1.0, "alive": a} for i, a in enumerate(alive)),
        {"step": 50, "phase": "fine-tune", "loss": 0.5},
    ]
    return study.finish(trial, outcome)


def test_a_funnel_run_is_composed_of_what_it_ended_in(storage: Path) -> None:
    study = searched(1)
    trial = funnel_trial(study)
    assert trial.outcome is not None
    layers = composition(study.setting, trial)
    assert sum(layer.macs for layer in layers) + TABLE.other_macs == trial.outcome.macs
    pending = study.begin(trial.proposal, index=100)
    assert composition(study.setting, pending) == ()


def test_gates_fall_as_shares_of_the_start_and_end_with_the_gates(storage: Path) -> None:
    study = searched(1)
    drawn = study.plot_gates(funnel_trial(study).number)
    lines = {line.name: line for line in drawn.data}
    assert list(lines["layer0"].x) == [0, 10, 20, 30]
    assert list(lines["layer0"].y) == [100, 87.5, 75, 62.5]
    assert list(lines["layer5"].y) == [100] * 4
    with pytest.raises(ValueError, match="funnel run"):
        study.plot_gates(0)
    with pytest.raises(StudyError, match="found 1234"):
        study.plot_gates(1234)


def test_the_course_is_the_hypervolume_of_the_trials_so_far(storage: Path) -> None:
    study = searched(30)
    ended = study.trials()
    course = study.course()
    assert [point.trials for point in course] == list(range(1, 31))
    assert [point.hypervolume for point in course] == pytest.approx(
        [study.hypervolume(ended[: i + 1]) for i in range(30)]
    )
    assert Study.course(study, []) == []


def test_hypervolume_is_drawn_for_every_study_with_both_ends(storage: Path) -> None:
    first, second = searched(20), searched(12, "other")
    drawn = first.plot_hypervolume(second)
    assert [line.name for line in drawn.data] == ["seen", "other"]
    assert [line.x[-1] for line in drawn.data] == [20, 12]
    assert drawn.data[0].y[-1] == pytest.approx(first.hypervolume(first.trials()))
    assert drawn.data[0].line.shape == "hv"
    assert len({line.line.color for line in drawn.data}) == len({line.marker.symbol for line in drawn.data}) == 2
    timed = first.plot_hypervolume(axis="time")
    assert "minutes" in timed.layout.xaxis.title.text
    assert timed.data[0].x[0] == 0


def test_the_front_is_drawn_with_the_budget_and_other_fronts(storage: Path) -> None:
    first = searched(20, budget={"max_macs_ratio": 0.9, "targets": [0.5], "max_drop": 90.0})
    second = searched(20, "other")
    drawn = first.plot_front(second)
    assert [trace.name for trace in drawn.data][1:] == ["Front, this search", "other", "Dense network"]
    assert list(drawn.data[1].customdata) == first.front()["trial"].tolist()
    dense = first.setting.dense
    places = sorted((shape.x0, shape.y0) for shape in drawn.layout.shapes if shape.xref != "paper")
    assert [x for x, _ in places] == pytest.approx([0.5 * dense["macs"] / 1e9, 0.9 * dense["macs"] / 1e9])
    level = next(shape.y0 for shape in drawn.layout.shapes if shape.xref == "paper")
    assert level == pytest.approx(100 * dense["accuracy"] - 90)


def test_a_front_of_other_weights_or_data_is_refused(storage: Path) -> None:
    study, setting = searched(4), setting_of(space_of())
    other = Store().create("weights", replace(setting, model=setting.model.model_copy(update={"weights_sha256": "1"})))
    with pytest.raises(StudyError, match="found weights of other"):
        study.plot_front(other)
    with pytest.raises(StudyError, match="found images of other"):
        study.plot_front(Store().create("images", replace(setting, data_digest="2")))


def test_ranks_are_a_column_a_point_of_the_front(storage: Path) -> None:
    study = searched(30)
    front = study.front_trials()
    (cells,) = study.plot_ranks().data
    assert len(cells.x) == len(front)
    assert cells.x[0].startswith(f"{front[0].number}<br>")
    picked = TABLE.picked(front[0].proposal.choices)
    assert [cells.z[i][0] for i in range(len(TABLE.layers))] == pytest.approx(
        [100 * picked[layer.name].macs / layer.conv.macs for layer in TABLE.layers]
    )
    assert cells.text[0][0] == ",".join(map(str, picked["layer0"].ranks))
    spread = pictures.ranks_picture(study.setting, study.front_trials() * 50).cells
    assert spread is not None
    assert len(spread.columns) == 40
    assert pictures.ranks_picture(study.setting, []).rows == ()


def test_macs_by_layer_add_up_to_the_networks(storage: Path) -> None:
    study = searched(20)
    first = study.front_trials()[0]
    dense, bars = study.plot_macs(first.number).data
    assert first.outcome is not None
    assert sum(dense.x) == pytest.approx(100)
    assert sum(bars.x) == pytest.approx(100 * first.outcome.macs / TABLE.dense_macs)
    assert bars.y[-1] == "not searched"
    knee = study.rank_map(knee=True).provenance["trial"]
    assert study.plot_macs().data[1].name == f"trial {knee}"
    with pytest.raises(StudyError, match="1234"):
        study.plot_macs(1234)


def test_the_layer_that_decides_comes_first(storage: Path) -> None:
    study = Store().create("one", setting_of(space_of()))
    strategy = build_strategy(space_of(strategy={"name": "random"}).strategy, Terms(seed=1, objectives=OBJECTIVES))
    for index in range(60):
        proposal = strategy.propose(TABLE, study.trials())
        assert isinstance(proposal, Proposal)
        scored = proposal_outcome(TABLE, proposal)
        only = proposal.choices[3] / len(TABLE.layers[3].candidates)
        study.finish(study.begin(proposal, index=index), type(scored)(**{**scored.to_json(), "accuracy_search": only}))
    importance = study.importance()
    assert sum(importance.values()) == pytest.approx(1)
    assert max(importance, key=lambda name: importance[name]) == "layer3"
    assert importance["layer3"] > 0.5
    assert study.plot_importance().data[0].y[0] == "layer3"
    assert searched(5, "few").importance() == {}
    with pytest.raises(ValueError, match="params"):
        study.importance("params")


def test_sensitivity_falls_with_the_macs_and_shows_the_steepest_layers(storage: Path) -> None:
    drawn = figure(pictures.sensitivity_picture(TABLE))
    assert [line.name for line in drawn.data] == [layer.name for layer in TABLE.layers]
    for line, layer in zip(drawn.data, TABLE.layers, strict=True):
        assert list(line.y) == sorted(line.y, reverse=True)
        assert line.x[-1] == pytest.approx(100)
        assert line.y[0] == pytest.approx(100 * layer.candidates[0].error)
    assert "(%)" in drawn.layout.yaxis.title.text


def colours(content: bytes) -> set[tuple[int, ...]]:
    with Image.open(io.BytesIO(content)) as image:
        return {colour for _, colour in image.convert("RGB").getcolors(1 << 24) or ()}


def test_pngs_show_lines_bars_and_cells() -> None:
    line = Series(name="$a", x=[0, 1], y=[0, 2], look="line", colour="#123456")
    guided = Picture(title="t", x_title="x", y_title="y", series=(line,), guides=(Guide(axis="y", at=1, label="$b"),))
    assert {(0x12, 0x34, 0x56), (0x8C, 0x8C, 0x8C)} <= colours(png(guided))
    bars = tuple(Series(name=c, x=[1, 2], y=["p", "q"], look="bars", colour=c) for c in ("#0000FF", "#FF0000"))
    assert {(0, 0, 255), (255, 0, 0)} <= colours(png(Picture(title="t", x_title="x", y_title="y", series=bars)))
    cells = Cells(rows=["p"] * 40, columns=["c"], values=[[0.0]] * 40, texts=[["1"]] * 40, scale="s")
    tall = png(Picture(title="t", x_title="x", y_title="y", cells=cells))
    assert (0, 34, 78) in colours(tall), "the darkest of cividis"
    with Image.open(io.BytesIO(tall)) as image:
        assert image.size[0] == 1600
        assert image.size[1] > 2000


def test_names_cannot_inject_markup() -> None:
    line = Series(name="<b>", x=[0], y=[0], look="dots", colour="#123456")
    drawn = figure(Picture(title="<i>", x_title="x", y_title="y", series=(line,)))
    assert (drawn.layout.title.text, drawn.data[0].name) == ("&lt;i&gt;", "&lt;b&gt;")


def test_a_page_of_several_pictures_needs_no_network_and_has_plotly_once() -> None:
    line = Series(name="a", x=[0, 1], y=[0, 1], look="line", colour="#123456")
    drawn = Picture(title="one", x_title="x", y_title="y", series=(line,))
    text = page(drawn, drawn)
    assert text.count("Plotly.newPlot(") == page(drawn).count("Plotly.newPlot(") + 1
    assert len(text) < 1.1 * len(page(drawn))
    assert "src=" not in text.split("</script>")[-2]
