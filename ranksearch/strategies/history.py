"""What a strategy reads off the trials so far."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence, Set
from dataclasses import replace
from itertools import islice
from typing import Any, overload

from ranksearch.front import NumberedFront, non_dominated
from ranksearch.trial import Proposal, Trial, minimised

Run = tuple[tuple[int, ...], tuple[tuple[str, float | int | str | None], ...]]
"""A funnel run: its choices and its settings, sorted by name."""


class Past(Sequence[Trial]):
    """Every proposal's last try, in order of the proposals, as if none had been interrupted.

    What strategies read off the trials is kept up to date with every one that is put in, so that a proposal costs as
    much after ten thousand trials as after a thousand. The functions below read the same off any sequence of trials.

    Args:
        objectives: names of the trials' values.
    """

    def __init__(self, objectives: tuple[str, ...]) -> None:
        self._objectives = objectives
        self._trials: list[Trial] = []
        self._front = NumberedFront()
        self.tried: set[tuple[int, ...]] = set()
        """See :func:`tried`."""
        self.runs: set[Run] = set()
        """See :func:`runs`."""
        self.made: Counter[str] = Counter()
        """How many proposals each origin made."""
        self.memories: dict[str, dict[str, Any]] = {}
        """See :func:`memory`."""

    def put(self, trial: Trial) -> None:
        """Add a proposal's first try, or put its present state, or a later try, in the place of what was there."""
        if trial.number != trial.index:
            trial = replace(trial, number=trial.index, attempt=0)
        if trial.index < len(self._trials):
            self._trials[trial.index] = trial
        else:
            self._trials.append(trial)
            self.made[trial.proposal.origin] += 1
            _remember(self.memories.setdefault(trial.proposal.origin, {}), trial)
            if trial.proposal.funnel:
                self.runs.add(run(trial.proposal))
            else:
                self.tried.add(trial.proposal.choices)
        if trial.values:
            self._front.put(minimised(trial.values, self._objectives), trial.number)

    @property
    def front(self) -> list[int]:
        """Numbers of the complete trials that no other dominates, feasible or not, in order of their points."""
        return list(self._front.numbers)

    @overload
    def __getitem__(self, index: int) -> Trial: ...
    @overload
    def __getitem__(self, index: slice) -> list[Trial]: ...
    def __getitem__(self, index: int | slice) -> Trial | list[Trial]:
        return self._trials[index]

    def __len__(self) -> int:
        return len(self._trials)


def tried(trials: Sequence[Trial]) -> Set[tuple[int, ...]]:
    """The rank maps of every trial, whatever became of it: none of them is proposed again.

    A funnel run's choices are no rank map that was tried: see :func:`runs`. The set is not to be changed: of a
    :class:`Past` it is that one's own, as a copy would cost more with every trial.
    """
    if isinstance(trials, Past):
        return trials.tried
    return {trial.proposal.choices for trial in trials if not trial.proposal.funnel}


def maps(trials: Sequence[Trial]) -> Sequence[Trial]:
    """The trials that are no funnel runs: the choices of one are what it starts from, its outcome is not theirs."""
    if isinstance(trials, Past) and not trials.runs:
        return trials
    return [trial for trial in trials if not trial.proposal.funnel]


def runs(trials: Sequence[Trial]) -> set[Run]:
    """The funnel runs among the trials, whatever became of them: none of them is proposed again."""
    if isinstance(trials, Past):
        return set(trials.runs)
    return {run(trial.proposal) for trial in trials if trial.proposal.funnel}


def run(proposal: Proposal) -> Run:
    """What makes a funnel run the same as another."""
    return proposal.choices, tuple(sorted(proposal.settings.items()))


def proposals_made(trials: Sequence[Trial], origin: str | None = None) -> int:
    """How many proposals the trials come from, those of ``origin`` only if given; a retry is not a new proposal."""
    if isinstance(trials, Past):
        return len(trials) if origin is None else trials.made[origin]
    return len({trial.index for trial in trials if origin is None or trial.proposal.origin == origin})


def memory(trials: Sequence[Trial], origin: str) -> dict[str, Any]:
    """What the sampler of a strategy wrote on its study, proposal after proposal."""
    if isinstance(trials, Past):
        return dict(trials.memories.get(origin, {}))
    found: dict[str, Any] = {}
    for trial in trials:
        if trial.proposal.origin == origin:
            _remember(found, trial)
    return found


def _remember(memory: dict[str, Any], trial: Trial) -> None:
    if not trial.proposal.note.get("given"):
        memory.update(trial.proposal.note.get("study", {}))


def newest_and_best(trials: Sequence[Trial], objectives: tuple[str, ...], limit: int) -> list[Trial]:
    """At most ``limit`` of the trials: the non-dominated ones and the newest, in order."""
    if len(trials) <= limit:
        return list(trials)
    if isinstance(trials, Past):
        kept = set(trials.front[:limit])
        newest: Iterable[int] = range(len(trials) - 1, -1, -1)
    else:
        scored = [(trial.number, minimised(trial.values, objectives)) for trial in trials if trial.values]
        kept = {scored[i][0] for i in non_dominated([point for _, point in scored])[:limit]}
        newest = [trial.number for trial in reversed(trials)]
    kept.update(list(islice((number for number in newest if number not in kept), limit - len(kept))))
    if isinstance(trials, Past):
        return [trials[number] for number in sorted(kept)]
    return [trial for trial in trials if trial.number in kept]
