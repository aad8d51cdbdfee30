"""The driver of a search: the source of an engine's tasks, which alone asks the strategy and writes the study."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from ranksearch.front import NumberedFront
from ranksearch.strategies import Strategy
from ranksearch.strategies.history import Past
from ranksearch.study import Study
from ranksearch.trial import DONE, WAIT, Failure, Outcome, Proposal, Signal, Task, Trial, checkpoint_name

if TYPE_CHECKING:
    from ranksearch.tracking import View

Watch = Callable[[Study, Trial], None]
"""Called with every trial that ended."""

STOPPED = "interrupted: the search was stopped"


def task_of(study: Study, trial: Trial, incumbents: tuple[tuple[float, ...], ...]) -> Task:
    """What a worker is told of a trial.

    The seed follows the proposal, not the trial: a proposal that is tried again gives the same network.
    """
    seed = int(np.random.SeedSequence([study.space.seed, trial.index]).generate_state(1)[0])
    return Task(
        number=trial.number,
        choices=trial.proposal.choices,
        seed=seed,
        index=trial.index,
        settings=trial.proposal.settings,
        fidelity=trial.proposal.fidelity,
        incumbents=incumbents,
    )


def finished(study: Study) -> bool:
    """Whether the budget's proposals are all made, and none is to be tried once more."""
    latest = {trial.index: trial for trial in study.trials()}
    return len(latest) >= study.space.budget.trials and not any(trial.retry for trial in latest.values())


def history(latest: Mapping[int, Trial], objectives: Sequence[str]) -> Past:
    """What a strategy sees of every proposal's last try: the trials of a search that was never interrupted."""
    past = Past(tuple(objectives))
    for index in range(len(latest)):
        past.put(latest[index])
    return past


