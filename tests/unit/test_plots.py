"""The front's pictures, read back through Plotly's and Pillow's own eyes."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from ranksearch.plots import front_figure, front_html, front_png

DENSE = {"accuracy": 0.90, "accuracy_search": 0.91, "macs": 40_000_000, "params": 270_000}


def tables() -> tuple[pd.DataFrame, pd.DataFrame]:
    """Five trials: 0 and 3 on the front, 1 and 2 dominated (2 never scored on the report images), 4 failed."""
    ratio = np.array([0.75, 0.8, 0.5, 0.25, np.nan])
    trials = pd.DataFrame(
        {
            "number": range(5),
            "state": ["COMPLETE"] * 4 + ["FAIL"],
            "origin": ["uniform", "uniform", "optuna <nsga2>", "energy", "optuna"],
            "accuracy": [0.85, 0.80, np.nan, 0.60, np.nan],
            "accuracy_search": [0.86, 0.81, 0.55, 0.62, np.nan],
            "macs": ratio * DENSE["macs"],
            "macs_ratio": ratio,
            "gmacs": ratio * DENSE["macs"] / 1e9,
            "params": [200_000, 210_000, 100_000, 50_000, 0],
            "on_front": [True, False, False, True, False],
        }
    )
    front = trials[trials["on_front"]].rename(columns={"number": "trial"})
    return trials, front.assign(accuracy_low=front["accuracy"] - 0.02, accuracy_high=front["accuracy"] + 0.01)


def test_every_complete_trial_is_drawn_once_where_it_belongs() -> None:
    trials, front = tables()
    dominated, line, dense = json.loads(front_figure(trials, front, dense=DENSE, title="t").to_json())["data"]
    assert dominated["x"] == pytest.approx([0.032, 0.020])
    assert dominated["y"] == pytest.approx([81.0, 55.0])
    assert "search images" in dominated["name"]
    assert line["x"] == pytest.approx([0.010, 0.030])
    assert line["y"] == pytest.approx([60.0, 85.0])
    assert line["error_y"]["array"] == pytest.approx([1.0, 1.0])
    assert line["error_y"]["arrayminus"] == pytest.approx([2.0, 2.0])
    assert line["line"]["shape"] == "hv"
    assert (dense["x"], dense["y"]) == ([pytest.approx(0.040)], [pytest.approx(90.0)])


def test_hover_names_the_trial_its_accuracies_and_its_cost() -> None:
    trials, front = tables()
    dominated, line, _ = front_figure(trials, front, dense=DENSE, title="t").data
    assert line.text[0] == (
        "Trial 3 (energy)<br>accuracy, report: 60.00 % [58.00 to 61.00]<br>accuracy, search: 62.00 %<br>"
        "0.01 GMACs, 25.0 % of dense<br>50,000 parameters"
    )
    # A trial that was never scored on the report images says nothing of them; names cannot inject markup.
    assert dominated.text[1] == (
        "Trial 2 (optuna &lt;nsga2&gt;)<br>accuracy, search: 55.00 %<br>"
        "0.02 GMACs, 50.0 % of dense<br>100,000 parameters"
    )


def test_ticks_give_the_share_of_dense_beside_the_gmacs() -> None:
    trials, front = tables()
    axis = front_figure(trials, front, dense=DENSE, title="t").layout.xaxis
    assert axis.title.text == "GMACs per image (share of dense)"
    assert axis.tickvals[-1] == pytest.approx(0.040)
    assert axis.ticktext[-1] == "0.04<br>(100 %)"
    assert axis.tickvals[0] <= 0.010
    shares = [float(re.search(r"\((\d+) %\)", text)[1]) / 100 for text in axis.ticktext]  # type: ignore[index]
    assert [share * 0.040 for share in shares] == pytest.approx(list(axis.tickvals))


class Page(HTMLParser):
    """Collects the cells of the tables, and what the page would fetch."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.cells: list[str] = []
        self.fetched: list[str] = []
        self._in_cell = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._in_cell = tag == "td"
        self.fetched += [value or "" for key, value in attrs if key in ("src", "href")]

    def handle_data(self, data: str) -> None:
        if self._in_cell and data.strip():
            self.cells.append(data)


def test_the_page_needs_no_network_and_tabulates_the_front() -> None:
    trials, front = tables()
    text = front_html(trials, front, dense=DENSE, title="<script>alert(1)</script>")
    page = Page(text)
    assert page.fetched == []
    assert "Plotly.newPlot" in text
    assert len(text) > 1_000_000, "plotly.js itself is in the page"
    assert "<script>alert(1)" not in text
    assert page.cells[8:] == ["3", "60.00", "58.00 to 61.00", "62.00", "0.01", "25.0", "50,000", "energy"]


def test_the_png_shows_every_kind_of_point(tmp_path: Path) -> None:
    trials, front = tables()
    front_png(trials, front, tmp_path / "front.png", dense=DENSE, title="costs $5")
    with Image.open(tmp_path / "front.png") as image:
        assert image.format == "PNG"
        assert image.size == (1600, 1000)
        colours = {colour for _, colour in image.convert("RGB").getcolors(1 << 24) or ()}
    assert {(0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00), (0x8C, 0x8C, 0x8C)} <= colours


def test_a_search_with_nothing_done_still_has_pictures(tmp_path: Path) -> None:
    trials, front = tables()
    front_png(trials[:0], front[:0], tmp_path / "front.png", dense=DENSE, title="t")
    assert (tmp_path / "front.png").stat().st_size > 0
    assert "Dense network" in front_html(trials[:0], front[:0], dense=DENSE, title="t")
