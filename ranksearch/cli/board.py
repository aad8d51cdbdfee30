"""The live view of a search on a terminal: how far it is, the best at each budget, the front drawn in characters."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from ranksearch.trial import RECENT, best_within, ends_per_second

if TYPE_CHECKING:
    from ranksearch.study import Study
    from ranksearch.trial import Trial

_SHARES = (0.7, 0.5, 0.35)
"""Of the MACs, where the space names no targets."""
_WIDTH, _HEIGHT = 56, 9
"""Of the drawn front, in characters."""


class Board:
    """What is known of a running search; ``render`` shows it."""

    def __init__(self, study: Study) -> None:
        self._study = study
        self._done: set[int] = set()
        self._recent: deque[Trial] = deque(maxlen=RECENT)
        self._failures: Counter[str] = Counter()
        self._front = study.growing_front()
        self.take(*study.trials())
        self._recent.clear()  # what was tried before says nothing of the present rate

    def take(self, *trials: Trial) -> None:
        """Hear of trials; those that still run are left out."""
        for trial in trials:
            if trial.state == "RUNNING":
                continue
            if not trial.retry:
                self._done.add(trial.index)
            if trial.outcome is None:
                self._failures[trial.reason or "unknown"] += 1
            self._recent.append(trial)
            self._front.take(trial)

    @property
    def per_second(self) -> float:
        """Trials that end in a second, over the last ones; 0 where that cannot be said."""
        return ends_per_second(list(self._recent))

    def best(self) -> list[tuple[float, float, int] | tuple[float, None, None]]:
        """At each target: the share of the MACs, and the accuracy and the number of the best trial within it."""
        dense = self._study.setting.dense["macs"]
        found: list[tuple[float, float, int] | tuple[float, None, None]] = []
        for share in self._study.space.budget.targets or _SHARES:
            best = best_within(self._front, share * dense)
            if best is None or best.outcome is None:
                found.append((share, None, None))
            else:
                found.append((share, best.outcome.accuracy_search, best.number))
        return found

    def render(self) -> RenderableType:
        """A block of lines."""
        total, done = self._study.space.budget.trials, len(self._done)
        rate = self.per_second
        left = f", {duration((total - done) / rate)} left" if rate and done < total else ""
        speed = f"  {60 * rate:.1f} a minute{left}" if rate else ""
        head = Table.grid(padding=(0, 1))
        head.add_row(f"{self._study.name}: {done}/{total}", ProgressBar(total=total, completed=done, width=30), speed)
        best = "   ".join(
            f"{100 * share:g} %: " + ("-" if accuracy is None else f"{100 * accuracy:.2f} % (trial {number})")
            for share, accuracy, number in self.best()
        )
        parts: list[RenderableType] = [head, Text(f"best within a share of the MACs   {best}")]
        dense = self._study.setting.dense
        points = [(t.outcome.macs / dense["macs"], t.outcome.accuracy_search) for t in self._front if t.outcome]
        parts += [Text(line) for line in drawn(points, (1.0, dense["accuracy_search"]))]
        if self._failures:
            reason, count = self._failures.most_common(1)[0]
            parts.append(Text(f"{self._failures.total()} failed, {count} of them: {reason}"[:120], style="yellow"))
        return Group(*parts)


def drawn(points: Sequence[tuple[float, float]], dense: tuple[float, float]) -> list[str]:
    """A front in characters: ``o`` its points, ``D`` the dense network; accuracy in per cent over share of the MACs."""
    if not points:
        return []
    every = [*points, dense]
    (left, right), (low, high) = ((min(v), max(v)) for v in zip(*every, strict=True))
    wide, tall = (right - left) or 1.0, (high - low) or 1.0
    rows = [[" "] * _WIDTH for _ in range(_HEIGHT)]
    for mark, (x, y) in [*(("o", point) for point in points), ("D", dense)]:
        rows[round((high - y) / tall * (_HEIGHT - 1))][round((x - left) / wide * (_WIDTH - 1))] = mark
    labels = {0: high, _HEIGHT - 1: low}
    lines = [f"{100 * labels[i]:6.2f} |" if i in labels else "       |" for i in range(_HEIGHT)]
    lines = [f"{label}{''.join(row)}" for label, row in zip(lines, rows, strict=True)]
    first, last = f"{100 * left:.0f} %", f"{100 * right:.0f} % of the MACs"
    axis = f"        {first}{last:>{_WIDTH - len(first)}}"
    return [*lines, f"       +{'-' * _WIDTH}", axis]


def duration(seconds: float) -> str:
    """A time that a person can read at a glance."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
