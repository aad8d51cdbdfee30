"""What each part of ``auto`` brings, on ResNet-20 and CIFAR-10: the search without one part after another; Markdown.

Run from the root of the repository: ``RANKSEARCH_DATA=folder python -m benchmarks.auto_ablation --storage folder``, the
folder of data as ``search_spaces/resnet20-cifar10.yaml`` describes it. Searches that the storage has are not run again.

All search that space: its formats and targets, 24 trials, nothing trained, activation-aware factors. Seeds move the
pixels of the regression and what is drawn. Accuracies are those of the report images, of the network that the search
images choose within each target; hypervolume is that of the search images.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

from benchmarks.common import machine
from ranksearch.launch import resume, search
from ranksearch.storage import Store
from ranksearch.strategies import auto, learned
from ranksearch.strategies.knapsack import Knapsack
from ranksearch.study import Study
from ranksearch.trial import best_within

SPACE = Path(__file__).parent.parent / "search_spaces" / "resnet20-cifar10.yaml"
TRIALS = 24
TARGETS = (0.7, 0.5, 0.35, 0.25)


@contextmanager
def without_energy() -> Iterator[None]:
    """The first proposals are the knapsack's alone."""
    whole = auto.Auto._unlearned

    def unlearned(self: auto.Auto, table: Any, known: Any, made: int, limits: Any) -> Any:
        with patch.object(auto, "Energy", lambda: Knapsack(price=self.price, cost=self.cost)):
            return whole(self, table, known, made, limits)

    with patch.object(auto.Auto, "_unlearned", unlearned):
        yield


@contextmanager
def without_targets_learned() -> Iterator[None]:
    """Every learned proposal goes where most hypervolume is to be had, at any cost."""
    whole = learned.LearnedPrices.best

    def best(self: learned.LearnedPrices, weights: Any, known: Any, **_: Any) -> Any:
        return whole(self, weights, known)

    with patch.object(learned.LearnedPrices, "best", best):
        yield


@contextmanager
def nothing_between() -> Iterator[None]:
    """What is learned goes to the targets and where most hypervolume is to be had, half of it each."""
    whole = learned.LearnedPrices.best

    def best(self: learned.LearnedPrices, weights: Any, known: Any, *, target: Any = None, **_: Any) -> Any:
        return whole(self, weights, known, target=target)

    with patch.object(learned.LearnedPrices, "best", best):
        yield


@contextmanager
def nothing_beneath() -> Iterator[None]:
    """What has fewer MACs than every target is worth no more than if it had as many."""
    whole = learned.LearnedPrices._cost

    def cost(self: learned.LearnedPrices, maps: Any) -> Any:
        return np.maximum(whole(self, maps), min(TARGETS))

    with patch.object(learned.LearnedPrices, "_cost", cost):
        yield


@contextmanager
def without_error() -> Iterator[None]:
    """The predicted error is no part of the model."""
    whole = learned._prices

    def prices(*arguments: Any) -> Any:
        found = whole(*arguments)
        return replace(found, errors=[[0.0] * len(layer) for layer in found.errors])

    with patch.object(learned, "_prices", prices):
        yield


@contextmanager
def without_draws() -> Iterator[None]:
    """Proposals go by the mean of what is learned."""
    with patch.object(learned, "BOLDNESS", 0.0):
        yield


PRICE = auto.PRICE
VARIANTS: dict[str, tuple[str, str, Callable[[], AbstractContextManager[None]]]] = {
    "auto": ("auto", PRICE, nullcontext),
    "no learning: the knapsack's front": ("knapsack", PRICE, nullcontext),
    "nothing beneath the targets": ("auto", PRICE, nothing_beneath),
    "no rank maps of energy to begin with": ("auto", PRICE, without_energy),
    "no predicted error beside the price": ("auto", PRICE, without_error),
    "no draws: the mean of what is learned": ("auto", PRICE, without_draws),
    "no targets after the first proposals": ("auto", PRICE, without_targets_learned),
    "price: the predicted error alone": ("auto", "predicted", nullcontext),
    "price: fall of the accuracy": ("auto", "drop", nullcontext),
    "price: the estimate of the divergence": ("auto", "second-order", nullcontext),
    "nothing between the targets": ("auto", PRICE, nothing_between),
}


def searched(
    name: str, strategy: str, price: str, part: AbstractContextManager[None], seed: int, storage: Path
) -> Study:
    """The study of one variant and seed."""
    settings = [
        f"strategy.name={strategy}",
        f"strategy.price={price}",
        f"budget.trials={TRIALS}",
        f"seed={seed}",
        "evaluation.factors=activation-aware",
        "resources.engine=local",
        "tracking.enabled=false",
    ]
    store = Store(storage)
    if name in store.names():
        found = store.open(name)
        if sum(trial.state != "RUNNING" for trial in found.trials()) >= TRIALS:
            return found
        with part:
            return resume(name, storage=storage)
    with part:
        return search(SPACE, settings=settings, storage=storage, name=name)


def shown(values: list[float], digits: int) -> str:
    """Mean and half the range; in brackets of how many, where some are missing."""
    there = [value for value in values if not np.isnan(value)]
    if not there:
        return "none"
    count = "" if len(there) == len(values) else f"({len(there)}) "
    spread = f" ± {np.ptp(there) / 2:.{digits}f}" if len(there) > 1 else ""
    return f"{count}{np.mean(there):.{digits}f}{spread}"


def row(words: str, studies: list[Study]) -> str:
    """One variant: accuracies within the targets, and hypervolume."""
    cells = []
    for target in TARGETS:
        found = []
        for study in studies:
            best = best_within(study.front_trials(), target * study.setting.dense["macs"])
            outcome = None if best is None else best.outcome
            found.append(np.nan if outcome is None or outcome.accuracy is None else 100 * outcome.accuracy)
        cells.append(shown(found, 2))
    cells.append(shown([study.hypervolume(study.trials()) for study in studies], 4))
    return f"| {words} | {' | '.join(cells)} |"


def show(found: dict[str, list[Study]]) -> None:
    """Print the table of variants and their studies, one a seed."""
    seeds = max(map(len, found.values()))
    print(f"{TRIALS} trials of each of {seeds} seeds; mean and half the range.\n")
    print(f"| | {' | '.join(f'{target:.2f}' for target in TARGETS)} | hypervolume |\n|---|{'---:|' * 5}")
    for words, studies in found.items():
        print(row(words, studies))
    print(f"\n{machine()}")


def main() -> None:
    """Search what is missing and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--storage", type=Path, required=True, help="where the studies are kept")
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    found: dict[str, list[Study]] = {}
    for seed in range(arguments.seeds):
        for number, (words, (strategy, price, part)) in enumerate(VARIANTS.items()):
            name = f"ablation-{number}-{seed}"
            found.setdefault(words, []).append(searched(name, strategy, price, part(), seed, arguments.storage))
    print(
        "# What each part of auto brings\n\n`python -m benchmarks.auto_ablation` says in its first lines what is done."
    )
    show(found)


if __name__ == "__main__":
    main()
