"""Other ways to search on from where ``auto`` begins to learn, on ResNet-20 and CIFAR-10; prints Markdown.

Run from the root of the repository: ``RANKSEARCH_DATA=folder python -m benchmarks.other_searches --storage folder``, as
``benchmarks.auto_ablation``, whose space, trials and first proposals these are. Searches that the storage has are not
run again. After the first eight proposals:

- *local moves*: not the front under the drawn weights is looked at, but rank maps near the measured front's: one layer
  one or two places further up or down its candidates by MACs, and beside it another one down or up.
- *pairs of layers*: the model learns of each two neighbouring layers what their errors do together, as a multiple of
  the root of the product of their prices (the cross term of two errors whose squares are the prices). Looked at are the
  drawn front without the pairs, which the knapsack cannot see, and local moves.
- *few dimensions*: Optuna's multivariate TPE, with two objectives, over the MACs, the share of the predicted error in
  the price, and a factor of the price for every stage and every format; the knapsack turns them into ranks. Every other
  proposal has a target's MACs.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import optuna

from benchmarks.auto_ablation import TARGETS, searched, show
from benchmarks.common import dearest
from ranksearch.front import non_dominated
from ranksearch.strategies import auto, learned
from ranksearch.strategies.history import proposals_made, tried
from ranksearch.strategies.knapsack import predicted_front
from ranksearch.strategies.ladder import Choices
from ranksearch.study import Study
from ranksearch.table import PriceTable
from ranksearch.trial import Proposal, Signal, Trial

PLACES = (1, 2)
"""How far a local move goes."""
LEAST_MACS, MOST_MACS = 0.15, 0.95
TILT = 1.5
"""Largest logarithm of a factor of the price."""
NOTE = "dimensions"


def moves(costs: Sequence[Sequence[int]], maps: Sequence[Choices]) -> tuple[Choices, ...]:
    """The rank maps that local moves make of others."""
    ranked = [np.argsort(own, kind="stable") for own in costs]
    places = [np.argsort(order, kind="stable") for order in ranked]
    found: dict[Choices, None] = {}
    for choices in maps:
        steps: dict[int, list[tuple[int, int]]] = {1: [], -1: []}
        for layer, choice in enumerate(choices):
            for way in steps:
                for far in PLACES:
                    place = places[layer][choice] + way * far
                    if 0 <= place < len(ranked[layer]):
                        steps[way].append((layer, int(ranked[layer][place])))
        both = [(up, down) for up in steps[1] for down in steps[-1] if up[0] != down[0]]
        for move in [*((one,) for one in steps[1] + steps[-1]), *both]:
            moved = list(choices)
            for layer, choice in move:
                moved[layer] = choice
            found[tuple(moved)] = None
    return tuple(found)


@contextmanager
def looked_at(drawn: bool) -> Iterator[None]:
    """Proposals are local moves; of the ``drawn`` front too, if so asked."""
    whole = learned.LearnedPrices.best

    def best(self: learned.LearnedPrices, weights: Any, known: Any, **more: Any) -> Any:
        near = moves(self.prices.costs, [choices for _, choices in self.front])

        def front(costs: Any, losses: Any) -> tuple[Choices, ...]:
            maps = [c for c in ((*near, *predicted_front(costs, losses)) if drawn else near) if c not in known]
            rows = self._rows(maps)
            expected = self._totals(rows, [np.array(own) for own in losses]).tolist()
            # At a target the dearest is taken: of those that no other is expected to beat.
            points = list(zip(self._totals(rows, self.costs).tolist(), expected, strict=True))
            return tuple(maps[i] for i in non_dominated(points))

        with patch.object(learned, "predicted_front", front):
            return whole(self, weights, known, **more)

    with patch.object(learned.LearnedPrices, "best", best):
        yield


@contextmanager
def pairs_of_layers() -> Iterator[None]:
    """The model has a weight for every two neighbouring layers, which stands where those of formats do."""
    prices, features, totals, best = (
        learned._prices,
        learned.LearnedPrices.features,
        learned.LearnedPrices._totals,
        learned.LearnedPrices.best,
    )

    def with_pairs(*arguments: Any) -> Any:
        found = prices(*arguments)
        return replace(found, formats=found.formats + tuple(f"pair {i}" for i in range(len(found.losses) - 1)))

    def together(self: learned.LearnedPrices, maps: Any) -> Any:
        roots = np.stack(
            [np.sqrt(np.array(own))[column] for own, column in zip(self.prices.losses, maps.T, strict=True)]
        )
        return (roots[:-1] * roots[1:]).T

    def with_products(self: learned.LearnedPrices, choices: Any) -> Any:
        found = features(self, choices)
        found[-self.layers : -1] = together(self, np.array([choices]))[0]
        return found

    weights_now: list[Any] = [None]

    def noting(self: learned.LearnedPrices, weights: Any, known: Any, **more: Any) -> Any:
        weights_now[0] = weights[-self.layers : -1]
        return best(self, weights, known, **more)

    def with_pairs_summed(self: learned.LearnedPrices, maps: Any, values: Any) -> Any:
        found = totals(self, maps, values)
        losses = values[0].dtype.kind == "f" and len(maps) > 0
        return found + together(self, maps) @ weights_now[0] if losses else found

    with (
        patch.object(learned, "_prices", with_pairs),
        patch.object(learned.LearnedPrices, "features", with_products),
        patch.object(learned.LearnedPrices, "_totals", with_pairs_summed),
        patch.object(learned.LearnedPrices, "best", noting),
        looked_at(drawn=True),
    ):
        yield


def groups(table: PriceTable) -> list[str]:
    """The stage of every layer, by its name."""
    return [layer.name.split(".")[0] for layer in table.layers]


def dimensions(table: PriceTable) -> dict[str, optuna.distributions.BaseDistribution]:
    """What TPE draws."""
    formats = {c.format for layer in table.layers for c in layer.candidates if not c.dense}
    tilted = [*sorted(set(groups(table))), *sorted(formats)]
    real = optuna.distributions.FloatDistribution
    tilts = {name: real(-TILT, TILT) for name in tilted}
    return {"macs": real(LEAST_MACS, MOST_MACS, log=True), "error": real(0.0, 1.0), **tilts}


def decoded(table: PriceTable, price: str, drawn: dict[str, float]) -> Choices:
    """The knapsack's rank map of drawn dimensions."""
    prices = learned._prices(table, price, "macs")
    whole = [sum(map(sum, own)) or 1.0 for own in (prices.losses, prices.errors)]
    weighted = []
    for layer, own, errors, stage in zip(table.layers, prices.losses, prices.errors, groups(table), strict=True):
        factors = [np.exp(drawn[stage] + (0.0 if c.dense else drawn[c.format])) for c in layer.candidates]
        mixed = [
            (1 - drawn["error"]) * loss / whole[0] + drawn["error"] * error / whole[1]
            for loss, error in zip(own, errors, strict=True)
        ]
        weighted.append([float(factor * loss) for factor, loss in zip(factors, mixed, strict=True)])
    front = predicted_front(prices.costs, weighted)
    cheapest = min(table.macs_ratio(choices) for choices in front)
    return dearest(table, front, max(drawn["macs"], cheapest))


