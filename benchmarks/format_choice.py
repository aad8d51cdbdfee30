"""Searching formats and ranks together against searching the ranks of one format; prints Markdown.

Run from the root of the repository: ``python -m benchmarks.format_choice [--space search_spaces/quickstart.yaml]``.
Every search has the same trials, factors, regression and sampler; only ``formats`` differs. The hypervolume is that of
accuracy on the search-validation images against MACs, as shares of the dense network's, over three seeds. A seed draws
the sampler's proposals, and on the digits the splits; seed points (uniform, energy) count as trials.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from statistics import fmean

from benchmarks.common import machine
from ranksearch import Study, search
from ranksearch.errors import BudgetError
from ranksearch.export import choose

SPACE = Path(__file__).parent.parent / "search_spaces" / "quickstart.yaml"
SEEDS = (0, 1, 2)
SINGLE = ("tucker2", "spatial-svd", "channel-svd", "cp", "tkd-cp", "tensor-chain")
BUDGETS = (0.5, 0.35)


def main() -> None:
    """Run all searches and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--space", type=Path, default=SPACE)
    parser.add_argument("--trials", type=int, default=40)
    parser.add_argument(
        "--formats", nargs="+", default=list(SINGLE), help="single formats; together they are searched too"
    )
    parser.add_argument("--set", dest="settings", action="append", default=[], help="changes of the space")
    chosen = parser.parse_args()
    together = ", ".join(chosen.formats)
    started = time.perf_counter()
    print(
        "| formats | hypervolume, mean | least to largest | " + " | ".join(f"best at {b:.2f}" for b in BUDGETS) + " |"
    )
    print("|---|---|---|" + "---|" * len(BUDGETS), flush=True)
    with tempfile.TemporaryDirectory(prefix="ranksearch-benchmark-") as folder:
        for formats in (*chosen.formats, together):
            studies = [
                search(
                    chosen.space,
                    settings=[
                        *chosen.settings,
                        f"formats=[{formats}]",
                        f"budget.trials={chosen.trials}",
                        f"seed={seed}",
                        "tracking.enabled=false",
                    ],
                    storage=folder,
                    name=f"{formats.replace(', ', '-')}-{seed}",
                )
                for seed in SEEDS
            ]
            volumes = [study.hypervolume(study.trials()) for study in studies]
            best = " | ".join(_best(studies, budget) for budget in BUDGETS)
            row = f"| {formats} | {fmean(volumes):.4f} | {min(volumes):.4f} to {max(volumes):.4f} | {best} |"
            print(row, flush=True)
    minutes = (time.perf_counter() - started) / 60
    print(f"\n{chosen.space.stem}: {chosen.trials} trials a search, {len(SEEDS)} seeds; {minutes:.1f} minutes in all.")
    print(machine())


def _best(studies: list[Study], budget: float) -> str:
    """Report accuracy of the trials that are chosen on the search images within a share of the MACs."""
    found = []
    for study in studies:
        try:
            trial = choose(study, max_macs_ratio=budget)
        except BudgetError:
            continue
        if trial.outcome is not None and trial.outcome.accuracy is not None:
            found.append(trial.outcome.accuracy)
    return f"{100 * fmean(found):.2f} %" if found else "-"


if __name__ == "__main__":
    main()
