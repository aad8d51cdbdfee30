"""What the dashboard knows of one study: read again and again by a thread, only what is new each time.

The page never waits for the storage: it shows the last :class:`Snapshot`, and asks its study only for what follows
from the trials in it.
"""

from __future__ import annotations

import os
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Literal, cast

from ranksearch.errors import reason_of
from ranksearch.pictures import Progress
from ranksearch.study import Study
from ranksearch.trial import Outcome, Trial, ends_per_second

_SILENT_MS = 60_000
"""A driver elsewhere begins or ends a trial so often at least, but while one is being scored."""


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """A study as it was when it was last read."""

    version: int
    """Rises when something has changed."""
    study: Study
    trials: Mapping[int, Trial]
    """Those that ended, by number."""
    running: tuple[Trial, ...]
    front: tuple[Trial, ...]
    """By rising MACs."""
    course: tuple[Progress, ...]
    failures: tuple[tuple[str, int, int], ...]
    """Reason, how many trials, the last one's number; the most frequent first."""
    state: Literal["running", "finished", "stopped", "unknown"]
    done: int
    """Proposals whose last try has ended for good."""
    failed: int
    per_minute: float
    """Trials that ended per minute, over the last ones of the latest driver; 0 where that cannot be said."""

    @property
    def total(self) -> int:
        """Proposals that the budget allows."""
        return self.study.space.budget.trials

    @property
    def minutes_left(self) -> float | None:
        """At the present rate; None where that cannot be said."""
        if self.state != "running" or not self.per_minute:
            return None
        return max(0, self.total - self.done) / self.per_minute


class Feed:
    """Reads one study; ``snapshot`` is what it has seen.

    Args:
        study: opened for reading.
        pause_s: least time from one reading to the next; slow storages are left alone for ten times as long as a
            reading takes.
    """

    def __init__(self, study: Study, *, pause_s: float = 0.5) -> None:
        self._study = study
        self._pause_s = pause_s
        self._ended: dict[int, Trial] = {}
        self._latest: dict[int, tuple[int, bool]] = {}
        """Proposal to its last try that ended, and whether it is to be tried once more."""
        self._growing = study.growing_front()
        self._front: tuple[Trial, ...] = ()
        """Its members by rising MACs."""
        self._course: list[Progress] = []
        self._failures: Counter[str] = Counter()
        self._last_failed: dict[str, int] = {}
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None
        self._seen: object = None
        self.problem = ""
        """Why the study could not be read the last time; empty where it could."""
        self.snapshot = self._read(0)

    def start(self) -> None:
        """Read on, in the background."""
        self._thread = threading.Thread(target=self._run, name=f"reader of {self._study.name}", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the background thread."""
        self._stopping.set()
        if self._thread is not None:
            self._thread.join()

    def refresh(self) -> bool:
        """Read what is new; whether there was any."""
        before = self.snapshot
        self.snapshot = self._read(before.version)
        return self.snapshot is not before

    def _run(self) -> None:
        pause_s = self._pause_s
        while not self._stopping.wait(pause_s):
            began = time.monotonic()
            try:
                self.refresh()
                self.problem = ""
            except Exception as error:  # whatever a database's driver raises: the page says it, and reads on
                self.problem = f"The study cannot be read at the moment: {reason_of(error)}"
            pause_s = max(self._pause_s, 10 * (time.monotonic() - began))

    def _read(self, version: int) -> Snapshot:
        self._study.reread()
        trials = self._study.trials(self._ended)
        fresh = [t for t in trials if t.state != "RUNNING" and t.number not in self._ended]
        for trial in sorted(fresh, key=lambda t: (t.end_ms, t.number)):
            self._take(trial)
        running = tuple(trial for trial in trials if trial.state == "RUNNING")
        total, done = self._study.space.budget.trials, sum(not retry for _, retry in self._latest.values())
        state = "finished" if done >= total and not running else _state(self._study.folder, trials)
        seen = (len(self._ended), tuple(trial.number for trial in running), total, state)
        if seen == self._seen:
            return self.snapshot
        self._seen = seen
        return Snapshot(
            version=version + 1,
            study=self._study,
            trials=MappingProxyType(dict(self._ended)),
            running=running,
            front=self._front,
            course=tuple(self._course),
            failures=tuple(
                (reason, count, self._last_failed[reason]) for reason, count in self._failures.most_common()
            ),
            state=state,
            done=done,
            failed=sum(self._failures.values()),
            per_minute=60 * ends_per_second(list(self._ended.values()), since_ms=_driver_began_ms(self._study.folder)),
        )

    def _take(self, trial: Trial) -> None:
        self._ended[trial.number] = trial
        if trial.number >= self._latest.get(trial.index, (-1, False))[0]:
            self._latest[trial.index] = (trial.number, trial.retry)
        if trial.state == "FAIL":
            self._failures[trial.reason or "unknown"] += 1
            self._last_failed[trial.reason or "unknown"] = trial.number
        value = self._course[-1].hypervolume if self._course else 0.0
        if self._growing.take(trial):
            self._front = tuple(self._study.front_trials(list(self._growing)))
            value = self._study.hypervolume(list(self._front))
        self._course.append(Progress(trials=len(self._course) + 1, end_ms=trial.end_ms, hypervolume=value))


def _state(folder: Path, trials: Sequence[Trial]) -> Literal["running", "stopped", "unknown"]:
    """Whether a search whose budget is not used up has a driver."""
    here = _driven(folder)
    if here is None or (not here and not (folder / "journal.log").exists()):  # a database has drivers anywhere
        return _judged(trials, time.time() * 1000)
    return "running" if here else "stopped"


def _driven(folder: Path) -> bool | None:
    """Whether a driver of this machine holds the study's lock; None where another machine took it last.

    The system is asked, as to try the lock might turn a new driver away.
    """
    lock = folder / "driver.lock"
    try:
        process, _, rest = lock.read_text(encoding="utf-8").partition(" on ")
        if rest.partition(" since ")[0].strip() != os.uname().nodename:
            return None
        with suppress(OSError):
            held = Path("/proc/locks").read_text(encoding="utf-8").splitlines()
            return any("FLOCK" in line and f":{lock.stat().st_ino} " in line for line in held)
        try:
            os.kill(int(process), 0)
        except PermissionError:  # of another user, and alive
            return True
    except (OSError, ValueError):
        return False
    return True


def _judged(trials: Sequence[Trial], now_ms: float) -> Literal["running", "stopped", "unknown"]:
    """What the trials say of a driver that cannot be asked for: one that was killed leaves its trials RUNNING."""
    silent_ms = abs(now_ms - max((max(t.start_ms, t.end_ms) for t in trials), default=0))
    if all(trial.state != "RUNNING" for trial in trials):
        return "running" if silent_ms < _SILENT_MS else "stopped"
    longest_ms = max((t.end_ms - t.start_ms for t in trials if t.state == "COMPLETE"), default=0)
    return "running" if silent_ms < max(_SILENT_MS, 3 * longest_ms) else "unknown"


def _driver_began_ms(folder: Path) -> int:
    """When the latest driver took the lock; 0 where that was elsewhere."""
    try:
        return int(1000 * (folder / "driver.lock").stat().st_mtime)
    except OSError:
        return 0


def outcome_of(trial: Trial) -> Outcome:
    """The outcome of a trial that is complete."""
    return cast(Outcome, trial.outcome)
