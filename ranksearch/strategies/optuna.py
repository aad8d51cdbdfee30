"""Optuna's samplers as a strategy.

At every proposal the trials so far are shown to a newly built sampler as a study in memory, and the sampler is asked
for one trial. What a sampler remembers between trials it writes as system attributes on the trial or on the study
(the generation and the parents of NSGA-II, the position in a quasi-random sequence); these are kept in the proposal's
note and shown again with the trial, so the next proposal depends on nothing but the trials.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, IntDistribution
from optuna.exceptions import ExperimentalWarning
from optuna.samplers import BaseSampler, QMCSampler
from optuna.storages import InMemoryStorage
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from ranksearch.front import non_dominated
from ranksearch.strategies.history import proposals_made, tried
from ranksearch.strategies.random import ATTEMPTS, step_to_new
from ranksearch.table import PriceTable
from ranksearch.trial import DONE, MAXIMISED, Proposal, Signal, Trial, minimised

NAME = "optuna"
HISTORY: Final = 500
"""Trials shown to a sampler at most; the time of TPE grows from 20 ms after 100 trials to 1.3 s after 10,000."""

Distributions = dict[str, BaseDistribution]


@dataclass(frozen=True, kw_only=True)
class Optuna:
    """Rank maps that one of Optuna's samplers suggests; DONE when every one was tried."""

    sampler: type[BaseSampler]
    options: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of the sampler, but for its seed."""
    seed: int
    objectives: tuple[str, ...]
    """Names of the trials' values: accuracy is maximised, the others are minimised."""

    def propose(self, table: PriceTable, trials: Sequence[Trial]) -> Proposal | Signal:
        """The next rank map, or DONE."""
        known, index = tried(trials), proposals_made(trials)
        if len(known) >= table.size:
            return DONE
        with _quiet():
            past, memory = self._past(table, trials), _memory(trials)
            written: dict[str, Any] = {}
            for attempt in range(ATTEMPTS):
                choices, on_trial, on_study = self._ask(table, past, memory | written, [self.seed, index, attempt])
                written |= on_study
                if choices not in known:
                    break
            else:
                choices = step_to_new(table, choices, known, np.random.default_rng([self.seed, index, ATTEMPTS]))
        note = {"trial": on_trial, "study": written}
        return Proposal(choices=choices, origin=NAME, note={key: value for key, value in note.items() if value})

    def _ask(
        self, table: PriceTable, past: Sequence[FrozenTrial], memory: Mapping[str, Any], entropy: list[int]
    ) -> tuple[tuple[int, ...], dict[str, Any], dict[str, Any]]:
        """The suggested choices, and what the sampler wrote on the trial and on the study."""
        storage = _Mirror(past)
        # A quasi-random sequence goes on under one seed; every other sampler draws afresh.
        seeds = np.random.SeedSequence(self.seed if issubclass(self.sampler, QMCSampler) else entropy)
        sampler = self.sampler(**(self.options | {"seed": int(seeds.generate_state(1)[0])}))
        directions = [
            StudyDirection.MAXIMIZE if name in MAXIMISED else StudyDirection.MINIMIZE for name in self.objectives
        ]
        study = optuna.create_study(storage=storage, study_name=NAME, sampler=sampler, directions=directions)
        study_id = storage.get_study_id_from_name(NAME)
        for key, value in memory.items():
            storage.set_study_system_attr(study_id, key, value)
        asked = study.ask()
        # NSGA-II gives a trial its generation here; suggesting would skip it where no layer has a choice.
        _ = asked.relative_params
        choices = tuple(
            asked.suggest_int(layer.name, 0, len(layer.candidates) - 1) if len(layer.candidates) > 1 else 0
            for layer in table.layers
        )
        written = {k: v for k, v in storage.get_study_system_attrs(study_id).items() if memory.get(k) != v}
        trial_id = storage.get_trial_id_from_study_id_trial_number(study_id, asked.number)
        return choices, dict(storage.get_trial(trial_id).system_attrs), written

    def _past(self, table: PriceTable, trials: Sequence[Trial]) -> list[FrozenTrial]:
        """The trials as Optuna's."""
        distributions: Distributions = {
            layer.name: IntDistribution(0, len(layer.candidates) - 1)
            for layer in table.layers
            if len(layer.candidates) > 1
        }
        names = [layer.name for layer in table.layers]
        # A trial of another origin is shown as the sampler's first one, so that it founds the population with it.
        _, first, _ = self._ask(table, (), {}, [self.seed])
        return [
            _frozen(trial, names, distributions, trial.proposal.note.get("trial", {}) if _own(trial) else first)
            for trial in self._shown(trials)
        ]

    def _shown(self, trials: Sequence[Trial]) -> list[Trial]:
        """At most ``HISTORY`` of the trials: the non-dominated ones and the newest, in order."""
        if len(trials) <= HISTORY:
            return list(trials)
        scored = [(trial.number, minimised(trial.values, self.objectives)) for trial in trials if trial.values]
        kept = {scored[i][0] for i in non_dominated([point for _, point in scored])[:HISTORY]}
        newest = [trial.number for trial in reversed(trials) if trial.number not in kept]
        kept.update(newest[: HISTORY - len(kept)])
        return [trial for trial in trials if trial.number in kept]


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


def _own(trial: Trial) -> bool:
    return trial.proposal.origin == NAME


def _memory(trials: Sequence[Trial]) -> dict[str, Any]:
    """What the sampler wrote on the study, proposal after proposal."""
    memory: dict[str, Any] = {}
    for trial in trials:
        if _own(trial):
            memory.update(trial.proposal.note.get("study", {}))
    return memory


def _frozen(
    trial: Trial, names: Sequence[str], distributions: Distributions, attributes: Mapping[str, Any]
) -> FrozenTrial:
    params = {name: i for name, i in zip(names, trial.proposal.choices, strict=True) if name in distributions}
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
        distributions=distributions,
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
