"""Greedy multi-step: measure moves on the current compressed network and make the one of least loss per cost.

After N. Kozyrskiy and A.-H. Phan, "CNN Acceleration by Low-rank Approximation with Quantized Factors", 2020
(arXiv:2006.08878), section on greedy multilinear rank selection; the paper's body was not at hand, so the details are
our reconstruction. It captures what layers do to each other, which no price of single layers does.

- A move takes one layer some candidates further down: ``s`` places in the order of MACs, or one of its ranks, or all of
  them together, lower by ``s`` levels of the grid. From dense it enters every format. ``s`` is ``step`` far from the
  target and halves every time that the rest of the way halves, from its last quarter on.
- Evaluation is lazy, as in submodular maximisation (M. Minoux, "Accelerated greedy algorithms for maximizing submodular
  set functions", 1978): moves stay in a queue under the last slope (loss over saved cost) measured for them, on any
  network. Only those at the head of the queue are measured again, until one measured on the current network heads it.
- A rank map that failed is never tried again: its move waits for the next network, and where every move of a network
  has failed, or none saves cost, longer ones are taken.

The state is replayed from the trials: their rank maps and outcomes, whoever proposed them, say how far the search is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import inf
from typing import Any, Final, Literal

from ranksearch.strategies.hull import Cost, check_cost, layer_costs, whole_cost
from ranksearch.strategies.ladder import Choices
from ranksearch.table import ROUNDING, LayerPrices, PriceTable
from ranksearch.trial import DONE, WAIT, Outcome, Proposal, Signal, Trial

NAME: Final = "greedy-multi-step"

Move = tuple[int, int]
"""A layer's place in the table, and the candidate it goes to."""


@dataclass(frozen=True, kw_only=True)
class GreedyMultiStep:
    """Rank maps from dense down to a target, and the moves that were measured on the way; DONE at the target."""

    batch: int
    """Moves at the head of the queue that are measured at a time."""
    target: float = 0.0
    """Share of the dense network's cost to go down to; by default as far as it goes."""
    step: int = 1
    """Places or levels that a move goes down, far from the target."""
    measure: Literal["loss", "accuracy"] = "loss"
    """What a move loses: cross-entropy, or accuracy, on the search images."""
    cost: Cost = "macs"
    """What it saves: ``macs``, ``params``, ``latency`` or ``bit-operations``."""

    def __post_init__(self) -> None:
        check_cost(self.cost)
        if not (isinstance(self.step, int) and self.step >= 1 and 0 <= self.target < 1):
            raise ValueError(f"step must be a whole number from 1 on, and target in [0, 1), found {self}")
        if self.measure not in ("loss", "accuracy"):
            raise ValueError(f"measure must be loss or accuracy, found {self.measure!r}")

    def propose(self, table: PriceTable, trials: Sequence[Trial]) -> Proposal | Signal:
        """The next move to measure, WAIT for those being measured, or DONE."""
        latest = {trial.proposal.choices: trial for trial in trials if not trial.proposal.funnel}
        walk = _Walk(rule=self, table=table, latest=latest, at=table.dense)
        if table.dense not in latest:
            return Proposal(choices=table.dense, origin=NAME, note={"move": None, "parent": None})
        while walk.moves:
            wanted = walk.wanted()
            untried = [move for move in wanted if walk.after(move) not in latest]
            if untried:
                return Proposal(choices=walk.after(untried[0]), origin=NAME, note=walk.note(untried[0]))
            if any(latest[choices].state == "RUNNING" for choices in (walk.at, *map(walk.after, wanted))):
                return WAIT
            if not wanted:
                walk.advance()
            else:
                walk.learn(wanted)
        return DONE

    def lost(self, outcome: Outcome) -> float:
        """What counts as loss."""
        return outcome.loss if self.measure == "loss" else -outcome.accuracy_search


