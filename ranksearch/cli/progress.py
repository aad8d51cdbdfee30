"""Progress on stderr: bars and a live view on a terminal, plain lines elsewhere; JSON on stdout where asked for."""

from __future__ import annotations

import json
from types import TracebackType
from typing import TYPE_CHECKING, Self

import typer
from rich.live import Live
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

from ranksearch.cli.board import Board
from ranksearch.cli.options import console

if TYPE_CHECKING:
    from ranksearch.study import Study
    from ranksearch.trial import Trial


class Reporter:
    """Shows the stage of a preparation, then the trials; ``notify`` and ``watch`` are what a search takes."""

    def __init__(self, *, quiet: bool = False, as_json: bool = False) -> None:
        self.trials = 0
        """How many trials have ended."""
        self.study: str | None = None
        """Name of the study, once it is settled."""
        self._console = console(stderr=True)
        self._stage = ""
        self._heading = ""
        self._task: TaskID | None = None
        self._bars: Progress | None = None
        self._live: Live | None = None
        """The view of the search, once it has trials."""
        self._board: Board | None = None
        self._as_json = as_json
        """Whether each trial is a line of JSON on stdout, and nothing else is said."""
        self._quiet = quiet = quiet or as_json
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
        if self._live is not None:
            self._live.stop()
        if self._bars is not None:
            self._bars.stop()

    def began(self, study: str, number: int, total: int) -> None:
        """Hear which search of how many comes next."""
        self.study, self._heading = study, f"{number}/{total} {study}: "
        self._stage, self._board = "", None
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
        outcome = trial.outcome
        if outcome is None:
            line = f"failed: {trial.reason}"
        else:
            ratio = outcome.macs / study.setting.dense["macs"]
            line = f"accuracy {100 * outcome.accuracy_search:5.2f} %  at {100 * ratio:5.1f} % of the MACs"
        if self._as_json:
            typer.echo(json.dumps(_record(study, trial), allow_nan=False))
        elif self._bars is not None:
            self._show_board(study, trial)
        elif not self._quiet:
            total = study.space.budget.trials
            self._console.print(f"trial {trial.number:4d} ({trial.index + 1}/{total})  {line}", soft_wrap=True)

    def _show_board(self, study: Study, trial: Trial) -> None:
        """The view in place of the bars."""
        if self._board is None:
            self._board = Board(study)
        else:
            self._board.take(trial)
        if self._live is None and self._bars is not None:
            self._bars.stop()
            self._live = Live(console=self._console, transient=True, auto_refresh=False)
            self._live.start()
        if self._live is not None:
            self._live.update(self._board.render(), refresh=True)

    def _show(self, what: str, done: int, total: int | None, note: str) -> None:
        fresh, self._stage = what != self._stage, what
        if self._bars is None:
            if fresh and not self._quiet:
                self._console.print(f"{what} ...", soft_wrap=True)
            return
        if self._live is not None:  # the next search is being prepared
            self._live.stop()
            self._live = None
            self._bars.start()
        if fresh or self._task is None:
            if self._task is not None:
                self._bars.remove_task(self._task)
            self._task = self._bars.add_task(f"{self._heading}{what}", total=total, note=note)
        self._bars.update(self._task, completed=done, total=total, note=note)


def _record(study: Study, trial: Trial) -> dict[str, object]:
    """A trial that ended, as JSON types."""
    told: dict[str, object] = {"event": "trial", "study": study.name, "trial": trial.number, "state": trial.state}
    told |= {"of": study.space.budget.trials, "origin": trial.proposal.origin, "reason": trial.reason}
    told["fidelity"] = trial.proposal.fidelity
    if trial.outcome is not None:
        outcome = trial.outcome
        told |= {"accuracy": outcome.accuracy, "accuracy_search": outcome.accuracy_search, "loss": outcome.loss}
        told |= {"macs": outcome.macs, "params": outcome.params, "seconds": outcome.seconds}
        told["macs_ratio"] = outcome.macs / study.setting.dense["macs"]
    return told
