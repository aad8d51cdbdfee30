"""MLflow with a large search: what logging costs the driver, how far it lags, and how the experiment's page opens.

    python -m benchmarks.mlflow_runs --trials 2000

Needs Debian's `chromium` and the `dev` extra. Trials are looked up in a table and end at an even pace; each has a run
of its own in the default store. `driver`: milliseconds that a trial takes the driver's thread beside its pause, with
MLflow and without. `lag`: from a trial's end until its run is complete. `page`: from the navigation until the front's
rows and columns are there.
"""

from __future__ import annotations

import argparse
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from ranksearch.driver import Driver
from ranksearch.space import TrackingSpec
from ranksearch.storage import Store
from ranksearch.strategies import Terms, build_strategy
from ranksearch.study import Study
from ranksearch.tracking import Tracker, View
from tests.browser import chromium, opened
from tests.studies import TABLE, setting_of, space_of
from tests.tables import table_outcome

COLUMNS = ("accuracy", "accuracy_search", "macs_ratio", "gmacs", "params", "on_front", "strategy", "fidelity")


def searched(study: Study, view: View | None, pause_s: float, watch: list[float]) -> None:
    """Run all trials of the budget; ``watch`` gets the seconds that each took the driver's thread."""
    strategy = build_strategy(study.space.strategy, Terms(seed=1, objectives=tuple(study.space.objectives)))
    driver = Driver(study, strategy, view=view)
    due = time.monotonic()
    while True:
        began = time.perf_counter()
        tasks = driver.take(1)
        if not isinstance(tasks, list):
            return
        driver.done(tasks[0], table_outcome(TABLE, tasks[0].choices))
        watch.append(time.perf_counter() - began)
        due += pause_s
        time.sleep(max(0.0, due - time.monotonic()))


class Lag:
    """When each trial was handed to MLflow, and when its run was complete."""

    def __init__(self, tracker: Tracker) -> None:
        self.seconds: list[float] = []
        self._write = tracker._write_trial
        self._hear = tracker.trial
        self._began: dict[int, float] = {}
        tracker.trial = self._trial  # type: ignore[method-assign]
        tracker._write_trial = self._written  # type: ignore[method-assign]

    def _trial(self, record) -> None:  # type: ignore[no-untyped-def]
        self._began[record.number] = time.monotonic()
        self._hear(record)

    def _written(self, record, again: bool) -> None:  # type: ignore[no-untyped-def]
        self._write(record, again)
        self.seconds.append(time.monotonic() - self._began[record.number])


@contextmanager
def pages(study: Study, folder: Path) -> Iterator[str]:
    """The address that ``ranksearch ui`` prints, once it answers."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "ranksearch", "ui", study.name, "--port", str(port), "--storage", str(folder)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert process.stdout is not None
        url = process.stdout.readline().split()[1]
        while process.poll() is None:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=30).close()
                break
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                time.sleep(0.3)
        yield url
    finally:
        process.terminate()
        process.wait()


def page_seconds(url: str, points: int) -> list[float]:
    """Seconds of the first visit and of a second one."""
    found = []
    with chromium() as browser:
        for _ in range(2):
            began = time.monotonic()
            with opened(browser, url, width=2600, height=1600, ours=False) as page:
                page.wait_for_function(f"document.body.innerText.includes('{points} matching runs')")
                page.wait_for_selector("a[href*='/runs/'] >> text=trial-")
                for name in COLUMNS:
                    page.wait_for_selector(f"[role=columnheader] >> text=/^{name}$/")
                found.append(time.monotonic() - began)
    return found


def main() -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=2000)
    parser.add_argument("--per-second", type=float, default=4.0, help="trials that end in a second")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tracking = {"max_runs": arguments.trials}
        large = space_of(budget={"trials": arguments.trials}, strategy={"name": "random"}, tracking=tracking)
        alone: list[float] = []
        searched(Store(folder / "untracked").create("alone", setting_of(large)), None, 0.0, alone)
        store = Store(folder)
        beside: list[float] = []
        study = store.create("large", setting_of(large))
        with closing(Tracker(TrackingSpec(), folder=folder)) as tracker:
            lag = Lag(tracker)
            view = View(study, tracker)
            searched(study, view, 1 / arguments.per_second, beside)
            tracker.flush()
            began = time.monotonic()
            view.finish("FINISHED")
            finishing = time.monotonic() - began
        with pages(study, folder) as url:
            visits = page_seconds(url, len(study.front()))
    said = f"{arguments.trials} trials, {arguments.per_second:g} a second; {os.cpu_count()} cores"
    print(f"{said}, load {os.getloadavg()[0]:.1f}")
    for title, values in (("without MLflow", alone), ("with MLflow", beside)):
        values = sorted(1000 * value for value in values)
        most = values[int(0.99 * len(values))]
        print(f"driver  {statistics.mean(values):6.1f} ms mean, at most {most:6.1f} ms for 99 %, {title}")
    lags = sorted(lag.seconds)
    print(f"lag     {statistics.median(lags):6.2f} s median, {lags[-1]:6.2f} s worst of {len(lags)}")
    print(f"finish  {finishing:6.1f} s: pictures, tables, the front's tags")
    print(f"page    {visits[0]:6.1f} s, {visits[1]:.1f} s once more")


if __name__ == "__main__":
    main()
