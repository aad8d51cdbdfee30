"""What is left to find, and to choose, among rank maps of equal MACs; prints Markdown.

Run from the root of the repository, after a search by ``auto`` with targets: ``RANKSEARCH_DATA=folder python -m
benchmarks.headroom --study name --storage folder``. Nothing may be trained in that search, and its data must be there.

Looked at are the search's own rank maps with no more than 0.02 of the dense MACs fewer than a target, and others that
its learned prices propose there, drawn from all of the posterior. Every network is built and restored as the search
does, and scored on the search and the report images together: the search knew only the former of its own. "Of the
first" is the mean of those that it tried before it learned, "found" what the search has within the target.

By how much networks *differ* is the standard deviation of their accuracies; "without chance" that is subtracted which
the images would bring about if networks did not differ (paired: all see the same images). How well one is *chosen*:
eight of them, drawn at random, are judged on one half of the images, and the one that is chosen is scored on the other
half; 400 times. Told is how many points more it has than the eight's mean. The divergence (Kullback-Leibler) and the
agreement are those with the dense network, and need no labels.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from benchmarks.auto_ablation import shown
from benchmarks.common import benched, machine
from ranksearch.data import to_input
from ranksearch.evaluation import Bench, Evaluator
from ranksearch.scoring import reproducible
from ranksearch.storage import Store
from ranksearch.strategies import learned
from ranksearch.strategies.auto import PRICE
from ranksearch.strategies.ladder import Choices
from ranksearch.study import Study
from ranksearch.trial import best_within

NEAR = 0.02
"""Share of the dense MACs by which a rank map may be cheaper than the target."""
DRAWS = 20
"""Times as many draws as proposals are wanted, at most."""
CANDIDATES, SPLITS = 8, 400
Floats = NDArray[np.float64]


def proposals(study: Study, target: float, wanted: int) -> list[Choices]:
    """The search's own rank maps near a target, the first proposals first, and ``wanted`` others."""
    table, trials = study.setting.table, [trial for trial in study.trials() if trial.outcome is not None]
    known = {trial.proposal.choices: None for trial in trials}
    own = [choices for choices in known if target - NEAR < table.macs_ratio(choices) <= target]
    model = learned.LearnedPrices(
        table, trials, price=PRICE, cost="macs", objectives=tuple(study.space.objectives), worst_loss=np.inf
    )

    def drawn(number: int) -> Choices | None:
        rng = np.random.default_rng([study.space.seed, number])
        weights = model.mean + model.root @ rng.standard_normal(len(model.mean))
        found = model.best(weights, known.keys(), target=target)
        if found is None or not target - NEAR < table.macs_ratio(found[0]) <= target:
            return None
        known[found[0]] = None
        return found[0]

    more = (choices for number in range(DRAWS * wanted) if (choices := drawn(number)) is not None)
    return [*own, *islice(more, wanted)]


@torch.no_grad()
def log_probabilities(model: nn.Module, bench: Bench, device: torch.device) -> Floats:
    """``(N, classes)``: of the search images, then the report images."""
    size, found = bench.space.evaluation.batch_images, []
    for split in (bench.data.search, bench.data.report):
        for start in range(0, len(split.labels), size):
            outputs = model(to_input(split.images[start : start + size], bench.data, device))
            found.append(outputs.double().log_softmax(1).cpu().numpy())
    return np.concatenate(found)


def spread(right: NDArray[np.bool_]) -> float:
    """Standard deviation of the accuracies ``(networks, images)`` less what is chance in the images."""
    apart = right - right.mean(0)
    networks, images = right.shape
    chance = apart.var(axis=1, ddof=1).mean() / images
    return float(np.sqrt(max(apart.mean(1).var(ddof=1) - chance * networks / (networks - 1), 0.0)))


