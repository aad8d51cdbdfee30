"""Figures of a search for Prometheus, by Ray's own metrics: each machine's agent serves them beside those of Ray.

Prometheus sees each name with ``ray_`` before it. The figures are those of the study: a resumed search goes on where
it was, and what ends in ``_total`` never falls.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from threading import Event, Lock, Thread
from typing import Self

from ray.util.metrics import Gauge

from ranksearch.study import Study
from ranksearch.trial import Trial

_ERROR = re.compile(r"[A-Za-z_]\w*(?:Error|Exception|Interrupt|Exit)(?=:|$)")
_KINDS = {
    "interrupted": ("interrupted:", "its worker died"),
    "memory": ("MemoryError", "out of memory", "can't allocate memory"),
    "time": ("it took longer than",),
}
"""Kind of failure to what its reason contains; the first that fits."""
_FIGURES = {
    "trials_proposed_total": "Trials begun, those tried once more too",
    "trials_complete_total": "Trials that were scored",
    "trials_failed_total": "Trials that failed, by the kind of reason",
    "trial_seconds_total": "Seconds that complete trials took together",
    "trials_left": "Proposals of the budget that have not ended",
    "trials_queued": "Trials begun that wait for a worker",
    "workers": "Workers, by what they do",
    "hypervolume": "Share of the objectives' box that the front dominates",
    "front_points": "Trials on the front",
}
_LABELS = {"trials_failed_total": "kind", "workers": "state"}
"""Figures that have a label beside the study's name."""
_REPEAT_S = 2.0


class Meter:
    """Counts and measures a search, in a ``with`` block in which Ray runs."""

    def __init__(self, study: Study) -> None:
        self._study = study
        self._front = study.growing_front()
        self._done: set[int] = set()
        """Proposals whose last try has ended for good."""
        self._gauges: dict[str, Gauge] = {}
        self._shown: dict[tuple[str, str], float] = {}
        """Figure and its label's value to the last value."""
        self._showing = Lock()
        self._stopping = Event()
        self._repeater = Thread(target=self._repeat, name="meter", daemon=True)

    def __enter__(self) -> Self:
        # Made here, as an object of Ray's last connection would count for that one still. No counters of Ray's: a
        # process that connects to Ray more than once may send all that they count twice.
        self._gauges = {name: self._gauge(name, about) for name, about in _FIGURES.items()}
        trials = self._study.trials()
        self.proposed(len(trials))
        self._take([trial for trial in trials if trial.state != "RUNNING"])
        self._repeater.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self._repeater.join()

    def proposed(self, count: int) -> None:
        """Count trials that were begun."""
        self._count("trials_proposed_total", count)

    def ended(self, trial: Trial) -> None:
        """Count a trial that ended."""
        self._take([trial])

    def busy(self, *, queued: int, workers: Mapping[str, int]) -> None:
        """Show how many trials wait, and how many workers are ``busy``, ``idle`` and ``starting``."""
        self._show("trials_queued", queued)
        for state, count in workers.items():
            self._show("workers", count, state)

    def _take(self, trials: Iterable[Trial]) -> None:
        counted = {("trials_complete_total", ""): 0, ("trial_seconds_total", ""): 0.0}
        moved = ("front_points", "") not in self._shown
        for trial in trials:
            if not trial.retry:
                self._done.add(trial.index)
            if trial.outcome is None:
                failed = "trials_failed_total", kind(trial.reason or "")
                counted[failed] = counted.get(failed, 0) + 1
            else:
                counted["trials_complete_total", ""] += 1
                counted["trial_seconds_total", ""] += trial.outcome.seconds
            moved |= self._front.take(trial)
        for (name, label), count in counted.items():
            self._count(name, count, label)
        self._show("trials_left", self._study.space.budget.trials - len(self._done))
        if moved:
            self._show("hypervolume", self._study.hypervolume(list(self._front)))
            self._show("front_points", len(self._front))

    def _count(self, name: str, count: float, label: str = "") -> None:
        self._show(name, self._shown.get((name, label), 0) + count, label)

    def _show(self, name: str, value: float, label: str = "") -> None:
        with self._showing:
            self._shown[name, label] = value
            self._tell(name, label)

    def _tell(self, name: str, label: str) -> None:
        self._gauges[name].set(self._shown[name, label], {_LABELS[name]: label} if label else {})

    def _repeat(self) -> None:
        """Ray forgets a gauge's value once it was asked for it, and trials may take an hour."""
        while not self._stopping.wait(_REPEAT_S):
            with self._showing:
                for name, label in self._shown:
                    self._tell(name, label)

    def _gauge(self, name: str, about: str) -> Gauge:
        further = [_LABELS[name]] if name in _LABELS else []
        made = Gauge(f"ranksearch_{name}", about, ("study", *further))
        made.set_default_tags({"study": self._study.name})
        return made


def kind(reason: str) -> str:
    """What a trial failed of, in a word: a label has few values, so the rest of the reason is left to the study."""
    for name, signs in _KINDS.items():
        if any(sign in reason for sign in signs):
            return name
    found = _ERROR.match(reason)
    return found.group() if found else "other"
