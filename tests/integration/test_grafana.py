"""The Grafana board asks only for what a running search on Ray really exports."""

from __future__ import annotations

import json
import re
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import ray
from prometheus_client.parser import text_string_to_metric_families

from ranksearch.engine.meter import kind
from ranksearch.launch import resume, search
from ranksearch.space import Space
from ranksearch.study import Study
from ranksearch.trial import Trial
from tests.conftest import REPOSITORY
from tests.services import ray_cluster

pytestmark = pytest.mark.xdist_group("ray")
BOARD = json.loads((REPOSITORY / "dashboards" / "grafana" / "ranksearch.json").read_text(encoding="utf-8"))
QUERIES = [target["expr"] for panel in BOARD["panels"] for target in panel["targets"]]
_SELECTOR = re.compile(r"\b(ray_\w+)(?:\{([^}]*)\})?")
_MATCHER = re.compile(r'(\w+)(=~|=)"([^"]*)"')
_GROUPED = re.compile(r"\bby \(([^)]*)\) \(")

Series = tuple[str, frozenset[tuple[str, str]]]
"""A metric's name and its labels."""


@dataclass(frozen=True)
class Asked:
    """A metric that a query asks for: the values that its labels must have, and the labels it is grouped by."""

    name: str
    wanted: tuple[tuple[str, str], ...]
    labels: frozenset[str]

    def answered(self, seen: Mapping[Series, float], study: str) -> bool:
        return any(name == self.name and self._fits(dict(labels), study) for name, labels in seen)

    def _fits(self, labels: Mapping[str, str], study: str) -> bool:
        values = ((label, study if value == "$study" else value) for label, value in self.wanted)
        return self.labels <= labels.keys() and all(labels.get(label) == value for label, value in values)


def asked(query: str) -> Iterator[Asked]:
    """What a query asks for, each metric with the labels of all groups that it stands in."""
    groups = [(*_span(query, m.end()), {name.strip() for name in m[1].split(",")}) for m in _GROUPED.finditer(query)]
    for found in _SELECTOR.finditer(query):
        around = [labels for start, end, labels in groups if start <= found.start() < end]
        wanted = tuple((label, value) for label, _, value in _MATCHER.findall(found[2] or ""))
        yield Asked(found[1], wanted, frozenset().union(*around))


def _span(query: str, start: int) -> tuple[int, int]:
    """From ``start`` to the parenthesis that closes the one before it."""
    depth, end = 1, start
    while depth:
        depth += {"(": 1, ")": -1}.get(query[end], 0)
        end += 1
    return start, end


def on_gpus(one: Asked) -> bool:
    return one.name.startswith(("ray_node_gpus_", "ray_node_gram_"))


ASKED = {one for query in QUERIES for one in asked(query)}


def test_legends_name_labels_that_their_queries_keep() -> None:
    for panel in BOARD["panels"]:
        for target in panel["targets"]:
            kept = {label for one in asked(target["expr"]) for label in one.labels}
            assert set(re.findall(r"{{(\w+)}}", target["legendFormat"])) <= kept, target
    assert len({panel["id"] for panel in BOARD["panels"]}) == len(BOARD["panels"])
    assert {one.name for one in ASKED if "ranksearch" in one.name} == {
        *(f"ray_ranksearch_trials_{name}_total" for name in ("proposed", "complete", "failed")),
        *(f"ray_ranksearch_trials_{name}" for name in ("left", "queued")),
        *(f"ray_ranksearch_{name}" for name in ("trial_seconds_total", "workers", "hypervolume", "front_points")),
    }


def test_panels_of_gpus_ask_for_what_rays_agent_declares() -> None:
    """Where there is no GPU nothing is exported of one; the names and labels are those of Ray's own source."""
    from ray.dashboard.modules.reporter.reporter_agent import METRICS_GAUGES

    wanted = {one for one in ASKED if on_gpus(one)}
    assert {one.name for one in wanted} == {
        "ray_node_gpus_utilization",
        "ray_node_gram_used",
        "ray_node_gram_available",
    }
    for one in wanted:
        declared = METRICS_GAUGES[one.name.removeprefix("ray_")].view.columns
        assert {label for label, _ in one.wanted} | one.labels <= set(declared)


def space(address: str, trials: int) -> Space:
    digits = {"train_images": 200, "calibration_images": 64, "search_images": 100, "report_images": 100}
    return Space.model_validate(
        {
            "model": {"name": "tests.networks:FragileNet"},
            "data": {"source": "digits", **digits, "mean": [0.3053], "std": [0.3763]},
            "formats": ["tucker2"],
            "budget": {"trials": trials},
            "strategy": {"name": "random", "price": "weight"},
            "evaluation": {"refit_images": 32},
            "resources": {"engine": "ray", "workers": 2, "address": address},
            "tracking": {"enabled": False},
        }
    )


