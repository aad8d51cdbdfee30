"""The dashboard in a real browser, beside studies that are being written."""

from __future__ import annotations

import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from threading import Thread
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from dashboards.app import _others, _picture
from dashboards.feed import Feed, _judged
from dashboards.figures import DRAWN, front_of, thinned
from dashboards.server import feeds_of, serving
from ranksearch.cli import main
from ranksearch.errors import StudyError
from ranksearch.launch import search
from ranksearch.rankmap import RankMap
from ranksearch.storage import Store
from ranksearch.strategies import Terms, build_strategy
from ranksearch.study import Study
from ranksearch.trial import Failure, Proposal
from tests.browser import chromium, opened, serious_faults
from tests.studies import TABLE, setting_of, space_of
from tests.tables import proposal_outcome

RANDOM = build_strategy(space_of(strategy={"name": "random"}).strategy, Terms(seed=3, objectives=("accuracy", "macs")))

PICTURES = {
    "Ranks": "Ranks along the front",
    "MACs by layer": "Where the MACs are",
    "Sensitivity": "Sensitivity of layers",
    "Importance": "Which layers decide",
    "Gates": "has none",
    "Over time": "Hypervolume",
}


def begun(name: str, trials: int, total: int = 40) -> Study:
    study = Store().create(name, setting_of(space_of(budget={"trials": total})))
    go_on(study, trials)
    return study


def go_on(study: Study, trials: int) -> None:
    made = len(study.trials())
    for index in range(made, made + trials):
        proposal = RANDOM.propose(TABLE, study.trials())
        assert isinstance(proposal, Proposal)
        trial = study.begin(proposal, index=index)
        study.finish(trial, Failure(reason="out of memory") if index % 6 == 5 else proposal_outcome(TABLE, proposal))


@contextmanager
def served(*names: str) -> Iterator[str]:
    with feeds_of(Store(), names) as feeds:
        server = serving(feeds, host="127.0.0.1", port=0)
        thread = Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/"
        finally:
            server.shutdown()
            thread.join()
            server.server_close()


def test_a_feed_follows_the_study_and_never_writes(storage: Path) -> None:
    study = begun("fed", 10)
    feed = Feed(Store().open("fed", read_only=True))
    first = feed.snapshot
    assert (first.done, first.failed, first.state) == (10, 1, "stopped")
    assert [t.number for t in first.front] == study.front()["trial"].tolist()
    journal = study.folder / "journal.log"
    before = journal.read_bytes()
    assert not feed.refresh()
    assert feed.snapshot is first
    with study.driving():
        go_on(study, 29)
        running = study.begin(Proposal(choices=TABLE.dense, origin="test"), index=39)
        assert feed.refresh()
        assert feed.snapshot.state == "running"
        assert [t.number for t in feed.snapshot.running] == [running.number]
        assert feed.snapshot.minutes_left is not None
        study.finish(running, proposal_outcome(TABLE, running.proposal))
    feed.refresh()
    last = feed.snapshot
    assert (last.done, last.total, last.state) == (40, 40, "finished")
    assert [t.number for t in last.front] == study.front()["trial"].tolist()
    assert last.course == tuple(study.course())
    assert [(reason, count) for reason, count, _ in last.failures] == [("out of memory", last.failed)]
    study.extend(60)
    feed.refresh()
    assert feed.snapshot.total == 60
    assert journal.read_bytes().startswith(before), "only the driver has written"


def test_a_search_of_another_machine_is_judged_by_its_trials(storage: Path) -> None:
    study = begun("away", 3, total=4)
    lock = study.folder / "driver.lock"
    for holder in ("12 on elsewhere", "12 on elsewhere since 2026-01-01 00:00:00 UTC"):
        lock.write_text(holder, encoding="utf-8")
        assert Feed(study).snapshot.state == "running", "a trial has just ended"
    now = time.time() * 1000
    ended = study.trials()
    assert _judged(ended, now + 3_600_000) == "stopped"
    running = study.begin(Proposal(choices=TABLE.dense, origin="test"), index=3)
    assert _judged([*ended, running], now) == "running"
    assert _judged([*ended, running], now + 3_600_000) == "unknown"
    slow = [replace(one, start_ms=one.end_ms - 3_000_000) for one in ended]
    assert _judged([*slow, running], now + 3_600_000) == "running", "its trials take as long as this"
    study.finish(running, proposal_outcome(TABLE, running.proposal))
    copy = Feed(study)
    assert copy.snapshot.state == "finished", "whatever the lock of a copied store says"
    lock.write_text(f"12 on {os.uname().nodename}", encoding="utf-8")
    study.extend(9)
    copy.refresh()
    assert copy.snapshot.state == "stopped", "nobody holds the lock that this machine left"


