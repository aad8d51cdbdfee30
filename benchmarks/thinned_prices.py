"""Whether every candidate must be measured: some are, and the others get prices by interpolation; prints Markdown.

Run from the root of the repository: ``python -m benchmarks.thinned_prices --storage folder STUDY...``, of finished
searches that reckoned with a measured price. Nothing is measured anew. Of each layer's candidates of one format, sorted
by their predicted errors, every k-th and the last keep their prices; the others get what lies on the straight lines
between these, logarithm of the price against logarithm of the error. What is told: how far that is from what was
measured (the factor, median and 90th percentile), and how well the sum over the layers foretells the accuracy of the
study's trials on the search images (Spearman, and the correlation of the logarithms), beside all prices measured.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from pathlib import Path

import numpy as np
from scipy.stats import spearmanr

from ranksearch.storage import Store
from ranksearch.strategies.auto import PRICE
from ranksearch.table import LayerPrices, PriceTable
from ranksearch.trial import Trial

STEPS = (1, 2, 3, 4, 6, 10)
LEAST = 1e-9
"""Prices and errors below are taken for this."""


def thinned(layer: LayerPrices, price: str, step: int) -> tuple[list[float], list[int]]:
    """A layer's prices, all but every ``step``-th of a format interpolated, and the indices of those that are not."""
    found = [dict(candidate.prices)[price] for candidate in layer.candidates]
    formats: dict[str, list[int]] = defaultdict(list)
    for i, candidate in enumerate(layer.candidates):
        if not candidate.dense:
            formats[candidate.format].append(i)
    measured = []
    for indices in formats.values():
        order = sorted(indices, key=lambda i: layer.candidates[i].error)
        kept = sorted({*range(0, len(order), step), len(order) - 1})
        x = np.log([max(layer.candidates[i].error, LEAST) for i in order])
        y = np.log([max(found[i], LEAST) for i in order])
        for i, value in zip(order, np.exp(np.interp(x, x[kept], y[kept])), strict=True):
            found[i] = float(value)
        measured += [order[k] for k in kept]
    return found, measured


def rows(table: PriceTable, trials: list[Trial], price: str) -> list[str]:
    """One row a step."""
    scored = [(t.proposal.choices, t.outcome.accuracy_search) for t in trials if t.outcome is not None]
    lost = -np.log([max(accuracy, 1e-3) for _, accuracy in scored])
    exact = [dict(c.prices)[price] for layer in table.layers for c in layer.candidates]
    found = []
    for step in STEPS:
        layers = [thinned(layer, price, step) for layer in table.layers]
        share = sum(len(kept) for _, kept in layers) / sum(not c.dense for x in table.layers for c in x.candidates)
        prices = [value for values, _ in layers for value in values]
        off = np.abs(np.log(np.maximum(prices, LEAST)) - np.log(np.maximum(exact, LEAST)))
        apart = np.exp(np.percentile(off[off > 1e-9], [50, 90])) if step > 1 else np.ones(2)
        sums = [sum(values[i] for (values, _), i in zip(layers, choices, strict=True)) for choices, _ in scored]
        rank = float(spearmanr(sums, lost).statistic)
        line = float(np.corrcoef(np.log(sums), np.log(np.maximum(lost, LEAST)))[0, 1])
        found.append(f"{100 * share:.0f} % | {apart[0]:.2f} | {apart[1]:.2f} | {rank:.3f} | {line:.3f}")
    return found


def main() -> None:
    """Read the studies and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("studies", nargs="+", metavar="STUDY")
    parser.add_argument("--storage", type=Path, required=True, help="where the studies are")
    parser.add_argument("--price", default=PRICE)
    arguments = parser.parse_args()
    print("| study | trials | measured | factor, median | 90 % | Spearman | correlation |")
    print(f"|---|{'---:|' * 6}")
    for name in arguments.studies:
        study = Store(arguments.storage).open(name)
        trials = [trial for trial in study.trials() if trial.outcome is not None and trial.proposal.fidelity in (0, 1)]
        lowest = min(trial.proposal.fidelity for trial in trials)
        trials = [trial for trial in trials if trial.proposal.fidelity == lowest]
        for line in rows(study.setting.table, trials, arguments.price):
            print(f"| {name} | {len(trials)} | {line} |")


if __name__ == "__main__":
    main()
