"""Figures of a search for Prometheus, by Ray's own metrics: each machine's agent serves them beside those of Ray.

Prometheus sees each name with ``ray_`` before it, and a counter's with ``_total`` after it. The figures are those of
the study: a resumed search goes on where it was, so a counter never falls but where Ray is started anew.
"""

from __future__ import annotations

import re
from collections import Counter as Tally
from collections.abc import Iterable, Mapping
from threading import Event, Lock, Thread
from typing import Self

from ray.util.metrics import Counter, Gauge

from ranksearch.study import Study
from ranksearch.trial import Trial

_ERROR = re.compile(r"[A-Za-z_]\w*(?:Error|Exception|Interrupt|Exit)(?=:|$)")
_KINDS = {
    "interrupted": ("interrupted:", "its worker died"),
    "memory": ("MemoryError", "out of memory", "can't allocate memory"),
    "time": ("it took longer than",),
}
"""Kind of failure to what its reason contains; the first that fits."""
_REPEAT_S = 2.0


class Meter:
    """Counts and measures a search, in a ``with`` block in which Ray runs."""

    def __init__(self, study: Study) -> None:
        self._study = study
        self._front = study.growing_front()
        self._done: set[int] = set()
        """Proposals whose last try has ended for good."""
        self._counters: dict[str, Counter] = {}
        self._gauges: dict[str, Gauge] = {}
        self._shown: dict[tuple[str, str], float] = {}
        """Gauge and state to the last value."""
        self._showing = Lock()
        self._stopping = Event()
        self._repeater = Thread(target=self._repeat, name="meter", daemon=True)

    def __enter__(self) -> Self:
        # Made here, as an object of Ray's last connection would count for that one still.
        self._counters = {
            "proposed": self._counter("ranksearch_trials_proposed", "Trials begun, those tried once more too"),
            "complete": self._counter("ranksearch_trials_complete", "Trials that were scored"),
            "failed": self._counter("ranksearch_trials_failed", "Trials that failed, by the kind of reason", "kind"),
            "seconds": self._counter("ranksearch_trial_seconds", "Seconds that complete trials took together"),
        }
        self._gauges = {
            "left": self._gauge("ranksearch_trials_left", "Proposals of the budget that have not ended"),
            "queued": self._gauge("ranksearch_trials_queued", "Trials begun that wait for a worker"),
            "workers": self._gauge("ranksearch_workers", "Workers, by what they do", "state"),
            "hypervolume": self._gauge(
                "ranksearch_hypervolume", "Share of the objectives' box that the front dominates"
            ),
            "front": self._gauge("ranksearch_front_points", "Trials on the front"),
        }
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
        if count:  # Ray's counters refuse a zero
            self._counters["proposed"].inc(count)

    def ended(self, trial: Trial) -> None:
        """Count a trial that ended."""
        self._take([trial])

    def busy(self, *, queued: int, workers: Mapping[str, int]) -> None:
        """Show how many trials wait, and how many workers are ``busy``, ``idle`` and ``starting``."""
        self._show("queued", queued)
        for state, count in workers.items():
            self._show("workers", count, state)

    def _take(self, trials: Iterable[Trial]) -> None:
        complete, seconds, moved = 0, 0.0, not self._shown
        failed: Tally[str] = Tally()
        for trial in trials:
            if not trial.retry:
                self._done.add(trial.index)
            if trial.outcome is None:
                failed[kind(trial.reason or "")] += 1
            else:
                complete, seconds = complete + 1, seconds + trial.outcome.seconds
            moved |= self._front.take(trial)
        if complete:
            self._counters["complete"].inc(complete)
        if seconds > 0:
            self._counters["seconds"].inc(seconds)
        for name, count in failed.items():
            self._counters["failed"].inc(count, {"kind": name})
        self._show("left", self._study.space.budget.trials - len(self._done))
        if moved:
            self._show("hypervolume", self._study.hypervolume(list(self._front)))
            self._show("front", len(self._front))

    def _show(self, name: str, value: float, state: str = "") -> None:
        with self._showing:
            self._shown[name, state] = value
            self._tell(name, state)

    def _tell(self, name: str, state: str) -> None:
        self._gauges[name].set(self._shown[name, state], {"state": state} if state else {})

    def _repeat(self) -> None:
        """Ray forgets a gauge's value once it was asked for it, and trials may take an hour."""
        while not self._stopping.wait(_REPEAT_S):
            with self._showing:
                for name, state in self._shown:
                    self._tell(name, state)

    def _counter(self, name: str, about: str, *keys: str) -> Counter:
        made = Counter(name, about, ("study", *keys))
        made.set_default_tags({"study": self._study.name})
        return made

    def _gauge(self, name: str, about: str, *keys: str) -> Gauge:
        made = Gauge(name, about, ("study", *keys))
        made.set_default_tags({"study": self._study.name})
        return made


def kind(reason: str) -> str:
    """What a trial failed of, in a word: a label has few values, so the rest of the reason is left to the study."""
    for name, signs in _KINDS.items():
        if any(sign in reason for sign in signs):
            return name
    found = _ERROR.match(reason)
    return found.group() if found else "other"
