"""A search of ResNet-20 on CIFAR-10, end to end, without training and with a brief fine-tuning; prints Markdown.

Run from the root of the repository: ``RANKSEARCH_DATA=folder python -m benchmarks.resnet20_cifar10``, the folder as
``search_spaces/resnet20-cifar10.yaml`` describes it. The first search is that of the space, without any training; the
second trains the first one's best maps at three budgets, each for 400 steps of 128 images.
Accuracies are those of the 2,500 report images, which choose nothing.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

from benchmarks.common import machine
from ranksearch import Study, search
from ranksearch.errors import BudgetError
from ranksearch.export import choose, rank_map_of

SPACE = Path(__file__).parent.parent / "search_spaces" / "resnet20-cifar10.yaml"
BUDGETS = (0.75, 0.5, 0.35, 0.25)
"""Largest shares of the dense network's MACs at which the best trial is shown."""
SEED_BUDGETS = (0.5, 0.35, 0.25)


def main() -> None:
    """Run both searches and print the tables."""
    with tempfile.TemporaryDirectory(prefix="ranksearch-benchmark-") as folder:
        started = time.perf_counter()
        plain = search(SPACE, storage=folder, name="plain")
        show("Without training", plain, time.perf_counter() - started)
        maps = []
        for budget in SEED_BUDGETS:
            path = Path(folder, f"{budget}.json")
            rank_map_of(plain, choose(plain, max_macs_ratio=budget)).save(path)
            maps.append(str(path))
        settings = [
            f"budget.trials={len(SEED_BUDGETS)}",
            "evaluation.fine_tune.steps=400",
            "strategy.seeds=[]",
            f"strategy.seed_maps=[{', '.join(maps)}]",
        ]
        started = time.perf_counter()
        trained = search(SPACE, settings=settings, storage=folder, name="trained")
        show("With 400 steps of 128 images each", trained, time.perf_counter() - started)
    dense = plain.setting.dense
    print(f"Dense: {100 * dense['accuracy']:.2f} % on the report images, {dense['macs'] / 1e6:.2f} M MACs.")
    print(machine())


def show(title: str, study: Study, seconds: float) -> None:
    """Print the best trial at each budget, chosen on the search images."""
    trials = study.trials()
    failed = sum(trial.state == "FAIL" for trial in trials)
    print(f"### {title}\n\n{seconds / 60:.1f} minutes, {len(trials)} trials, {failed} failed.\n")
    print("| MACs at most | trial | MACs | report accuracy | search accuracy |\n|---|---|---|---|---|")
    front = study.front().set_index("trial")
    for budget in BUDGETS:
        try:
            row = front.loc[choose(study, max_macs_ratio=budget).number]
        except BudgetError:
            continue
        interval = f"{100 * row['accuracy_low']:.1f} to {100 * row['accuracy_high']:.1f}"
        print(
            f"| {budget:.2f} | {row.name} | {row['macs_ratio']:.3f} | {100 * row['accuracy']:.2f} % ({interval}) "
            f"| {100 * row['accuracy_search']:.2f} % |"
        )
    print(flush=True)


if __name__ == "__main__":
    main()
