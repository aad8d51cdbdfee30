"""How much two workers do of twice one worker's work, on real trials of ResNet-20, each with one thread.

Run from the root of the repository on a machine that does nothing else, with two cores or more::

    RANKSEARCH_DATA=folder python -m benchmarks.worker_efficiency [trials] [images]

It prints Markdown. The same random rank maps are scored by one worker, then by two. A rate counts from the moment when
every worker has had its first result, so the start of Ray, of the workers and of the network's preparation is not in
it; what the last worker does alone at the end is.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"

from ranksearch.launch import search
from ranksearch.preparation import versions
from ranksearch.study import Study

SPACE = Path(__file__).parents[1] / "search_spaces" / "resnet20-cifar10.yaml"
TARGET = 0.85


def run(workers: int, trials: int, images: int, storage: Path) -> Study:
    """One search; the second one finds decompositions in the cache."""
    settings = [
        f"resources.workers={workers}",
        "resources.engine=ray",
        "strategy.name=random",
        "strategy.sampler=null",
        f"strategy.batch={trials}",  # one batch: nobody waits for the others within the measurement
        f"budget.trials={trials}",
        f"data.search_images={images}",
        "tracking.enabled=false",
    ]
    return search(SPACE, settings=settings, storage=storage, name=f"workers-{workers}")


def rate(study: Study, workers: int) -> float:
    """Trials a second, once every worker has had a result."""
    ends = sorted(trial.end_ms for trial in study.trials() if trial.state == "COMPLETE")
    return 1000 * (len(ends) - workers) / (ends[-1] - ends[workers - 1])


def outcomes(study: Study) -> list[tuple[float, int]]:
    """What the trials reached, by number."""
    return [(t.outcome.accuracy_search, t.outcome.macs) for t in study.trials() if t.outcome is not None]


def main(trials: int = 40, images: int = 2500) -> None:
    """Measure and print."""
    with tempfile.TemporaryDirectory() as folder:
        studies = {workers: run(workers, trials, images, Path(folder)) for workers in (1, 2)}
        assert outcomes(studies[1]) == outcomes(studies[2]), "two workers must find what one finds"
        rates = {workers: rate(study, workers) for workers, study in studies.items()}
    efficiency = rates[2] / (2 * rates[1])
    print(f"{trials} random rank maps, {images} search images, one thread a worker.\n")
    print("| workers | trials a minute |\n|---|---|")
    for workers, found in rates.items():
        print(f"| {workers} | {60 * found:.1f} |")
    print(f"\nEfficiency {efficiency:.2f} (at least {TARGET} asked for).")
    print("Load of the machine: " + ", ".join(f"{load:.1f}" for load in os.getloadavg()))
    print("; ".join(f"{name} {version}" for name, version in versions().items()))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
