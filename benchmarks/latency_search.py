"""A search by latency beside one by MACs on ResNet-20 and CIFAR-10, at equal accuracy; prints Markdown.

Run from the root of the repository, on an otherwise idle machine: ``RANKSEARCH_DATA=folder python -m
benchmarks.latency_search [--runtime onnxruntime] [--batch 16] [--trials 20]``, the folder as
``search_spaces/resnet20-cifar10.yaml`` describes it.

Two searches of the same space, strategy, seed and number of trials, one for accuracy against MACs, the other for
accuracy against the latency predicted on this machine, on one thread. Nothing is trained. All networks on both fronts
are then built with their own weights, batch norms folded, and timed in one run in turns, the dense one among them. For
each drop of accuracy that is allowed (search images, on which fronts are chosen), the table has of each search the
network that was measured to be the fastest: its accuracy on the report images, its MACs, and its latency.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from torch import nn

from benchmarks.common import machine
from ranksearch import load_space
from ranksearch.export import load_compressed, rank_map_of
from ranksearch.factors import threads
from ranksearch.folding import folded
from ranksearch.latency import runner
from ranksearch.latency.measured import timed
from ranksearch.launch import search
from ranksearch.location import located
from ranksearch.preparation import read_network
from ranksearch.study import Study
from ranksearch.trial import Outcome, Trial

SPACE = Path(__file__).parent.parent / "search_spaces" / "resnet20-cifar10.yaml"
SHAPE = (3, 32, 32)
DROPS = (0.5, 1.0, 2.0, 3.0, 5.0)
"""Percentage points on the search images."""
SEARCHES = {"MACs": "[accuracy, macs]", "latency": "[accuracy, latency]"}


def searched(cost: str, arguments: argparse.Namespace, folder: Path) -> Study:
    """The search against one cost; both predict the latency of every trial."""
    settings = [
        f"objectives={SEARCHES[cost]}",
        f"latency={{runtime: {arguments.runtime}, batch_images: {arguments.batch}, threads: 1}}",
        "formats=[tucker2, spatial-svd, channel-svd]",
        f"budget.trials={arguments.trials}",
        "budget.targets=[]",
        "resources.engine=local",
        "tracking.enabled=false",
    ]
    return search(SPACE, settings=settings, storage=folder, name=cost.lower())


def outcome_of(trial: Trial) -> Outcome:
    """The outcome of a trial of a front."""
    assert trial.outcome is not None
    return trial.outcome


def network(study: Study, trial: Trial, dense: nn.Module) -> nn.Module:
    """What a trial of the front built, folded."""
    model = load_compressed(rank_map_of(study, trial), dense, study.weights_folder / str(outcome_of(trial).weights))
    return folded(model, SHAPE).model


def main() -> None:
    """Search, build, time and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runtime", choices=("eager", "compile", "onnxruntime"), default="onnxruntime")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--trials", type=int, default=20)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="ranksearch-benchmark-") as folder, threads(1):
        studies = {cost: searched(cost, arguments, Path(folder)) for cost in SEARCHES}
        dense = read_network(located(load_space(SPACE), SPACE.parent), Path(folder) / "cache").model
        images = torch.randn(arguments.batch, *SHAPE, generator=torch.Generator().manual_seed(0))
        members = [(cost, trial) for cost, study in studies.items() for trial in study.front_trials()]
        models = [folded(dense, SHAPE).model, *(network(studies[cost], trial, dense) for cost, trial in members)]
        dense_ms, *taken = timed([runner(model, images, arguments.runtime) for model in models])
    setting = studies["MACs"].setting
    print("# A search by latency beside one by MACs\n\nPrinted by `python -m benchmarks.latency_search`, whose first")
    print(f"lines say what is done: {arguments.runtime}, batch {arguments.batch}, {arguments.trials} trials each.\n")
    print(f"Dense: {100 * setting.dense['accuracy_search']:.2f} % on the search images, {dense_ms:.2f} ms.\n")
    print("| drop within | search by | search, % | report, % | MACs | ms | times faster than dense |")
    print("|---|---|---:|---:|---:|---:|---:|")
    for drop in DROPS:
        least = setting.dense["accuracy_search"] - drop / 100
        for cost in SEARCHES:
            own = [(ms, t) for (name, t), ms in zip(members, taken, strict=True) if name == cost]
            within = [(ms, t) for ms, t in own if outcome_of(t).accuracy_search >= least]
            if not within:
                print(f"| {drop:g} | {cost} | | | | | none |")
                continue
            ms, trial = min(within, key=lambda pair: pair[0])
            found = outcome_of(trial)
            shown = f"{100 * found.accuracy_search:.2f} | {100 * (found.accuracy or 0):.2f}"
            ratio = found.macs / setting.dense["macs"]
            print(f"| {drop:g} | {cost} | {shown} | {ratio:.3f} | {ms:.2f} | {dense_ms / ms:.2f} |")
    print(f"\n{machine()}")


if __name__ == "__main__":
    main()