def gained(
    right: NDArray[np.bool_], criteria: Mapping[str, Callable[[NDArray[np.int64], NDArray[np.int64]], Floats]]
) -> dict[str, float]:
    """How much more accurate than the mean of eight the one is that each criterion chooses; mean over the splits."""
    rng, found = np.random.default_rng(0), {name: list[float]() for name in criteria}
    networks, images = right.shape
    for _ in range(SPLITS):
        some = rng.choice(networks, size=min(CANDIDATES, networks), replace=False)
        shuffled = rng.permutation(images)
        judged, scored = shuffled[: images // 2], shuffled[images // 2 :]
        accuracies = right[np.ix_(some, scored)].mean(1)
        for name, criterion in criteria.items():
            found[name].append(accuracies[int(criterion(some, judged).argmax())] - accuracies.mean())
    return {name: float(np.mean(values)) for name, values in found.items()}


def show(
    target: float, logs: Floats, dense: Floats, labels: NDArray[np.int64], first: Sequence[int], found: int | None
) -> str:
    """One target's row; ``first`` and ``found`` are places among the networks."""
    right = logs.argmax(2) == labels
    own = logs[:, np.arange(len(labels)), labels]
    divergence = (np.exp(dense) * (dense - logs)).sum(2)
    agree = logs.argmax(2) == dense.argmax(1)
    gains = gained(
        right,
        {
            "accuracy": lambda some, images: right[np.ix_(some, images)].mean(1),
            "loss": lambda some, images: own[np.ix_(some, images)].mean(1),
            "divergence": lambda some, images: -divergence[np.ix_(some, images)].mean(1),
            "agreement": lambda some, images: agree[np.ix_(some, images)].mean(1),
        },
    )
    each = 100 * right.mean(1)
    begun = shown([float(np.mean([each[i] for i in first])) if first else np.nan], 2)
    ended = shown([np.nan if found is None else float(each[found])], 2)
    cells = [
        *(each.mean(), each.max(), each.std(ddof=1), 100 * spread(right)),
        *(100 * gain for gain in gains.values()),
    ]
    return f"| {target:.2f} | {len(each)} | {begun} | {ended} | {' | '.join(f'{cell:.2f}' for cell in cells)} |"


def main() -> None:
    """Build, score and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--study", required=True)
    parser.add_argument("--storage", type=Path, required=True)
    parser.add_argument("--targets", type=float, nargs="+", help="by default those of the study")
    parser.add_argument("--more", type=int, default=24, help="rank maps that are proposed anew, a target")
    given = parser.parse_args()
    study = Store(given.storage).open(given.study)
    with tempfile.TemporaryDirectory(prefix="ranksearch-benchmark-") as folder, reproducible(1):
        _, bench = benched(study.space, given.storage / "cache", Path(folder))
        evaluator, table, data = Evaluator(bench), bench.table, bench.data
        labels = np.concatenate([data.search.labels, data.report.labels])
        dense = log_probabilities(evaluator.dense, bench, evaluator.device)
        print(f"`{given.study}`: dense {100 * (dense.argmax(1) == labels).mean():.2f} % of {len(labels)} images\n")
        print("| target | networks | of the first | found | mean | best | they differ by | without chance ", end="")
        print("| chosen by accuracy | by loss | by divergence | by agreement |\n|---|" + "---:|" * 11, flush=True)
        begun = {
            trial.proposal.choices for trial in study.trials() if trial.index < 2 * len(study.space.budget.targets)
        }
        for target in given.targets or study.space.budget.targets:
            maps, found = proposals(study, target, given.more), []
            for choices in maps:
                picked = {name: c for name, c in table.picked(choices).items() if not c.dense}
                found.append(log_probabilities(evaluator.build(picked).model, bench, evaluator.device))
            if len(found) > 1:
                first = [i for i, choices in enumerate(maps) if choices in begun]
                best = best_within(study.front_trials(), target * table.dense_macs)
                ours = maps.index(best.proposal.choices) if best and best.proposal.choices in maps else None
                print(show(target, np.array(found), dense, labels, first, ours), flush=True)
    print(f"\n{machine()}")


if __name__ == "__main__":
    main()
