"""One number for the whole network: the rank maps it can give, and an order in which to try them.

A rule such as "every layer within this share of its MACs" turns one number into a rank map. Each layer's choice
changes only where the number passes one of the layer's own thresholds, so the rule gives finitely many rank maps, and
a sweep over all the thresholds finds every one. They are tried so that any number of them covers the range of MACs:
the k-th target is the k-th term of van der Corput's sequence (1/2, 1/4, 3/4, 1/8, ...; J. G. van der Corput,
"Verteilungsfunktionen", 1935) between the cheapest and the dense network, and the nearest rank map not yet tried is
proposed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby

from ranksearch.strategies.history import proposals_made, tried
from ranksearch.table import PriceTable
from ranksearch.trial import DONE, Proposal, Signal, Trial

Choices = tuple[int, ...]


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


def next_rung(table: PriceTable, family: Sequence[Choices], trials: Sequence[Trial], origin: str) -> Proposal | Signal:
    """The untried rank map of ``family`` nearest to the next target of MACs, or DONE."""
    known = tried(trials)
    untried = [choices for choices in family if choices not in known]
    if not untried:
        return DONE
    share = van_der_corput(proposals_made(trials, origin) + 1)
    target = table.least_macs + share * (table.macs(table.dense) - table.least_macs)
    return Proposal(choices=min(untried, key=lambda choices: abs(table.macs(choices) - target)), origin=origin)


def van_der_corput(k: int) -> float:
    """The ``k``-th term in base 2: the binary digits of ``k`` mirrored at the point."""
    share, weight = 0.0, 0.5
    while k:
        k, digit = divmod(k, 2)
        share += digit * weight
        weight /= 2
    return share
