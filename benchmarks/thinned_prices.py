"""Whether every candidate must be measured: some are, and the others get prices by interpolation; prints Markdown.

Run from the root of the repository: ``python -m benchmarks.thinned_prices --storage folder STUDY...``, of finished
searches that measured all candidates (``strategy.price_points=null``). Nothing is measured anew: of all but some
candidates the prices are forgotten, and interpolated as a search with so many ``price_points`` does. What is told: how
far that is from what was measured (the factor, median and 90th percentile), what the knapsack's rank maps at four
shares of the MACs then cost by the measured prices (in nats, where the price is the divergence; those of all prices are
the least possible), and how well the sum over the layers foretells the accuracy of the study's trials on the search
images (Spearman).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
from scipy.stats import spearmanr

from ranksearch.interpolation import interpolated, sampled
from ranksearch.storage import Store
from ranksearch.strategies.auto import PRICE
from ranksearch.strategies.knapsack import predicted_front
from ranksearch.table import PriceTable
from ranksearch.trial import Trial

POINTS = (None, 12, 8, 6, 5, 4, 3, 2)
TARGETS = (0.7, 0.5, 0.35, 0.25)
LEAST = 1e-9
"""Prices below are taken for this."""


def knapsack(table: PriceTable, losses: list[list[float]], exact: list[list[float]]) -> list[str]:
    """What the knapsack's rank maps under ``losses`` cost by the ``exact`` prices, at the targets."""
    costs = [[candidate.macs for candidate in layer.candidates] for layer in table.layers]
    front = predicted_front(costs, losses)  # by rising cost and falling loss
    found = []
    for target in TARGETS:
        within = [choices for choices in front if table.macs(choices) <= target * table.dense_macs]
        found.append(f"{sum(row[i] for row, i in zip(exact, within[-1], strict=True)):.3f}" if within else "none")
    return found


def rows(table: PriceTable, trials: list[Trial], price: str) -> list[str]:
    """One row for each number of points."""
    scored = [(t.proposal.choices, t.outcome.accuracy_search) for t in trials if t.outcome is not None]
    accuracies = [accuracy for _, accuracy in scored]
    measured = {layer.name: [dict(c.prices) for c in layer.candidates] for layer in table.layers}
    exact = [[row[price] for row in prices] for prices in measured.values()]
    found = []
    for points in POINTS:
        some = sampled(table, points)
        kept = {layer.name: [dict(c.prices) for c in layer.candidates] for layer in some.layers}
        losses = [[row[price] for row in prices] for prices in interpolated(table, points, kept).values()]
        share = sum(map(len, kept.values())) / sum(map(len, exact))
        off = np.abs(np.log(np.maximum(np.concatenate(losses), LEAST) / np.maximum(np.concatenate(exact), LEAST)))
        apart = np.exp(np.percentile(off[off > 1e-9], [50, 90])) if points else np.ones(2)
        sums = [sum(row[i] for row, i in zip(losses, choices, strict=True)) for choices, _ in scored]
        cells = [f"{points or 'all'}", f"{100 * share:.0f} %", f"{apart[0]:.2f}", f"{apart[1]:.2f}"]
        cells += [*knapsack(table, losses, exact), f"{-float(spearmanr(sums, accuracies).statistic):.3f}"]
        found.append(" | ".join(cells))
    return found


def main() -> None:
    """Read the studies and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("studies", nargs="+", metavar="STUDY")
    parser.add_argument("--storage", type=Path, required=True, help="where the studies are")
    parser.add_argument("--price", default=PRICE)
    arguments = parser.parse_args()
    targets = " | ".join(f"at {target:.2f}" for target in TARGETS)
    print(f"| study | trials | points | measured | factor, median | 90 % | {targets} | Spearman |")
    print(f"|---|{'---:|' * (6 + len(TARGETS))}")
    for name in arguments.studies:
        study = Store(arguments.storage).open(name)
        if study.space.strategy.price_points is not None:
            sys.exit(f"{name} must have measured all candidates: search with --set strategy.price_points=null.")
        trials = [trial for trial in study.trials() if trial.outcome is not None and trial.proposal.fidelity in (0, 1)]
        lowest = min(trial.proposal.fidelity for trial in trials)
        trials = [trial for trial in trials if trial.proposal.fidelity == lowest]
        for line in rows(study.setting.table, trials, arguments.price):
            print(f"| {name} | {len(trials)} | {line} |")


if __name__ == "__main__":
    main()
