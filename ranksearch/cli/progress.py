"""Progress on stderr: bars on a terminal, plain lines elsewhere."""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING, Self

from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

from ranksearch.cli.options import console

if TYPE_CHECKING:
    from ranksearch.study import Study
    from ranksearch.trial import Trial


class Reporter:
    """Shows the stage of a preparation, then the trials; ``notify`` and ``watch`` are what a search takes."""

    def __init__(self, *, quiet: bool = False) -> None:
        self.trials = 0
        """How many trials have ended."""
        self.study: str | None = None
        """Name of the study, once it is settled."""
        self._failed = 0
        self._best = (-1.0, 0.0)
        self._quiet = quiet
        self._console = console(stderr=True)
        self._stage = ""
        self._heading = ""
        self._task: TaskID | None = None
        self._bars: Progress | None = None
        if self._console.is_terminal and not quiet:
            self._bars = Progress(
                SpinnerColumn(),
                TextColumn("{task.description}"),
                BarColumn(bar_width=30),
                TextColumn("{task.fields[note]}"),
                TimeElapsedColumn(),
                console=self._console,
                transient=True,
            )

    def __enter__(self) -> Self:
        if self._bars is not None:
            self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bars is not None:
            self._bars.stop()

    def began(self, study: str, number: int, total: int) -> None:
        """Hear which search of how many comes next."""
        self.study, self._heading = study, f"{number}/{total} {study}: "
        self._failed, self._best, self._stage = 0, (-1.0, 0.0), ""
        if self._bars is None and not self._quiet:
            self._console.print(f"search {number} of {total}: {study}", soft_wrap=True)

    def named(self, study: str) -> None:
        """Hear the name of the study."""
        self.study = study

    def notify(self, what: str, done: int, total: int) -> None:
        """Say what is being done, and how much of it."""
        counted = total > 1
        self._show(what, done if counted else 0, total if counted else None, f"{done}/{total}" if counted else "")

    def watch(self, study: Study, trial: Trial) -> None:
        """Say what came of a trial."""
        self.trials += 1
        outcome, ratio = trial.outcome, 0.0
        if outcome is None:
            self._failed += 1
            line = f"failed: {trial.reason}"
        else:
            ratio = outcome.macs / study.setting.dense["macs"]
            line = f"accuracy {100 * outcome.accuracy_search:5.2f} %  at {100 * ratio:5.1f} % of the MACs"
            # One number for a front: the best network that is at least as cheap as half the dense one.
            if trial.feasible and ratio <= 0.5:
                self._best = max(self._best, (outcome.accuracy_search, -ratio))
        total = study.space.budget.trials
        if self._bars is None:
            if not self._quiet:
                self._console.print(f"trial {trial.number:4d} ({trial.index + 1}/{total})  {line}", soft_wrap=True)
            return
        best, failed = "", ""
        if self._best[0] >= 0:
            best = f"  best at half the MACs {100 * self._best[0]:.2f} % ({-100 * self._best[1]:.0f} %)"
        if self._failed:
            failed = f"  {self._failed} failed"
        self._show("trials", trial.index + 1, total, f"{trial.index + 1}/{total}{best}{failed}")

    def _show(self, what: str, done: int, total: int | None, note: str) -> None:
        fresh, self._stage = what != self._stage, what
        if self._bars is None:
            if fresh and not self._quiet:
                self._console.print(f"{what} ...", soft_wrap=True)
            return
        if fresh or self._task is None:
            if self._task is not None:
                self._bars.remove_task(self._task)
            self._task = self._bars.add_task(f"{self._heading}{what}", total=total, note=note)
        self._bars.update(self._task, completed=done, total=total, note=note)