@dataclass(kw_only=True)
class _Walk:
    """The search replayed as far as the trials go."""

    rule: GreedyMultiStep
    table: PriceTable
    latest: Mapping[Choices, Trial]
    """Rank map to its last trial."""
    at: Choices
    """The current rank map."""
    slopes: dict[Move, float] = field(default_factory=dict)
    """The last slope measured for each move."""
    settled: set[Move] = field(default_factory=set)
    """Moves measured, or failed, on the current rank map."""
    failed: set[Move] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.costs = layer_costs(self.table, self.rule.cost)
        dense, other = whole_cost(self.table, self.rule.cost)
        self.limit = self.rule.target * dense * ROUNDING - other
        """What the searched layers may cost."""
        self.limit = max(self.limit, sum(min(costs) for costs in self.costs))
        self.way = self.spent(self.table.dense) - self.limit
        self.reached: dict[tuple[int, int, int], list[int]] = {}
        """Where a move leads, by layer, candidate and stride."""
        self.enter(self.at)

    def spent(self, choices: Choices) -> int:
        """What the searched layers cost."""
        return sum(costs[i] for costs, i in zip(self.costs, choices, strict=True))

    def after(self, move: Move) -> Choices:
        """The current rank map with the move made."""
        layer, choice = move
        return (*self.at[:layer], choice, *self.at[layer + 1 :])

    def note(self, move: Move) -> dict[str, Any]:
        """What is kept beside the trial: the layer, its candidate before and after, and the trial it starts from."""
        layer, choice = move
        made = {"layer": self.table.layers[layer].name, "from": self.at[layer], "to": choice}
        return {"move": made, "parent": self.latest[self.at].index}

    def enter(self, choices: Choices) -> None:
        """Make ``choices`` the current rank map and find its moves: none at the target, or where none is left."""
        self.at, self.settled, self.failed = choices, set(), set()
        left = self.spent(choices) - self.limit
        self.stride = self.rule.step
        while self.stride > 1 and 4 * left * self.rule.step < self.way * self.stride:
            self.stride //= 2
        self.moves = self.found() if left > 0 else []
        if left > 0:
            self.lengthen()

    def found(self) -> list[Move]:
        """The moves from the current rank map that save cost."""
        moves = []
        for layer, at in enumerate(self.at):
            key = (layer, at, self.stride)
            if key not in self.reached:
                costs, down = self.costs[layer], lower(self.table.layers[layer], at, self.stride)
                self.reached[key] = [choice for choice in down if costs[choice] < costs[at]]
            moves += [(layer, choice) for choice in self.reached[key]]
        return moves

    def wanted(self) -> list[Move]:
        """The moves to measure now: all that never were, else the stale ones at the queue's head; none: make a move."""
        unknown = [move for move in self.moves if move not in self.slopes and move not in self.settled]
        if unknown:
            return unknown
        ordered = sorted((m for m in self.moves if m not in self.failed), key=lambda m: (self.slopes[m], m))
        fresh = next((i for i, move in enumerate(ordered) if move in self.settled), len(ordered))
        return ordered[: min(fresh, self.rule.batch)]

    def learn(self, moves: Sequence[Move]) -> None:
        """Take in the outcomes of moves on the current rank map."""
        base = self.lost(self.at)
        ended = {move: self.lost(self.after(move)) for move in moves}
        if base == inf:  # the dense network's trial failed: nothing is better than its best move
            base = min(ended.values())
        for move, lost in ended.items():
            self.settled.add(move)
            if lost == inf:
                self.failed.add(move)
            else:
                self.slopes[move] = (lost - base) / (self.spent(self.at) - self.spent(self.after(move)))

    def lost(self, choices: Choices) -> float:
        """The loss of a rank map; infinite where its trial failed."""
        outcome = self.latest[choices].outcome
        return inf if outcome is None else self.rule.lost(outcome)

    def advance(self) -> None:
        """Make the move that heads the queue; where all have failed, look for longer ones."""
        left = [move for move in self.moves if move not in self.failed]
        if left:
            self.enter(self.after(min(left, key=lambda move: (self.slopes[move], move))))
            return
        self.moves = []
        self.lengthen()

    def lengthen(self) -> None:
        """Look for longer moves as long as there is none: short ones may have failed, or save nothing."""
        while not self.moves and self.stride < max(len(layer.candidates) for layer in self.table.layers):
            self.stride += 1
            self.moves = [move for move in self.found() if move not in self.failed]


def lower(layer: LayerPrices, at: int, stride: int) -> list[int]:
    """The candidates that one move of ``stride`` reaches from the candidate ``at``, cheapest first."""
    here, reached = layer.candidates[at], {max(at - stride, 0)}
    for form in {(candidate.format, candidate.bits) for candidate in layer.candidates if not candidate.dense}:
        same = {c.ranks: i for i, c in enumerate(layer.candidates) if (c.format, c.bits) == form}
        if here.dense:
            reached.add(sorted(same.values())[-min(stride, len(same))])
        elif (here.format, here.bits) == form:
            down = tuple(_level_below(same, mode, rank, stride) for mode, rank in enumerate(here.ranks))
            single = [(*here.ranks[:m], rank, *here.ranks[m + 1 :]) for m, rank in enumerate(down)]
            reached |= {same[ranks] for ranks in (*single, down) if ranks in same}
    return sorted(reached - {at})


def _level_below(ranks: Mapping[tuple[int, ...], int], mode: int, rank: int, stride: int) -> int:
    """The rank ``stride`` levels below ``rank`` on the grid of one mode, or its lowest."""
    levels = sorted({each[mode] for each in ranks if each[mode] < rank})
    return levels[-min(stride, len(levels))] if levels else rank
