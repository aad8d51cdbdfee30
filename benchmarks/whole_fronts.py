"""Whole fronts of ``auto`` and of allocators with as many trials each, on ResNet-20 and CIFAR-10; prints Markdown.

Run from the root of the repository: ``RANKSEARCH_DATA=folder python -m benchmarks.whole_fronts --storage folder``, the
folder of data as ``search_spaces/resnet20-cifar10.yaml`` describes it. What the storage has is not searched again.

Activation-aware factors, four targets, 24 trials of every strategy, nothing trained; in the formats of that space, or
in others. Allocators spread the trials beyond the targets evenly over the MACs. A front is told by its
hypervolume, and by the mean accuracy over all budgets from 0.25 to 0.75 of the MACs: at each of them the network counts
that is the most accurate on the search images within it, by its accuracy on those and on the report images.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np

from benchmarks.auto_ablation import shown
from benchmarks.common import SPACES, machine
from ranksearch import compare
from ranksearch.storage import Store
from ranksearch.study import Study
from ranksearch.trial import Outcome

LEAST, MOST = 0.25, 0.75
TARGETS = (0.7, 0.5, 0.35, 0.25)
STRATEGIES = (
    "auto",
    "knapsack@divergence",
    "greedy@loss",
    "eps@drop",
    "energy",
    "lc@weight",
    "knapsack@predicted",
    "water-filling",
    "uniform",
    "alds",
    "evbmf",
)
SETTINGS = (
    "evaluation.factors=activation-aware",
    "strategy.seeds=[]",
    "budget.trials=24",
    "resources.engine=local",
    "tracking.enabled=false",
)


def mean_accuracy(study: Study, accuracy: Callable[[Outcome], float | None]) -> float:
    """Per cent, over all budgets from LEAST to MOST of the MACs; not a number where the least budget has no network."""
    front = sorted((t for t in study.front_trials() if t.outcome), key=lambda t: t.outcome.macs if t.outcome else 0)
    dense = study.setting.dense["macs"]
    bounds, values = [], []
    for trial in front:
        assert trial.outcome is not None
        found = accuracy(trial.outcome)
        assert found is not None
        bounds.append(min(max(trial.outcome.macs / dense, LEAST), MOST))
        values.append(found)
    if not bounds or bounds[0] > LEAST:
        return float("nan")
    widths = np.diff([*bounds, MOST])
    return 100 * float(widths @ np.array(values)) / (MOST - LEAST)


def row(words: str, studies: list[Study]) -> str:
    """One strategy's fronts."""
    cells = [
        shown([study.hypervolume(study.trials()) for study in studies], 4),
        shown([mean_accuracy(study, lambda outcome: outcome.accuracy_search) for study in studies], 2),
        shown([mean_accuracy(study, lambda outcome: outcome.accuracy) for study in studies], 2),
    ]
    return f"| {words} | {' | '.join(cells)} |"


def main() -> None:
    """Search what is missing and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--storage", type=Path, required=True, help="where the studies are kept")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--strategies", nargs="+", default=STRATEGIES)
    parser.add_argument("--formats", help="separated by commas; those of the space by default")
    chosen = parser.parse_args()
    found = compare(
        SPACES / "resnet20-cifar10.yaml",
        chosen.strategies,
        seeds=chosen.seeds,
        targets=TARGETS,
        settings=[*SETTINGS, *([f"formats=[{chosen.formats}]"] if chosen.formats else [])],
        storage=chosen.storage,
        name=f"fronts-{chosen.formats}".replace(",", "-") if chosen.formats else "fronts",
    )
    store = Store(chosen.storage)
    print("# Whole fronts\n\n`python -m benchmarks.whole_fronts` says in its first lines what is compared.")
    print(f"{chosen.seeds} seeds; mean and half the range.\n")
    print("| strategy | hypervolume | mean accuracy, search, % | report, % |\n|---|---:|---:|---:|")
    for strategy in found.strategies:
        print(row(strategy, [store.open(run.study) for run in found.runs if run.strategy == strategy]))
    print(f"\n{machine()}")


if __name__ == "__main__":
    main()