def test_a_search_in_a_database_may_be_driven_from_elsewhere(
    storage: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))  # where the files of a database's studies are
    monkeypatch.setenv("RANKSEARCH_STORAGE", f"sqlite:///{tmp_path / 'studies.db'}")
    study = begun("shared", 1)
    study.begin(Proposal(choices=TABLE.dense, origin="test"), index=1)
    assert Feed(study).snapshot.state == "running"


def test_the_rate_is_that_of_the_present_driver(storage: Path) -> None:
    study = begun("resumed", 5)
    study.begin(Proposal(choices=TABLE.dense, origin="test"), index=5)  # left by a driver that was killed
    time.sleep(0.5)
    with study.driving():
        study.recover()
        time.sleep(0.5)  # the network is prepared again
        before = len(study.trials())
        go_on(study, 4)
        ends = [trial.end_ms for trial in study.trials()[before:]]
        assert Feed(study).snapshot.per_minute == pytest.approx(60_000 * 3 / (ends[-1] - ends[0]))


def test_a_half_written_line_is_left_to_its_driver(storage: Path) -> None:
    journal = begun("torn", 5).folder / "journal.log"
    with journal.open("ab") as file:
        file.write(b'{"op_code": 4, "wor')
    before = journal.read_bytes()
    assert Feed(Store().open("torn", read_only=True)).snapshot.done == 5
    assert journal.read_bytes() == before


def test_few_of_many_dominated_trials_are_drawn(storage: Path) -> None:
    feed = Feed(begun("many", 40))
    shown = feed.snapshot
    dominated = [t for t in shown.trials.values() if t.outcome and t not in shown.front]
    assert thinned(dominated) == dominated
    few = thinned(dominated, limit=12)
    assert 2 <= len(few) <= 12 < len(dominated)
    assert set(map(id, few)) <= set(map(id, dominated))
    assert len(dominated) < DRAWN
    drawn = front_of(shown, (), {"A": shown.front[0].number})
    assert len(drawn["data"][0]["x"]) == len(dominated)
    assert drawn["layout"]["annotations"][-1]["text"] == "<b>A</b>"


def test_each_trial_that_is_left_out_is_near_one_that_is_drawn(storage: Path) -> None:
    places = np.random.default_rng(0).uniform(0, 0.1, (400, 2))
    places[-1] = 1, 1  # far from all others, and the last
    first = begun("base", 1).trials()[0]
    assert first.outcome is not None
    outcomes = [replace(first.outcome, macs=int(1e6 * x), accuracy_search=float(y)) for x, y in places]
    trials = [replace(first, number=i, outcome=outcome) for i, outcome in enumerate(outcomes)]
    kept = [t.number for t in thinned(trials, limit=30)]
    assert len(kept) <= 30
    apart = np.abs(places[:, None] - places[kept]).max(axis=2).min(axis=1)
    assert apart.max() <= 1 / 5 + 1e-6, "a grid of five by five cells has fewer than thirty"


def test_the_page_itself_brings_every_point_of_the_front(storage: Path) -> None:
    study = begun("seen", 40)
    with served(study.name) as url, urllib.request.urlopen(url) as answer:
        text = answer.read().decode()
    assert "<h1>ranksearch: seen</h1>" in text
    assert "40 of 40 trials" in text
    look = ElementTree.fromstring(text[text.index("<svg") : text.index("</svg>") + len("</svg>")])
    shown = Feed(study).snapshot
    groups = {len(group): [dot.attrib for dot in group] for group in look.iter("g")}
    assert groups.keys() == {len(shown.trials) - shown.failed - len(shown.front), len(shown.front), 1}
    places = [(float(dot["cx"]), -float(dot["cy"])) for dot in groups[len(shown.front)]]
    outcomes = [trial.outcome for trial in shown.front if trial.outcome]
    for place, values in (
        ([x for x, _ in places], [one.macs for one in outcomes]),
        ([y for _, y in places], [one.accuracy for one in outcomes]),
    ):
        slope, _ = np.polyfit(values, place, 1)
        assert slope > 0
        assert np.corrcoef(values, place)[0, 1] == pytest.approx(1, abs=1e-5), "a straight scale"
    (line,) = (one.attrib["points"].split() for one in look.iter("polyline"))
    assert len(line) == 2 * len(shown.front) - 1, "a step keeps its height up to the next point"