def seen(table: PriceTable, trials: Sequence[Trial], space: dict[str, Any]) -> Iterator[optuna.trial.FrozenTrial]:
    """The complete trials as Optuna's; those from before are the knapsack's of the price and of the error."""
    for trial in trials:
        if trial.outcome is None:
            continue
        ratio = table.macs_ratio(trial.proposal.choices)
        error = 1.0 if len(TARGETS) <= trial.index < 2 * len(TARGETS) else 0.0
        first = dict.fromkeys(space, 0.0) | {"error": error, "macs": min(max(ratio, LEAST_MACS), MOST_MACS)}
        yield optuna.trial.create_trial(
            params=trial.proposal.note.get(NOTE, first),
            distributions=space,
            values=[1 - trial.outcome.accuracy_search, ratio],
        )


@contextmanager
def few_dimensions() -> Iterator[None]:
    """TPE proposes."""
    whole = auto.Auto.propose

    def propose(self: auto.Auto, table: PriceTable, trials: Sequence[Trial]) -> Proposal | Signal:
        turn = proposals_made(trials, auto.NAME) - max(self.first, 2 * len(self.targets))
        if turn < 0:
            return whole(self, table, trials)
        space = dimensions(table)
        for attempt in range(100):
            seed = int(np.random.default_rng([self.seed, turn, attempt]).integers(2**31))
            sampler = optuna.samplers.TPESampler(seed=seed, multivariate=True, n_startup_trials=1)
            study = optuna.create_study(directions=["minimize", "minimize"], sampler=sampler)
            study.add_trials(list(seen(table, trials, space)))
            if turn % 2 == 0:
                study.enqueue_trial({"macs": self.targets[turn // 2 % len(self.targets)]})
            drawn = study.ask(space).params
            choices = decoded(table, self.price, drawn)
            if choices not in tried(trials):
                break
        return Proposal(choices=choices, origin=auto.NAME, note={NOTE: drawn})

    with patch.object(auto.Auto, "propose", propose):
        yield


VARIANTS: dict[str, Callable[[], AbstractContextManager[None]]] = {
    "auto": nullcontext,
    "local moves": lambda: looked_at(drawn=False),
    "pairs of layers": pairs_of_layers,
    "few dimensions": few_dimensions,
}


def main() -> None:
    """Search what is missing and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--storage", type=Path, required=True, help="where the studies are kept")
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    found: dict[str, list[Study]] = {}
    for seed in range(arguments.seeds):
        for words, part in VARIANTS.items():
            name = f"other-{words.replace(' ', '-')}-{seed}"
            found.setdefault(words, []).append(searched(name, "auto", auto.PRICE, part(), seed, arguments.storage))
    print("# Other ways to search\n\n`python -m benchmarks.other_searches` says in its first lines what is compared.")
    show(found)


if __name__ == "__main__":
    main()
