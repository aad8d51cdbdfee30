"""The dashboard with a large study, measured in a real browser: first paint, and updates.

    python -m benchmarks.dashboard --trials 10000

Needs Debian's `chromium` and the `dev` extra. Prints milliseconds. `first paint`: from the navigation until the front
is on the screen. `ready`: until Plotly has drawn it, and it can be clicked. `update`: from the request that hears of a
new trial until the front with that trial is drawn.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
from optuna.distributions import BaseDistribution, IntDistribution
from optuna.storages import JournalStorage
from optuna.storages.journal import BaseJournalBackend
from optuna.trial import TrialState, create_trial

from dashboards.server import feeds_of, serving
from ranksearch.storage import Store
from ranksearch.study import Study
from ranksearch.trial import Proposal, objective_values
from tests.browser import chromium, opened
from tests.studies import TABLE, setting_of, space_of
from tests.tables import table_outcome

# Notes when the front was first drawn with its present points.
_WATCH = """
performance.setResourceTimingBufferSize(100000);
window.drawn = [];
let last = "";
new MutationObserver(() => {
  const graph = document.querySelector("#front .js-plotly-plot");
  const line = graph && graph.data && graph.data[1];
  if (!line || !document.querySelector("#front .scatterlayer .trace")) return;
  const now = JSON.stringify([line.x, line.y]);
  if (now !== last) window.drawn.push(performance.now());
  last = now;
}).observe(document, {childList: true, subtree: true, attributes: true});
"""
_REQUESTS = """performance.getEntriesByType("resource").filter(e => e.name.includes("_dash-update-component"))
  .map(e => [e.startTime, e.responseEnd, e.decodedBodySize])"""
_PICTURE_BYTES = 20_000
"""Answers that are larger bring a picture."""


class _Memory(BaseJournalBackend):
    """A journal in memory: writing ten thousand trials one by one to a disk would take minutes."""

    def __init__(self, logs: list[dict[str, Any]]) -> None:
        self.logs = logs

    def read_logs(self, log_number_from: int) -> Iterator[dict[str, Any]]:
        yield from self.logs[log_number_from:]

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        self.logs += json.loads(json.dumps(logs))


def large(store: Store, trials: int) -> Study:
    """A study of so many random rank maps, one in twenty failed."""
    study = store.create("large", setting_of(space_of(budget={"trials": 2 * trials})))
    journal = study.folder / "journal.log"
    memory = _Memory([json.loads(line) for line in journal.read_text(encoding="utf-8").splitlines()])
    storage, rng = JournalStorage(memory), np.random.default_rng(0)
    distributions: dict[str, BaseDistribution] = {
        layer.name: IntDistribution(0, len(layer.candidates) - 1) for layer in TABLE.layers
    }
    for index in range(trials):
        choices = [int(rng.integers(len(layer.candidates))) for layer in TABLE.layers]
        outcome = table_outcome(TABLE, choices)
        attrs: dict[str, Any] = {"index": index, "attempt": 0, "origin": "random", "note": {}}
        failed = index % 20 == 7
        storage.create_new_trial(
            0,
            create_trial(
                state=TrialState.FAIL if failed else TrialState.COMPLETE,
                params={layer.name: i for layer, i in zip(TABLE.layers, choices, strict=True)},
                distributions=distributions,
                values=None if failed else objective_values(outcome, ("accuracy", "macs")),
                user_attrs=attrs | ({"reason": "out of memory"} if failed else {"outcome": outcome.to_json()}),
            ),
        )
    journal.write_text("".join(json.dumps(log) + "\n" for log in memory.logs), encoding="utf-8")
    return store.open("large")


def measured(study: Study, url: str, updates: int) -> tuple[float, float, list[float]]:
    """Milliseconds of the first paint, until the picture is ready, and of each update."""
    with chromium() as browser, opened(browser, "about:blank") as page:
        page.add_init_script(_WATCH)
        page.goto(url)
        page.wait_for_function("window.drawn.length === 1")
        ready = float(page.evaluate("window.drawn[0]"))
        assert "<polyline" in page.request.get(url).text(), "the page brings the front"
        first = float(page.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime"))
        found = []
        cheapest = table_outcome(TABLE, [0] * len(TABLE.layers))
        with study.driving():
            for i in range(updates):
                trial = study.begin(Proposal(choices=(0,) * len(TABLE.layers), origin="new"), index=len(study.trials()))
                better = 0.5 + 0.3 * i / updates
                study.finish(trial, replace(cheapest, accuracy_search=better, accuracy=better))
                page.wait_for_function(f"window.drawn.length === {i + 2}")
                time.sleep(0.5)
                at = float(page.evaluate("window.drawn.at(-1)"))
                found.append(at - _began(page.evaluate(_REQUESTS), at))
    return first, ready, found


def _began(requests: list[tuple[float, float, int]], drawn: float) -> float:
    """When the request began that heard of what was then drawn, and brought it."""
    return max(start for start, end, size in requests if end <= drawn and size > _PICTURE_BYTES)


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=10_000)
    parser.add_argument("--updates", type=int, default=10)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        store = Store(Path(folder))
        study = large(store, arguments.trials)
        began = time.monotonic()
        with feeds_of(store, ["large"]) as feeds:
            reading = time.monotonic() - began
            server = serving(feeds, host="127.0.0.1", port=0)
            Thread(target=server.serve_forever, daemon=True).start()
            first, ready, updates = measured(study, f"http://127.0.0.1:{server.server_port}/", arguments.updates)
            server.shutdown()
    load = os.getloadavg()[0]
    print(f"{arguments.trials} trials, {os.cpu_count()} cores, load {load:.1f}; read in {reading:.1f} s")
    print(f"first paint {first:.0f} ms")
    print(f"ready       {ready:.0f} ms")
    print(f"update      {statistics.median(updates):.0f} ms median, {max(updates):.0f} ms worst of {len(updates)}")


if __name__ == "__main__":
    main()
