"""What rungs bring where candidates are trained, on ResNet-20 and CIFAR-10; prints Markdown.

Run from the root of the repository: ``RANKSEARCH_DATA=folder python -m benchmarks.rungs --storage folder``, the folder
of data as ``search_spaces/resnet20-cifar10.yaml`` describes it. Trials that the storage has are not run again.

Both searches are that space's with its four targets, in ``auto``, 78 steps of training for a candidate: one trains
every candidate, the other has ``strategy.rungs: [0]``, which scores them untrained and trains a quarter. The search
without rungs is cut where its trials have cost as much as all of the other's. A trial that trains costs as many of the
others as the median of its seconds says, both of the search with rungs, where they alternate, so that what else the
machine does weighs on both alike. What is compared is what was trained to the end: hypervolume on the search images,
and report accuracies of what those choose within the targets.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from statistics import median

from benchmarks.auto_ablation import SPACE, TARGETS, shown
from ranksearch.launch import resume, search
from ranksearch.preparation import versions
from ranksearch.storage import Store
from ranksearch.study import Study
from ranksearch.trial import Trial, best_within

STEPS = 78
RUNGS = "rungs: [0]"
EVERY = "every candidate trained"
TRIALS = {RUNGS: 60, EVERY: 21}
"""Enough of the second to cost as much as the first."""


def searched(words: str, seed: int, storage: Path) -> Study:
    """The study of one of the two and a seed."""
    name, trials = f"{words.split(':')[0].replace(' ', '-')}-{seed}", TRIALS[words]
    store = Store(storage)
    if name in store.names():
        found = store.open(name)
        if sum(trial.state != "RUNNING" for trial in found.trials()) >= trials:
            return found
        return resume(name, storage=storage, trials=trials)
    settings = [
        f"strategy.rungs={[0] if words == RUNGS else []}",
        f"budget.trials={trials}",
        f"seed={seed}",
        f"evaluation.fine_tune.steps={STEPS}",
        "evaluation.report=all",
        "evaluation.factors=activation-aware",
        "resources.engine=local",
        "tracking.enabled=false",
    ]
    return search(SPACE, settings=settings, storage=storage, name=name)


def price_of_training(trials: Sequence[Trial]) -> float:
    """How many untrained trials a trained one costs."""
    seconds = [
        [t.outcome.seconds for t in trials if t.outcome is not None and (t.proposal.fidelity == 1) == trained]
        for trained in (False, True)
    ]
    return median(seconds[1]) / median(seconds[0])


def within(trials: Sequence[Trial], cost: float, training: float) -> list[Trial]:
    """The first trials, as many as cost so many untrained ones at most."""
    costs = accumulate(training if trial.proposal.fidelity == 1 else 1.0 for trial in trials)
    return [trial for trial, spent in zip(trials, costs, strict=True) if spent <= cost * (1 + 1e-9)]


def main() -> None:
    """Search what is missing and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--storage", type=Path, required=True, help="where the studies are kept")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments = parser.parse_args()
    pairs = [{words: searched(words, seed, arguments.storage) for words in TRIALS} for seed in arguments.seeds]
    print("# What rungs bring\n\n`python -m benchmarks.rungs` says in its first lines what is done.\n")
    training = [price_of_training(pair[RUNGS].trials()) for pair in pairs]
    print(f"A trained trial cost {shown(training, 1)} untrained ones.\n")
    print(f"| cost | | trials | trained | {' | '.join(f'{t:.2f}' for t in TARGETS)} | hypervolume |")
    print(f"|---|---|{'---:|' * 7}")
    for share in (0.5, 1.0):
        for words in TRIALS:
            made, counts, volumes = [], [], []
            accuracies: list[list[float]] = [[] for _ in TARGETS]
            for pair, price in zip(pairs, training, strict=True):
                levels = [trial.proposal.fidelity for trial in pair[RUNGS].trials()]
                cost = share * (levels.count(0.0) + price * levels.count(1.0))
                tried = within(pair[words].trials(), cost, price)
                whole = [trial for trial in tried if trial.proposal.fidelity == 1]
                made.append(float(len(tried)))
                counts.append(float(len(whole)))
                volumes.append(pair[words].hypervolume(whole))
                for found, target in zip(accuracies, TARGETS, strict=True):
                    best = best_within(whole, target * pair[words].setting.dense["macs"])
                    told = None if best is None or best.outcome is None else best.outcome.accuracy
                    found.append(float("nan") if told is None else 100 * told)
            cells = [shown(each, 2) for each in accuracies]
            cells = ["half" if share < 1 else "all", words, shown(made, 0), shown(counts, 0), *cells, shown(volumes, 4)]
            print(f"| {' | '.join(cells)} |")
    print(f"\n{', '.join(f'{name} {value}' for name, value in versions().items())}.")


if __name__ == "__main__":
    main()
