"""Refitting the last factor of every layer against refitting all of them, ResNet-20, no training; prints Markdown.

Run from the root of the repository: ``RANKSEARCH_DATA=folder python -m benchmarks.all_factors``, the folder as
``search_spaces/resnet20-cifar10.yaml`` describes it. Of each format alone the knapsack's rank maps (by predicted
error) within 0.70, 0.50 and 0.35 of the MACs, activation-aware, built twice on the same 512 images. Divergence from
the dense outputs on 512 other training images; accuracy and loss on the 2,500 report images.
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import replace
from pathlib import Path

from benchmarks.common import dearest, machine, prepared
from ranksearch.evaluation import Evaluator
from ranksearch.scoring import reproducible, score
from ranksearch.strategies.knapsack import Knapsack

SPACE = "resnet20-cifar10.yaml"
FORMS = ("tucker2", "spatial-svd", "cp")
TARGETS = (0.70, 0.50, 0.35)


def rows(form: str, folder: Path) -> None:
    """Print the rows of one format."""
    settings = [f"formats=[{form}]", "evaluation.factors=activation-aware", "resources.engine=local"]
    _, bench = prepared(SPACE, settings, folder, folder / form)
    maps = list(Knapsack().maps(bench.table))
    for target in TARGETS:
        choices = dearest(bench.table, maps, target)
        picked = {name: c for name, c in bench.table.picked(choices).items() if not c.dense}
        found = []
        for stages in ("last", "all"):
            evaluation = bench.space.evaluation.model_copy(update={"refit_stages": stages})
            evaluator = Evaluator(replace(bench, space=bench.space.model_copy(update={"evaluation": evaluation})))
            with reproducible(1):
                evaluator.build(picked)  # fits of the format are in the cache from here on
                started = time.process_time()
                built = evaluator.build(picked)
                taken = time.process_time() - started
                report = score(built.model, bench.data.report, bench.data, batch_images=128, device=evaluator.device)
            found += [f"{built.divergence:.3f}", f"{100 * report.accuracy:.2f}", f"{report.loss:.3f}", f"{taken:.1f}"]
        print(f"| {form} | {bench.table.macs_ratio(choices):.3f} | {' | '.join(found)} |", flush=True)


def main() -> None:
    """Print the table."""
    print("# Refitting the last factor, and all of them\n\nPrinted by `python -m benchmarks.all_factors`.\n")
    print("| | | last factor | | | | all factors | | | |\n|---|---|---|---|---|---|---|---|---|---|")
    columns = "divergence | accuracy, % | loss | build, CPU s"
    print(f"| format | MACs | {columns} | {columns} |")
    with tempfile.TemporaryDirectory(prefix="ranksearch-benchmark-") as folder:
        for form in FORMS:
            rows(form, Path(folder))
    print(f"\n{machine()}")


if __name__ == "__main__":
    main()
