"""Ladders: a rule gives a family of rank maps, from the cheapest to dense, and an order in which to try them.

A rule such as "every layer within this share of its MACs" turns one number into a rank map. Each layer's choice
changes only where the number passes one of the layer's own thresholds, so the rule gives finitely many rank maps, and
a sweep over all the thresholds finds every one. They are tried so that any number of them covers the range of MACs:
the k-th target is the k-th term of van der Corput's sequence (1/2, 1/4, 3/4, 1/8, ...; J. G. van der Corput,
"Verteilungsfunktionen", 1935) between the cheapest and the dense network, and the nearest rank map not yet tried is
proposed. Shares of the MACs that the space names as targets come before these.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from math import inf
from typing import Protocol

from ranksearch.strategies.history import proposals_made, tried
from ranksearch.table import PriceTable
from ranksearch.trial import DONE, Proposal, Signal, Trial

Choices = tuple[int, ...]


class Rule(Protocol):
    """A family of rank maps; hashable, so that it is worked out once a table."""

    @property
    def name(self) -> str:
        """The strategy's name."""
        ...

    def __hash__(self) -> int: ...

    def maps(self, table: PriceTable) -> Sequence[Choices]:
        """Every rank map of the family, at least one; raises PriceError where the table lacks what the rule reads."""
        ...


@dataclass(frozen=True, kw_only=True)
class Ladder:
    """Rank maps of one rule: the dearest within each target, then spread over the MACs; DONE after the last of them."""

    rule: Rule
    targets: tuple[float, ...] = ()
    """Shares of the dense network's MACs."""
    max_macs_ratio: float = inf
    """No rank map with more MACs than this share is tried."""
    max_latency_ratio: float = inf
    """Nor any that is predicted to take more than this share of the dense latency."""

    def propose(self, table: PriceTable, trials: Sequence[Trial]) -> Proposal | Signal:
        """The next rank map, or DONE."""
        name = self.rule.name
        choices = self.rung(table, tried(trials), proposals_made(trials, name))
        return DONE if choices is None else Proposal(choices=choices, origin=name)

    def rung(self, table: PriceTable, known: Collection[Choices], made: int) -> Choices | None:
        """The rank map after ``made`` others that is not ``known``; None where there is none within the limit."""
        most = self.max_macs_ratio * table.dense_macs
        untried = [rung for rung in _rungs(self.rule, table) if rung[1] not in known and rung[0] <= most]
        if self.max_latency_ratio < inf:
            untried = [rung for rung in untried if table.latency_ratio(rung[1]) <= self.max_latency_ratio]
        if made < len(self.targets):
            limit = self.targets[made] * table.dense_macs
            return min(untried, key=lambda rung: (rung[0] > limit, abs(rung[0] - limit)), default=(0, None))[1]
        share = van_der_corput(made - len(self.targets) + 1)
        target = table.least_macs + share * (min(most, table.macs(table.dense)) - table.least_macs)
        return min(untried, key=lambda rung: abs(rung[0] - target), default=(0, None))[1]


@lru_cache(maxsize=16)
def _rungs(rule: Rule, table: PriceTable) -> tuple[tuple[int, Choices], ...]:
    """The rule's rank maps, each after its MACs."""
    return tuple((table.macs(choices), choices) for choices in dict.fromkeys(rule.maps(table)))


def sweep(start: Choices, steps: Sequence[Iterable[tuple[float, int]]]) -> tuple[Choices, ...]:
    """Every rank map that one rising number gives.

    Args:
        start: the choices below all thresholds.
        steps: for every layer, pairs of a threshold and the choice from there on.
    """
    events = sorted((at, layer, choice) for layer, pairs in enumerate(steps) for at, choice in pairs)
    current = list(start)
    found = {start: None}
    for _, group in groupby(events, key=lambda event: event[0]):
        for _, layer, choice in group:
            current[layer] = choice
        found[tuple(current)] = None
    return tuple(found)


def van_der_corput(k: int) -> float:
    """The ``k``-th term in base 2: the binary digits of ``k`` mirrored at the point."""
    share, weight = 0.0, 0.5
    while k:
        k, digit = divmod(k, 2)
        share += digit * weight
        weight /= 2
    return share
