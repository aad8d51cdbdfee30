"""Random search: an independent uniform choice among the candidates of every layer."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence, Set
from dataclasses import dataclass
from typing import Final

import numpy as np

from ranksearch.strategies.history import proposals_made, tried
from ranksearch.table import PriceTable
from ranksearch.trial import DONE, Proposal, Signal, Trial

NAME = "random"
ATTEMPTS: Final = 20
"""Draws before a rank map that was tried is changed step by step instead."""


@dataclass(frozen=True, kw_only=True)
class Random:
    """Uniformly random rank maps; DONE when every one was tried."""

    seed: int

    def propose(self, table: PriceTable, trials: Sequence[Trial]) -> Proposal | Signal:
        """The next rank map, or DONE."""
        known, index = tried(trials), proposals_made(trials)
        if len(known) >= table.size:
            return DONE
        counts = [len(layer.candidates) for layer in table.layers]
        for attempt in range(ATTEMPTS):
            rng = np.random.default_rng([self.seed, index, attempt])
            choices = tuple(int(choice) for choice in rng.integers(counts))
            if choices not in known:
                return Proposal(choices=choices, origin=NAME)
        return Proposal(choices=step_to_new(table, choices, known, rng), origin=NAME)


def steps_from(
    table: PriceTable,
    choices: tuple[int, ...],
    rng: np.random.Generator,
    *,
    through: Callable[[tuple[int, ...]], bool] = lambda _: True,
) -> Iterator[tuple[int, ...]]:
    """Every rank map of a table, ``choices`` first, those before that are fewer steps away.

    A step changes one layer by one candidate; in which order those of a rank map are taken is drawn. No step leads to
    what ``through`` denies, nor beyond.
    """
    counts = [len(layer.candidates) for layer in table.layers]
    steps = [(layer, step) for layer, count in enumerate(counts) if count > 1 for step in (-1, 1)]
    seen, waiting = {choices}, deque([choices])
    while waiting:
        here = waiting.popleft()
        yield here
        for i in rng.permutation(len(steps)):
            layer, step = steps[i]
            if 0 <= here[layer] + step < counts[layer]:
                there = (*here[:layer], here[layer] + step, *here[layer + 1 :])
                if there not in seen and through(there):
                    seen.add(there)
                    waiting.append(there)


def step_to_new(
    table: PriceTable, choices: tuple[int, ...], known: Set[tuple[int, ...]], rng: np.random.Generator
) -> tuple[int, ...]:
    """Walk from ``choices``, one layer by one candidate at a time, until a rank map that is not ``known``.

    There must be one. The steps connect all rank maps of a table, so the walk ends.
    """
    moving = list(choices)
    free = [i for i, layer in enumerate(table.layers) if len(layer.candidates) > 1]
    while tuple(moving) in known:
        layer = free[rng.integers(len(free))]
        step = int(rng.choice((-1, 1)))
        moving[layer] = min(max(moving[layer] + step, 0), len(table.layers[layer].candidates) - 1)
    return tuple(moving)