def test_a_mark_is_where_its_dot_is(storage: Path) -> None:
    study = Store().create("marked", setting_of(space_of()))
    for index in range(12):  # all are scored on the report images, which say less than the search images
        proposal = RANDOM.propose(TABLE, study.trials())
        assert isinstance(proposal, Proposal)
        outcome = proposal_outcome(TABLE, proposal)
        outcome = replace(outcome, accuracy=outcome.accuracy_search - 0.05, report_images=1000)
        study.finish(study.begin(proposal, index=index), outcome)
    shown = Feed(study).snapshot
    front = {t.number for t in shown.front}
    for number in shown.trials:
        drawn = front_of(shown, (), {"A": number})
        trace, mark = drawn["data"][number in front], drawn["layout"]["annotations"][-1]
        dots = dict(zip(trace["customdata"], zip(trace["x"], trace["y"], strict=True), strict=True))
        assert (mark["x"], mark["y"]) == pytest.approx(dots[number])
    assert 0 < len(front) < len(shown.trials)
    cheap, dear = shown.front[0].number, shown.front[-1].number
    for marked in ({"A": cheap, "B": dear}, {"A": dear, "B": cheap}, {"A": cheap, "B": cheap}):
        one, two = front_of(shown, (), marked)["layout"]["annotations"][-2:]
        assert one["x"] + one["ax"] < two["x"] + two["ax"], "letters do not meet between their points"


def test_importance_is_of_the_first_objective_and_of_the_trials_that_were_read(storage: Path) -> None:
    study = Store().create("other", setting_of(space_of(objectives=["loss", "macs"])))
    go_on(study, 30)
    expected = study.importance("loss")
    shown = Feed(study).snapshot
    del study._storage  # a page that is drawn never reads it
    drawn = _picture("importance", shown, (), {})
    assert "the loss" in drawn.title
    assert dict(zip(drawn.series[0].y, drawn.series[0].x, strict=True)) == pytest.approx(
        {name: 100 * share for name, share in expected.items()}
    )


def test_only_studies_of_the_same_weights_and_data_are_drawn_together(storage: Path) -> None:
    whole = setting_of(space_of())
    stranger = replace(whole, model=whole.model.model_copy(update={"weights_sha256": "1"}))
    studies = {
        "this": whole,
        "same": setting_of(space_of(seed=5)),
        "weights": stranger,
        "images": replace(whole, data_digest="2"),
    }
    feeds = {name: Feed(Store().create(name, setting)) for name, setting in studies.items()}
    assert [one.study.name for one in _others(feeds["this"].snapshot, feeds)] == ["same"]


def test_only_this_machine_is_answered_and_nothing_can_be_framed(storage: Path) -> None:
    begun("alone", 3)
    with served("alone") as url:
        with urllib.request.urlopen(url) as answer:
            assert answer.headers["X-Frame-Options"] == "DENY"
        with pytest.raises(urllib.error.HTTPError, match="403"):
            urllib.request.urlopen(urllib.request.Request(url, headers={"Host": "elsewhere.example"}))


def test_studies_that_are_not_there_or_too_many_are_refused(storage: Path) -> None:
    with pytest.raises(StudyError, match="found none"), feeds_of(Store(), ()):
        pass
    with pytest.raises(StudyError, match="nobody"), feeds_of(Store(), ("nobody",)):
        pass
    with pytest.raises(StudyError, match="at most 7"), feeds_of(Store(), [f"s{i}" for i in range(8)]):
        pass


_PLACE = """([x, y]) => {
    const graph = document.querySelector('#front .js-plotly-plot');
    graph.scrollIntoView({block: 'center'});
    const {left, top} = graph.getBoundingClientRect(), {xaxis, yaxis} = graph._fullLayout;
    return {x: left + xaxis._offset + xaxis.l2p(x), y: top + yaxis._offset + yaxis.l2p(y)};
}"""
"""Where a point of the front's picture is on the screen."""


def until_clicked(page: Any, point: list[float], said: str) -> None:
    """Click at a point of the front until the page tells of it: a picture that is just drawn anew takes no click, and
    what appears above it moves it."""
    deadline = time.monotonic() + 60
    while said not in text(page, "#details"):
        assert time.monotonic() < deadline, text(page, "#details")
        place = page.evaluate(_PLACE, point)
        page.mouse.move(place["x"] - 1, place["y"])
        page.mouse.click(place["x"], place["y"])
        page.wait_for_timeout(1000)


