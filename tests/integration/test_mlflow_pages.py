"""MLflow's own pages in a real browser: what a user sees of a search who opens ``ranksearch ui``."""

from __future__ import annotations

import re
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from ranksearch.space import TrackingSpec
from ranksearch.storage import Store
from ranksearch.study import Study
from ranksearch.tracking import Tracker, View
from tests.browser import chromium, opened
from tests.integration.test_story import runs_of, searched
from tests.services import free_port, started
from tests.studies import setting_of, space_of


@contextmanager
def served(study: Study) -> Iterator[str]:
    """The address that ``ranksearch ui`` prints, once it answers."""
    port = free_port()
    with started("-m", "ranksearch", "ui", study.name, f"--port={port}") as process:
        assert process.stdout is not None
        url = process.stdout.readline().split()[1]
        deadline = time.monotonic() + 180
        while True:
            assert process.poll() is None
            assert time.monotonic() < deadline, "no answer"
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=30).close()
                break
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                time.sleep(0.3)
        yield url


def texts(page: Any, selector: str) -> list[str]:
    """What elements say, from left to right and from above."""
    return list(
        page.eval_on_selector_all(
            selector,
            """found => found.map(e => [e.getBoundingClientRect(), e.innerText.trim()])
                .sort(([a], [b]) => a.top - b.top || a.left - b.left).map(([_, text]) => text).filter(Boolean)""",
        )
    )


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_pages_tell_of_the_front_of_its_search_and_of_failures(storage: Path) -> None:
    study = Store().create("told", setting_of(space_of(strategy={"name": "random"})))
    with closing(Tracker(TrackingSpec(), folder=storage)) as tracker:
        view = View(study, tracker)
        searched(study, view, 12)
        view.finish("FINISHED")
        parent, trials, experiment = runs_of(MlflowClient(tracking_uri=tracker.uri))
    front = [f"trial-{number}" for number in study.front()["trial"]]
    assert 2 < len(front) < 12

    with chromium() as browser, served(study) as url, opened(browser, url, width=2600, ours=False) as page:
        # The front alone, by rising MACs, with the columns that matter and no other.
        page.wait_for_function(f"document.body.innerText.includes('{len(front)} matching runs')")
        page.wait_for_selector(f"text={front[-1]}")
        assert [name for name in texts(page, "a[href*='/runs/']") if name.startswith("trial-")] == front
        for name in ("on_front", "strategy", "fidelity"):
            page.wait_for_selector(f"[role=columnheader] >> text={name}")
        heads = set(texts(page, "[role=columnheader]")) - {"Run Name", "Created", "Duration", "Metrics", "Tags"}
        metrics = {"accuracy", "accuracy_search", "macs_ratio", "gmacs", "params"}
        assert heads == metrics | {"on_front", "strategy", "fidelity"}, "of the front none has a reason"

        runs = f"{url.partition('/#/')[0]}/#/experiments/{experiment.experiment_id}/runs"
        page.goto(f"{runs}/{parent.info.run_id}")
        page.click("text=Show more")
        # The picture is there, and was loaded.
        page.wait_for_function(
            "[...document.querySelectorAll('img')].some(i => i.src.includes('front.png') && i.naturalWidth > 500)"
        )
        said = page.inner_text("body")
        assert "ranksearch publish told --knee" in said
        assert all(f"\n{name.removeprefix('trial-')}\t" in said for name in front), "the front's table"

        page.goto(f"{runs}/{trials[1].info.run_id}")
        page.wait_for_function("document.body.innerText.includes('Failed: out of memory')")
        assert re.search(r"reason\s*:\s*out of memory", page.inner_text("body"))
