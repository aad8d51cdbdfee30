"""Rungs: every candidate gets a little of the training, or none, and the promising ones go on to all of it.

Successive halving (K. Jamieson, A. Talwalkar, "Non-stochastic best arm identification and hyperparameter optimization",
2016) without waiting for whole rungs, as L. Li et al. do ("A system for massively parallel hyperparameter tuning",
2020, algorithm 2), for several objectives: of a rung's trials those go on first that the fewest layers of
non-domination lie before (R. Schmucker et al., "Multi-objective asynchronous successive halving", 2021), and among
them the one that adds most hypervolume to those that went on already (ours). Every other one is the most accurate
within one of the targets instead, where there are some.

The strategy that proposes the candidates sees the lowest rung alone, whose trials compare with each other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from math import ceil
from typing import Protocol, cast

from ranksearch.front import Point, hypervolume, non_dominated
from ranksearch.table import PriceTable
from ranksearch.trial import DONE, WAIT, Outcome, Proposal, Signal, Trial, minimised

MARGIN = 0.1
"""How far beyond the worst trial of a rung hypervolumes are reckoned to, as a share of its trials' range."""


class Strategy(Protocol):
    """What to try next."""

    def propose(self, table: PriceTable, trials: Sequence[Trial]) -> Proposal | Signal:
        """The next rank map to try, WAIT (for a running trial) or DONE.

        Args:
            table: the candidates of every searched layer.
            trials: every trial so far, running and failed ones too, in order of their numbers.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class Rungs:
    """A strategy's candidates on the lowest rung, and promotions; DONE when there are neither."""

    main: Strategy
    shares: tuple[float, ...]
    """Of the training, on each rung below the whole of it; rising."""
    promote: float
    """Share of a rung's trials that go on to the next."""
    objectives: tuple[str, ...]
    targets: tuple[float, ...] = ()
    """Shares of the dense network's MACs."""

    def propose(self, table: PriceTable, trials: Sequence[Trial]) -> Proposal | Signal:
        """A trial of a rung once more with more of the training, where one is due; else a new candidate."""
        latest = {trial.index: trial for trial in trials}
        levels = (*self.shares, 1.0)
        for lower, higher in reversed(list(pairwise(levels))):
            found = self._promoted(table, latest, lower, higher)
            if found is not None:
                return replace(found.proposal, fidelity=higher, note={"parent": found.index})
        lowest = [t for _, t in sorted(latest.items()) if t.proposal.fidelity == self.shares[0]]
        answer = self.main.propose(table, _alone(lowest))
        if isinstance(answer, Proposal):
            parent = answer.note.get("parent")
            known = {} if parent is None else {"parent": lowest[parent].index}
            return replace(answer, fidelity=levels[0], note={**answer.note, **known})
        # What runs on a rung may go on to the next.
        waits = any(trial.state == "RUNNING" and trial.proposal.fidelity < 1 for trial in latest.values())
        return WAIT if answer is DONE and waits else answer

    def _promoted(self, table: PriceTable, latest: Mapping[int, Trial], lower: float, higher: float) -> Trial | None:
        """The trial of one rung that is due to go on; None where enough did."""
        ended = [t for _, t in sorted(latest.items()) if t.proposal.fidelity == lower and t.within_limits]
        above = {t.proposal.choices for t in latest.values() if t.proposal.fidelity == higher}
        left = [trial for trial in ended if trial.proposal.choices not in above]
        if not left or len(above) >= ceil(round(self.promote * len(ended), 9)):
            return None
        if self.targets and len(above) % 2 == 0:
            macs = self.targets[len(above) // 2 % len(self.targets)] * table.dense_macs
            best = max(
                (trial for trial in ended if _outcome(trial).macs <= macs),
                key=lambda trial: (_outcome(trial).accuracy_search, -_outcome(trial).macs),
                default=None,
            )
            if best in left:
                return best
        return self._widest(ended, left)

    def _widest(self, ended: Sequence[Trial], left: Sequence[Trial]) -> Trial:
        """Of the first layer of non-domination with trials that are ``left`` the one that adds most hypervolume."""
        points = {trial.index: self._point(trial) for trial in ended}
        remaining, waiting = list(ended), {trial.index for trial in left}
        layer: list[Trial] = []
        while not layer:
            first = [remaining[i] for i in non_dominated([points[trial.index] for trial in remaining])]
            layer = [trial for trial in first if trial.index in waiting]
            gone = {trial.index for trial in first}
            remaining = [trial for trial in remaining if trial.index not in gone]
        reference = _beyond(list(points.values()))
        gone_on = [points[trial.index] for trial in ended if trial.index not in waiting]
        went = [gone_on[i] for i in non_dominated(gone_on)]
        return max(layer, key=lambda trial: (hypervolume([*went, points[trial.index]], reference), -trial.index))

    def _point(self, trial: Trial) -> Point:
        return minimised(cast(tuple[float, ...], trial.values), self.objectives)


def _alone(lowest: Sequence[Trial]) -> list[Trial]:
    """The trials of the lowest rung as those of a search without rungs."""
    return [
        replace(trial, number=i, index=i, attempt=0, proposal=replace(trial.proposal, fidelity=1.0))
        for i, trial in enumerate(lowest)
    ]


def _outcome(trial: Trial) -> Outcome:
    """Of a trial that is complete."""
    return cast(Outcome, trial.outcome)


def _beyond(points: Sequence[Point]) -> Point:
    """A point that is worse than all."""
    columns = list(zip(*points, strict=True))
    return tuple(max(column) + MARGIN * ((max(column) - min(column)) or 1.0) for column in columns)
