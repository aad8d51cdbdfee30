"""Asking one of Optuna's samplers for a point of a space of distributions, from nothing but the trials.

At every proposal the trials so far are shown to a newly built sampler as a study in memory, and the sampler is asked
for one trial. What a sampler remembers between trials it writes as system attributes on the trial or on the study
(the generation and the parents of NSGA-II, the position in a quasi-random sequence); these are kept in the proposal's
note and shown again with the trial, so the next proposal depends on nothing but the trials.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import optuna
from optuna.distributions import BaseDistribution
from optuna.exceptions import ExperimentalWarning
from optuna.samplers import BaseSampler, QMCSampler
from optuna.storages import InMemoryStorage
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from ranksearch.strategies.history import memory, newest_and_best
from ranksearch.trial import MAXIMISED, Trial

HISTORY: Final = 300
"""Trials shown to a sampler at most: TPE would take 20 ms after 100 trials, and 1.3 s after 10,000."""

Distributions = Mapping[str, BaseDistribution]
Params = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Asker:
    """One of Optuna's samplers, to be asked for points."""

    origin: str
    """Name of the strategy that asks: what the sampler remembers is in the notes of its proposals."""
    sampler: type[BaseSampler]
    options: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of the sampler, but for its seed."""
    seed: int
    objectives: tuple[str, ...]
    """Names of the trials' values: accuracy is maximised, the others are minimised."""

    def suggest(
        self,
        space: Distributions,
        trials: Sequence[Trial],
        params_of: Callable[[Trial], Params],
        index: int,
        fresh: Callable[[Params], bool],
        asks: int,
    ) -> tuple[Params, dict[str, Any]]:
        """A point that is ``fresh`` where the sampler soon has one, and the note to keep with its proposal.

        Args:
            space: name to distribution.
            trials: those to learn from.
            params_of: the point of each of them.
            index: number of the proposal to be made; every one draws afresh.
            fresh: whether a point may be proposed.
            asks: how often the sampler is asked for one that is, at most.
        """
        with _quiet():
            past, known = self._past(space, trials, params_of), memory(trials, self.origin)
            written: dict[str, Any] = {}
            for attempt in range(asks):
                params, on_trial, on_study = self._ask(space, past, known | written, [self.seed, index, attempt])
                written |= on_study
                if fresh(params):
                    break
        note = {"trial": on_trial, "study": written}
        return params, {key: value for key, value in note.items() if value}

    def _ask(
        self, space: Distributions, past: Sequence[FrozenTrial], memory: Mapping[str, Any], entropy: list[int]
    ) -> tuple[Params, dict[str, Any], dict[str, Any]]:
        """The suggested point, and what the sampler wrote on the trial and on the study."""
        storage = _Mirror(past)
        # A quasi-random sequence goes on under one seed; every other sampler draws afresh.
        seeds = np.random.SeedSequence(self.seed if issubclass(self.sampler, QMCSampler) else entropy)
        sampler = self.sampler(**(self.options | {"seed": int(seeds.generate_state(1)[0])}))
        directions = [
            StudyDirection.MAXIMIZE if name in MAXIMISED else StudyDirection.MINIMIZE for name in self.objectives
        ]
        study = optuna.create_study(storage=storage, study_name=self.origin, sampler=sampler, directions=directions)
        study_id = storage.get_study_id_from_name(self.origin)
        for key, value in memory.items():
            storage.set_study_system_attr(study_id, key, value)
        asked = study.ask(dict(space))
        # NSGA-II gives a trial its generation here; suggesting would skip it where nothing has a choice.
        _ = asked.relative_params
        written = {k: v for k, v in storage.get_study_system_attrs(study_id).items() if memory.get(k) != v}
        trial_id = storage.get_trial_id_from_study_id_trial_number(study_id, asked.number)
        return asked.params, dict(storage.get_trial(trial_id).system_attrs), written

    def _past(
        self, space: Distributions, trials: Sequence[Trial], params_of: Callable[[Trial], Params]
    ) -> list[FrozenTrial]:
        """The trials as Optuna's."""
        # A trial that the sampler did not make is shown as its first one, so that it founds the population with it.
        _, first, _ = self._ask(space, (), {}, [self.seed])
        return [
            _frozen(
                trial, params_of(trial), space, trial.proposal.note.get("trial", {}) if self._made(trial) else first
            )
            for trial in newest_and_best(trials, self.objectives, HISTORY)
        ]

    def _made(self, trial: Trial) -> bool:
        return trial.proposal.origin == self.origin and not trial.proposal.note.get("given")


class _Mirror(InMemoryStorage):
    """A study in memory whose past is given, and is not copied for every proposal."""

    def __init__(self, past: Sequence[FrozenTrial]) -> None:
        super().__init__()
        self.past = past

    def get_all_trials(
        self, study_id: int, deepcopy: bool = True, states: Container[TrialState] | None = None
    ) -> list[FrozenTrial]:
        past = [trial for trial in self.past if states is None or trial.state in states]
        return (copy.deepcopy(past) if deepcopy else past) + super().get_all_trials(study_id, deepcopy, states)


def _frozen(trial: Trial, params: Params, space: Distributions, attributes: Mapping[str, Any]) -> FrozenTrial:
    frozen = FrozenTrial(
        # The trial that is asked for is number 0 of its storage.
        number=trial.number + 1,
        trial_id=trial.number + 1,
        state=TrialState[trial.state],
        value=None,
        values=trial.values if trial.state == "COMPLETE" else None,
        datetime_start=None,
        datetime_complete=None,
        params=params,
        distributions=dict(space),
        user_attrs={},
        system_attrs=dict(attributes),
        intermediate_values={},
    )
    if trial.state == "COMPLETE":
        for i, constraint in enumerate(trial.constraints):
            frozen.set_constraint(str(i), constraint)
    return frozen


@contextmanager
def _quiet() -> Iterator[None]:
    """Without Optuna's messages on every study it creates and on its experimental samplers."""
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            yield
    finally:
        optuna.logging.set_verbosity(verbosity)
