"""Temperatures and learning rates of the brief training of one compressed network; prints Markdown.

Run from the root of the repository: ``RANKSEARCH_DATA=folder python -m benchmarks.brief_training --space
resnet20-cifar10.yaml --formats spatial-svd --target 0.35 --steps 78``, the folder as that space describes it. The
network is the knapsack's by predicted error, of activation-aware factors, all refitted. Each recipe trains a copy of
it on the same batches by Adam with frozen batch norms. Accuracies are told of the search and of the report images, the
loss of both together.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import time
from pathlib import Path

import torch
from torch import nn

from benchmarks.common import dearest, prepared
from ranksearch.data import to_input
from ranksearch.evaluation import Evaluator
from ranksearch.scoring import reproducible, score
from ranksearch.space import FineTuneSpec
from ranksearch.strategies.knapsack import Knapsack
from ranksearch.training import fine_tune

RECIPES = ("2:0.0003", "2:0.001", "4:0.0003", "8:0.0003", "8:0.001", "16:0.001")


def scores(evaluator: Evaluator, model: nn.Module) -> str:
    """Accuracies on the search and the report images, and the loss on both, as cells of the table."""
    data = evaluator.data
    found = [score(model, s, data, batch_images=128, device=evaluator.device) for s in (data.search, data.report)]
    return f"{100 * found[0].accuracy:.2f} | {100 * found[1].accuracy:.2f} | {(found[0].loss + found[1].loss) / 2:.3f}"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description="Compare recipes of brief training.")
    parser.add_argument("--space", default="resnet20-cifar10.yaml")
    parser.add_argument("--formats", default="spatial-svd")
    parser.add_argument("--target", type=float, default=0.35)
    parser.add_argument("--steps", type=int, default=78)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--recipes", nargs="+", default=RECIPES, metavar="TEMPERATURE:RATE")
    given = parser.parse_args()
    settings = [f"formats=[{given.formats}]", "evaluation.factors=activation-aware", "strategy.name=knapsack"]
    settings += ["strategy.price=predicted", "strategy.seeds=[]", "resources.engine=local"]
    with tempfile.TemporaryDirectory(prefix="ranksearch-benchmark-") as folder, reproducible(1):
        _, bench = prepared(given.space, settings, Path(folder), Path(folder) / "study")
        evaluator, table = Evaluator(bench), bench.table
        choices = dearest(table, Knapsack().maps(table), given.target)
        restored = evaluator.build({k: c for k, c in table.picked(choices).items() if not c.dense}).model
        print(f"{given.space}, {given.formats}, {table.macs_ratio(choices):.3f} of the MACs, {given.steps} steps\n")
        print("| temperature | rate | search, % | report, % | loss | minutes |\n|---|---|---|---|---|---|", flush=True)
        print(f"| | not trained | {scores(evaluator, restored)} | |", flush=True)
        for recipe in given.recipes:
            temperature, rate = map(float, recipe.split(":"))
            model, started = copy.deepcopy(restored), time.perf_counter()
            fine_tune(
                model,
                evaluator.dense,
                bench.data.train,
                lambda split, index: to_input(split.images[index.numpy()], bench.data, evaluator.device),
                FineTuneSpec(steps=given.steps, temperature=temperature, learning_rate=rate),
                bench.data.augment,
                seed=given.seed,
                dtype=torch.float32,
            )
            minutes = (time.perf_counter() - started) / 60
            print(f"| {temperature:g} | {rate:g} | {scores(evaluator, model)} | {minutes:.1f} |", flush=True)


if __name__ == "__main__":
    main()