class Driver:
    """The source of an engine's tasks: asks the strategy, records every trial, tells MLflow.

    Deterministic, proposals come in synchronous batches: the outcomes of a batch are looked at when all of them are
    there, so neither the number of workers nor their order matters. Nor does an interruption: the strategy sees every
    proposal once, by its last try, and a batch is made complete before the next begins. A try counts from where it goes
    to a worker.
    """

    def __init__(
        self, study: Study, strategy: Strategy, *, view: View | None = None, watch: Watch | None = None
    ) -> None:
        self._study = study
        self._strategy = strategy
        self._view = view
        self._watch = watch
        self._space = study.space
        self._trials = {trial.number: trial for trial in study.trials()}
        self._latest = {trial.index: trial for trial in self._trials.values()}
        """Every proposal's last try."""
        self._past = history(self._latest, self._space.objectives)
        self._running = {t.index for t in self._latest.values() if t.state == "RUNNING"}
        self._again = {t.index for t in self._latest.values() if t.retry}
        """Proposals that are to be tried once more."""
        self._front = self._front_of(self._trials.values())
        self._queue: list[Task] = []
        self._deadline = time.monotonic() + 60 * (self._space.budget.minutes or 1e12)
        self._told = 0
        self._told_front = NumberedFront()
        self._volume = 0.0
        """The hypervolume told last."""
        self._told_ms = 0
        """When the last of the trials told had ended, by the study's record of them."""
        self._sweep()
        if view is not None:
            view.sync(trial for trial in self._trials.values() if trial.state != "RUNNING")
            self._tell_hypervolume()

    def take(self, limit: int) -> list[Task] | Signal:
        """Up to ``limit`` tasks; WAIT for the running ones; DONE when the budget is used up."""
        if self._space.deterministic:
            if not self._queue:
                if self._running:
                    return WAIT
                self._queue = self._propose(self._space.strategy.batch)
            tasks, self._queue = self._queue[:limit], self._queue[limit:]
        else:
            tasks = self._propose(limit)
        for task in tasks:
            self._study.start(self._trials[task.number])
        return tasks or (WAIT if self._running else DONE)

    def done(self, task: Task, result: Outcome | Failure) -> None:
        """Record what came of a task."""
        trial = self._study.finish(self._trials[task.number], result)
        self._ended(trial)
        if self._watch is not None:
            self._watch(self._study, trial)

    def stop(self) -> None:
        """End what still runs, to be tried once more by a resume."""
        self._study.recover(STOPPED, spared=True)
        for trial in self._study.trials():
            known = self._trials.get(trial.number)
            # Ctrl-C may have come when the study knew of a trial, and nobody else.
            if known is None or known.state == "RUNNING":
                self._ended(trial)
        self._front = self._front_of(self._trials.values())
        self._sweep()

    def _ended(self, trial: Trial) -> None:
        if self._view is not None:
            self._view.trial(trial)
        self._note(trial)
        if not trial.retry:
            (self._study.checkpoints_folder / checkpoint_name(trial.index)).unlink(missing_ok=True)
        for number in self._front.put(self._study.point(trial), trial.number) if trial.feasible else [trial.number]:
            outcome = self._trials[number].outcome
            if outcome is not None and outcome.weights:
                (self._study.weights_folder / outcome.weights).unlink(missing_ok=True)
        self._tell_hypervolume()

    def _note(self, trial: Trial) -> None:
        """Bring what is known of the trials up to date with one."""
        self._trials[trial.number] = self._latest[trial.index] = trial
        self._past.put(trial)
        (self._running.add if trial.state == "RUNNING" else self._running.discard)(trial.index)
        (self._again.add if trial.retry else self._again.discard)(trial.index)

    def _propose(self, count: int) -> list[Task]:
        """Begin up to ``count`` trials: first what is to be tried once more, then new proposals."""
        if time.monotonic() > self._deadline:
            return []
        again = [self._latest[index] for index in sorted(self._again)[:count]]
        whole = bool(again) and self._space.deterministic and self._has_ended_partly()
        tasks = [self._begin(trial.proposal, trial.index, trial.attempt + 1) for trial in again]
        while len(tasks) < count:
            index = len(self._latest)
            complete = bool(tasks) and self._space.deterministic and index % self._space.strategy.batch == 0
            if index >= self._space.budget.trials or complete or whole:
                break
            proposal = self._strategy.propose(self._study.setting.table, self._past)
            if isinstance(proposal, Signal):
                break
            tasks.append(self._begin(proposal, index, 0))
        return tasks

    def _has_ended_partly(self) -> bool:
        """Whether some of the last batch is not to be tried again: then the batch was whole, a short one maybe.

        No task is given out before all of a batch are proposed.
        """
        last, batch = len(self._latest) - 1, self._space.strategy.batch
        return any(index not in self._again for index in range(last // batch * batch, last + 1))

    def _begin(self, proposal: Proposal, index: int, attempt: int) -> Task:
        trial = self._study.begin(proposal, index=index, attempt=attempt)
        self._note(trial)
        return task_of(self._study, trial, tuple(self._before(index).points))

    def _before(self, index: int) -> NumberedFront:
        """The front that a proposal is held against; when deterministic, without what ended of its own batch."""
        first = index - index % self._space.strategy.batch
        mates = (self._latest[i] for i in range(first, len(self._latest)))
        if not self._space.deterministic or not any(trial.feasible for trial in mates):
            return self._front
        return self._front_of(trial for trial in self._trials.values() if trial.index < first)

    def _front_of(self, trials: Iterable[Trial]) -> NumberedFront:
        """The front of the feasible trials, by their numbers."""
        front = NumberedFront()
        for trial in trials:
            if trial.feasible:
                front.put(self._study.point(trial), trial.number)
        return front

    def _sweep(self) -> None:
        """Remove the weights that no trial on the front has, and the checkpoints of proposals that have ended."""
        outcomes = (self._trials[number].outcome for number in self._front.numbers)
        kept = {outcome.weights for outcome in outcomes if outcome is not None}
        unended = (t.index for t in self._latest.values() if t.retry or t.state == "RUNNING")
        checkpoints = {checkpoint_name(index) for index in unended}
        for folder, names in ((self._study.weights_folder, kept), (self._study.checkpoints_folder, checkpoints)):
            for path in folder.glob("*"):
                if path.name not in names:  # a folder is one that a killed worker was writing a checkpoint in
                    shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)

    def _tell_hypervolume(self) -> None:
        """The hypervolume after each trial, in the order of numbers, as far as trials have ended."""
        while self._view is not None:
            trial = self._trials.get(self._told)
            if trial is None or trial.state == "RUNNING":
                return
            if trial.feasible and self._told_front.put(self._study.point(trial), trial.number) != [trial.number]:
                self._volume = self._study.hypervolume([self._trials[number] for number in self._told_front.numbers])
            self._told_ms = max(self._told_ms, trial.end_ms)
            self._view.hypervolume(self._told, self._volume, self._told_ms)
            self._told += 1
