"""Whether every candidate must be measured: some are, and the others get prices by interpolation; prints Markdown.

Run from the root of the repository: ``python -m benchmarks.thinned_prices --storage folder STUDY...``, of finished
searches that measured all candidates (``strategy.price_points=null``). Nothing is measured anew: of all but so many
candidates of each layer, format and width the prices are forgotten, and interpolated as a search does. What is told:
how far that is from what was measured (the factor, median and 90th percentile), and how well the sum over the layers
foretells the accuracy of the study's trials on the search images (Spearman, and the correlation of the logarithms),
beside all prices measured.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from scipy.stats import spearmanr

from ranksearch.interpolation import LEAST, interpolated, sampled
from ranksearch.storage import Store
from ranksearch.strategies.auto import PRICE
from ranksearch.table import PriceTable
from ranksearch.trial import Trial

POINTS = (None, 12, 8, 6, 5, 4, 3, 2)


def rows(table: PriceTable, trials: list[Trial], price: str) -> list[str]:
    """One row a step."""
    scored = [(t.proposal.choices, t.outcome.accuracy_search) for t in trials if t.outcome is not None]
    lost = -np.log([max(accuracy, 1e-3) for _, accuracy in scored])
    measured = {layer.name: [dict(c.prices) for c in layer.candidates] for layer in table.layers}
    exact = [row[price] for prices in measured.values() for row in prices]
    found = []
    for points in POINTS:
        some = sampled(table, points)
        kept = {layer.name: [dict(c.prices) for c in layer.candidates] for layer in some.layers}
        layers = [[row[price] for row in prices] for prices in interpolated(table, points, kept).values()]
        share = sum(map(len, kept.values())) / len(exact)
        prices = [value for values in layers for value in values]
        off = np.abs(np.log(np.maximum(prices, LEAST)) - np.log(np.maximum(exact, LEAST)))
        apart = np.exp(np.percentile(off[off > 1e-9], [50, 90])) if points else np.ones(2)
        sums = [sum(values[i] for values, i in zip(layers, choices, strict=True)) for choices, _ in scored]
        rank = float(spearmanr(sums, lost).statistic)
        line = float(np.corrcoef(np.log(sums), np.log(np.maximum(lost, LEAST)))[0, 1])
        shown = points or "all"
        found.append(f"{shown} | {100 * share:.0f} % | {apart[0]:.2f} | {apart[1]:.2f} | {rank:.3f} | {line:.3f}")
    return found


def main() -> None:
    """Read the studies and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("studies", nargs="+", metavar="STUDY")
    parser.add_argument("--storage", type=Path, required=True, help="where the studies are")
    parser.add_argument("--price", default=PRICE)
    arguments = parser.parse_args()
    print("| study | trials | points | measured | factor, median | 90 % | Spearman | correlation |")
    print(f"|---|{'---:|' * 7}")
    for name in arguments.studies:
        study = Store(arguments.storage).open(name)
        trials = [trial for trial in study.trials() if trial.outcome is not None and trial.proposal.fidelity in (0, 1)]
        lowest = min(trial.proposal.fidelity for trial in trials)
        trials = [trial for trial in trials if trial.proposal.fidelity == lowest]
        for line in rows(study.setting.table, trials, arguments.price):
            print(f"| {name} | {len(trials)} | {line} |")


if __name__ == "__main__":
    main()
