"""Ladders: a rule gives a family of rank maps, from the cheapest to dense, and an order in which to try them.

A rule such as "every layer within this share of its MACs" turns one number into a rank map. Each layer's choice
changes only where the number passes one of the layer's own thresholds, so the rule gives finitely many rank maps, and
a sweep over all the thresholds finds every one. They are tried so that any number of them covers the range of MACs:
the k-th target is the k-th term of van der Corput's sequence (1/2, 1/4, 3/4, 1/8, ...; J. G. van der Corput,
"Verteilungsfunktionen", 1935) between the cheapest and the dense network, and the nearest rank map not yet tried is
proposed. Shares of the MACs that the space names as targets come before these.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
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

    def propose(self, table: PriceTable, trials: Sequence[Trial]) -> Proposal | Signal:
        """The next rank map, or DONE."""
        known = tried(trials)
        untried = [rung for rung in _rungs(self.rule, table) if rung[1] not in known]
        if not untried:
            return DONE
        name = self.rule.name
        made = proposals_made(trials, name)
        if made < len(self.targets):
            limit = self.targets[made] * table.dense_macs
            chosen = min(untried, key=lambda rung: (rung[0] > limit, abs(rung[0] - limit)))
        else:
            target = target_macs(table, made - len(self.targets) + 1)
            chosen = min(untried, key=lambda rung: abs(rung[0] - target))
        return Proposal(choices=chosen[1], origin=name)


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


def target_macs(table: PriceTable, k: int) -> float:
    """MACs that the ``k``-th rung (from 1) aims at, between the cheapest and the dense network."""
    return table.least_macs + van_der_corput(k) * (table.macs(table.dense) - table.least_macs)


def van_der_corput(k: int) -> float:
    """The ``k``-th term in base 2: the binary digits of ``k`` mirrored at the point."""
    share, weight = 0.0, 0.5
    while k:
        k, digit = divmod(k, 2)
        share += digit * weight
        weight /= 2
    return share