def text(page: Any, selector: str) -> str:
    return str(page.inner_text(selector))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_live_search_is_followed_by_keyboard_by_day_and_by_night(storage: Path, tmp_path: Path) -> None:
    study = begun("live", 12)
    begun("other", 10)
    with chromium() as browser, served("live", "other") as url, opened(browser, url) as page:
        page.wait_for_selector("#front-table button")
        page.wait_for_selector("#first-look", state="detached")
        assert "12 of 40" in text(page, "#progress")
        assert "out of memory" in text(page, "#troubles")
        with study.driving():
            go_on(study, 20)
            page.wait_for_function("document.querySelector('#progress').innerText.includes('32 of 40')")
            assert "running" in text(page, "#progress")
        rows = json.dumps([*map(str, study.front()["trial"]), "dense"], separators=(",", ":"))
        heads = "JSON.stringify([...document.querySelectorAll('#front-table tbody th')].map(e => e.innerText))"
        page.wait_for_function(f"{heads} === '{rows}'")

        page.focus("#front-table button >> nth=0")
        page.keyboard.press("Enter")
        first = study.front_trials()[0].number
        page.wait_for_function(f"document.querySelector('#details').innerText.includes('A: trial {first}.')")
        page.click("#slot >> text=point B")
        page.click("#pick")
        knee = study.rank_map(knee=True).provenance["trial"]
        page.wait_for_function(f"document.querySelector('#details').innerText.includes('B: trial {knee}.')")
        assert page.locator("#details tbody tr").count() == len(TABLE.layers)
        # On the picture: the same point becomes A and then B.
        end = study.front_trials()[-1]
        assert end.outcome is not None
        point = [end.outcome.macs / 1e9, 100 * float(study.front()["accuracy"].iloc[-1])]
        for slot in ("A", "B"):
            page.click(f"#slot >> text=point {slot}")
            until_clicked(page, point, f"{slot}: trial {end.number}.")
        page.click("#pick")
        page.wait_for_function(f"document.querySelector('#details').innerText.includes('B: trial {knee}.')")
        page.click("#rule >> text=% of the MACs")
        page.fill("#amount", "0.1")
        page.click("#pick")
        page.wait_for_function("document.querySelector('#pick-answer').innerText.includes('at most')")

        with page.expect_download() as found:
            page.click("#export-B")
        from_page = Path(found.value.path()).read_bytes()
        with pytest.raises(SystemExit, match="0"):
            main(["export", "live", "--trial", str(knee), "-o", str(tmp_path / "rank_map.json")])
        assert from_page == (tmp_path / "rank_map.json").read_bytes()

        for name, title in PICTURES.items():
            page.click(f"#picture-name >> text={name}")
            page.wait_for_function(f"document.querySelector('#picture-note').innerText.includes('{title}')")
        assert serious_faults(page) == []
        page.click("#theme")
        page.wait_for_function("document.documentElement.dataset.theme === 'night'")
        assert serious_faults(page) == []


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_telephone_at_night_shows_the_page_without_scrolling_sideways(storage: Path) -> None:
    begun("small", 15)
    with (
        chromium() as browser,
        served("small") as url,
        opened(browser, url, width=390, height=844, scheme="dark") as page,
    ):
        page.wait_for_selector("#front-table button")
        page.click("#front-table button >> nth=0")
        page.wait_for_function("document.querySelector('#details').innerText.includes('A: trial')")
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert max(json.loads(ground.replace("rgb(", "[").replace(")", "]"))) < 60
        assert serious_faults(page) == []


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_map_exported_from_the_page_is_applied_to_the_network(storage: Path, repository: Path) -> None:
    study = search(
        repository / "search_spaces" / "quickstart.yaml",
        settings=["budget.trials=6", "tracking.enabled=false"],
        name="real",
    )
    from ranksearch.models import build_model
    from ranksearch.surgery import count_macs

    with chromium() as browser, served("real") as url, opened(browser, url) as page:
        page.wait_for_selector("#front-table button")
        page.click("#pick")
        page.wait_for_selector("#export-A:not([disabled])")
        with page.expect_download() as found:
            page.click("#export-A")
        rank_map = RankMap.load(found.value.path())
    record = study.setting.model
    model = build_model(study.space.model, weights=Path(record.weights) if record.weights else None)
    compressed = rank_map.apply(model)
    assert count_macs(compressed, record.input_shape) == rank_map.macs < rank_map.dense_macs
