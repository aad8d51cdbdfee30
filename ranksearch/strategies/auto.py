"""The knapsack front under prices that are learned from the trials.

Ours. For every proposal one set of weights of the prices is drawn from the posterior that the trials leave (see
``learned``; W. R. Thompson, "On the likelihood that one unknown probability exceeds another in view of the evidence of
two samples", 1933), the exact knapsack front of the prices so weighted is worked out, and of its rank maps the one is
tried that would add most hypervolume to the front measured so far, as E. Bradford, A. M. Schweidtmann, A. Lapkin do
with Gaussian processes ("Efficient multiobjective optimization employing Gaussian processes, spectral sampling and a
genetic algorithm", 2018). Where there are targets that can be met, every other proposal is the drawn front's rank map
at one of them instead, the least first, and every fourth the one that adds most of those with no fewer MACs than the
least of them. Running trials count with the loss that the model expects of them.

The first proposals are those of ``knapsack`` at the targets, those of ``energy`` there, whose error goes by another
measure, and the knapsack's spread over the MACs. From then on each carries its *promise*: how much larger the
hypervolume would be were all of the drawn front tried and the draw right. The mean over the last proposals is what
``auto`` expects of more trials; draws are optimistic, but it knows nothing of what is off its fronts. Where that falls
under ``min_gain``, the search ends.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from math import inf
from typing import Final

import numpy as np

from ranksearch.strategies.energy import Energy
from ranksearch.strategies.history import proposals_made, tried
from ranksearch.strategies.hull import Cost, check_cost
from ranksearch.strategies.knapsack import Knapsack
from ranksearch.strategies.ladder import Choices, Ladder
from ranksearch.strategies.learned import LearnedPrices
from ranksearch.strategies.random import steps_from
from ranksearch.table import PriceTable
from ranksearch.trial import DONE, Proposal, Signal, Trial

NAME: Final = "auto"
PRICE: Final = "divergence"
"""Foretells whole networks better than the other prices that need no labels, once trials have taught what it is worth,
and on networks that the estimate of it, ``second-order``, is wrong about (benchmarks/price_study.py, unseen.py)."""
PROMISE: Final = "promise"
"""The key of a proposal's note."""
PROMISES: Final = 8
"""Proposals, the last ones, whose mean promise is the estimate of what more trials would bring."""
ATTEMPTS: Final = 8
"""Draws of weights until one's front has a rank map that was not tried."""
STEPS: Final = 1000
"""Rank maps near the measured front that are looked at, where no draw has a new one."""


@dataclass(frozen=True, kw_only=True)
class Auto:
    """Rank maps of knapsack fronts under learned prices.

    DONE when none within the limit on MACs is left to find, or when more trials promise less than ``min_gain``.
    """

    seed: int
    objectives: tuple[str, ...]
    targets: tuple[float, ...] = ()
    max_macs_ratio: float = inf
    max_latency_ratio: float = inf
    least_accuracy: float = 0.0
    """On the search images, as the budget's ``max_drop`` allows it; heeded where the accuracy is an objective."""
    worst_loss: float = inf
    """That of a guess: networks with more are not looked for."""
    price: str = PRICE
    cost: Cost = "macs"
    """What the front is against: ``macs``, ``params``, ``latency`` or ``bit-operations``."""
    first: int = 8
    """Proposals before the prices are learned; two a target at least."""
    min_gain: float = 0.0
    """The search ends where more trials promise to enlarge the hypervolume by less than this share."""

    def __post_init__(self) -> None:
        check_cost(self.cost)
        if type(self.first) is not int or self.first < 0:
            raise ValueError(f"first must be a whole number from 0 on, found {self.first!r}")
        if type(self.min_gain) not in (int, float) or not self.min_gain >= 0:
            raise ValueError(f"min_gain must be a share from 0 on, found {self.min_gain!r}")

    def propose(self, table: PriceTable, trials: Sequence[Trial]) -> Proposal | Signal:
        """The next rank map, or DONE."""
        known = tried(trials)
        if len(known) >= table.size:
            return DONE
        made, first = proposals_made(trials, NAME), max(self.first, 2 * len(self.targets))
        limits = {"max_macs_ratio": self.max_macs_ratio, "max_latency_ratio": self.max_latency_ratio}
        if made < first:
            choices = self._unlearned(table, known, made, limits)
            if choices is not None:
                return Proposal(choices=choices, origin=NAME)
        left = promise(trials)
        if left is not None and left < self.min_gain:
            return DONE
        index, turn = proposals_made(trials), made - first
        # Hypervolume is mostly to be had where networks are small; targets say where good ones are wanted: at each of
        # them, and between them. The least comes first: there rank maps differ most, and trials teach most.
        targets = sorted(target for target in self.targets if target * table.dense_macs >= table.least_macs)
        target, least = None, 0.0
        if targets and turn % 2 == 0:
            target = targets[turn // 2 % len(targets)]
        elif targets and turn // 2 % 2 == 0:
            least = targets[0]
        model = LearnedPrices(
            table,
            trials,
            price=self.price,
            cost=self.cost,
            objectives=self.objectives,
            least_accuracy=self.least_accuracy,
            worst_loss=self.worst_loss,
            **limits,
        )
        for attempt in range(ATTEMPTS):
            rng = np.random.default_rng([self.seed, index, attempt])
            found = model.best(model.draw(rng), known, target=target, least=least)
            if found is not None:
                choices, share = found
                return Proposal(choices=choices, origin=NAME, note={PROMISE: share} if share < inf else {})
        rng = np.random.default_rng([self.seed, index, ATTEMPTS])
        start = model.incumbent(rng)
        # Those that a limit on MACs allows are connected; on latency they need not be.
        near = islice(steps_from(table, start, rng, through=model.allowed), len(known) + 1)
        for choices in chain(near, islice(steps_from(table, start, rng), STEPS + len(known))):
            if choices not in known and model.allowed(choices):
                return Proposal(choices=choices, origin=NAME, note={PROMISE: 0.0})
        return DONE

    def _unlearned(
        self, table: PriceTable, known: Collection[Choices], made: int, limits: Mapping[str, float]
    ) -> Choices | None:
        """The rank map after ``made`` others, while nothing is learned; None where there is none within the limits."""
        aims = len(self.targets)
        if aims <= made < 2 * aims:
            energy = Ladder(rule=Energy(), targets=self.targets, **limits).rung(table, known, made - aims)
            if energy is not None:
                return energy
        # Where nothing cheap is fast enough, what is fast.
        costs: tuple[Cost, ...] = (self.cost, "latency") if self.max_latency_ratio < inf else (self.cost,)
        for cost in costs:
            knapsack = Ladder(rule=Knapsack(price=self.price, cost=cost), targets=self.targets, **limits)
            choices = knapsack.rung(table, known, made if made < aims else max(aims, made - aims))
            if choices is not None:
                return choices
        return None


def promise(trials: Sequence[Trial]) -> float | None:
    """By how much more trials would enlarge the hypervolume, as a share of it, by what ``auto`` expects.

    None while fewer than :data:`PROMISES` proposals have said so.
    """
    newest = sorted(trials, key=lambda trial: trial.index)
    said = [trial.proposal.note[PROMISE] for trial in newest if PROMISE in trial.proposal.note]
    return sum(said[-PROMISES:]) / PROMISES if len(said) >= PROMISES else None