class Prometheus:
    """What a Prometheus would have seen of the machines of a cluster: the last value of every series."""

    def __init__(self) -> None:
        self.seen: dict[Series, float] = {}

    def scrape(self) -> None:
        for node in ray.nodes():  # type: ignore[no-untyped-call]
            url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
            with urllib.request.urlopen(url, timeout=60) as answer:  # no token: Prometheus has none
                for family in text_string_to_metric_families(answer.read().decode()):
                    for sample in family.samples:
                        self.seen[sample.name, frozenset(sample.labels.items())] = sample.value

    def figures(self, study: str) -> dict[str, Any]:
        """Of one study: name, or name and the further label's value, to the highest value of any driver's series."""
        found: dict[str, Any] = {}
        for (name, labels), value in self.seen.items():
            told = dict(labels)
            if name.startswith("ray_ranksearch_") and told["study"] == study:
                further = told.get("kind") or told.get("state")
                key = " ".join(filter(None, (name.removeprefix("ray_ranksearch_"), further)))
                found[key] = max(value, found.get(key, value))
        return found


def of_study(study: Study) -> dict[str, float]:
    """The figures of a search whose trials have all ended, but for those of its workers."""
    trials = study.trials()
    frame = study.trials_frame(trials)
    reasons = frame.loc[frame["state"] == "FAIL", "reason"]
    failed = Counter(reason.split(":")[0] for reason in reasons)
    return {
        "trials_proposed_total": len(frame),
        "trials_complete_total": int((frame["state"] == "COMPLETE").sum()),
        **{f"trials_failed_total {name}": count for name, count in failed.items()},
        "trial_seconds_total": pytest.approx(frame["seconds"].sum()),
        "trials_left": study.space.budget.trials - frame["index"].nunique(),
        "hypervolume": pytest.approx(study.hypervolume(trials)),
        "front_points": int(frame["on_front"].sum()),
    }


def awaited(study: Study, prometheus: Prometheus) -> None:
    """Scrape until all that the board asks for is there, with the study's figures; Ray tells every ten seconds."""
    expected, deadline = of_study(study), time.monotonic() + 180
    while True:
        prometheus.scrape()
        missing = [one for one in ASKED if not on_gpus(one) and not one.answered(prometheus.seen, study.name)]
        found = prometheus.figures(study.name)
        wrong = {name: (value, found.get(name)) for name, value in expected.items() if found.get(name) != value}
        if not missing and not wrong:
            return
        assert time.monotonic() < deadline, f"not exported: {missing}; expected and exported: {wrong}"
        time.sleep(1)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_query_of_the_board_finds_its_figures_of_a_running_search(storage: Path) -> None:
    prometheus = Prometheus()
    ended: list[int] = []

    def watch(study: Study, trial: Trial) -> None:
        ended.append(trial.number)
        if len(ended) in (12, 15):  # the search runs: it waits for this
            awaited(study, prometheus)

    with ray_cluster(2) as address:
        study = search(space(address, 12), name="measured", watch=watch)
        states = [trial.state for trial in study.trials()]
        assert {"COMPLETE", "FAIL"} == set(states), "else the board would have less to show"
        # Resumed, it goes on where it was, though Ray knows the first driver's figures still.
        study = resume("measured", trials=15, watch=watch)
    assert len(ended) == len(study.trials()) == 15
    found = prometheus.figures("measured")
    assert sum(found[f"workers {state}"] for state in ("busy", "idle", "starting")) >= 1
    assert found["trials_queued"] >= 0
    assert set(found) - set(of_study(study)) == {"workers busy", "workers idle", "workers starting", "trials_queued"}


def test_a_failure_is_of_a_kind_that_is_a_word() -> None:
    for reason, expected in {
        "ValueError: a kernel holds NaN": "ValueError",
        "LinAlgError: SVD did not converge": "LinAlgError",
        "OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB": "memory",
        "MemoryError (also alone on its machine or GPU)": "memory",
        "its worker died (killed, or out of memory)": "interrupted",
        "its worker died before it could be tried alone": "interrupted",
        "interrupted: the search was stopped": "interrupted",
        "KeyError": "KeyError",
        "something else: that no class is called by": "other",
        "": "other",
    }.items():
        assert kind(reason) == expected, reason
