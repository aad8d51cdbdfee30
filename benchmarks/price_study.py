"""Which price, and which cheap accuracy, tells what a rank map is worth after training; prints Markdown.

Run from the root of the repository: ``RANKSEARCH_DATA=folder python -m benchmarks.price_study --results file.jsonl``,
the folder as ``search_spaces/resnet20-cifar10.yaml`` describes it. It goes on where the file of results ends.

Rank maps of ResNet-20, ``tucker2`` and ``spatial-svd`` together, as many at each of three budgets: knapsack fronts of
the predicted error, every layer's (and every format's) error multiplied by a random factor. Half of them with small
factors, good allocations that differ; half with large ones, which come close to allocations at random. Each is scored
on 2,500 search images after more and more work: factors alone; batch norms recalibrated; sequential regression as
a search does it; that and a brief training; and as slices of one network that was trained for all ranks
(``benchmarks/nested_ranks.py``). What all are compared with is the accuracy on the 2,500 report images after a longer
training. Prices are sums over the layers, measured on 256 calibration images, one layer alone changed; "and predicted":
added to the predicted error, both divided by their means.

Spearman's correlation is taken within each budget, where all rank maps have nearly the same MACs, and averaged over the
budgets; the range is that of the averages over 2,000 bootstrap samples of the rank maps (5 to 95 %).
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr

from benchmarks.common import dearest, machine, prepared
from benchmarks.nested_ranks import Nested
from ranksearch.data import to_input
from ranksearch.evaluation import Bench, Evaluator
from ranksearch.factors import threads
from ranksearch.prices import PRICES, measure
from ranksearch.strategies.hull import layer_costs, layer_losses
from ranksearch.strategies.knapsack import predicted_front
from ranksearch.table import PREDICTED, PriceTable
from ranksearch.trial import Task

SPACE = "resnet20-cifar10.yaml"
BUDGETS = (0.7, 0.5, 0.35)
MAPS = 20
"""Rank maps at each budget."""
SPREADS = (0.7, 2.5)
"""Standard deviations of the logarithm of the factors, in turn."""
IMAGES = 256
BRIEF, LONG = 12, 78
"""Steps of training as searches have it by default: 128 images each."""
Prices = Mapping[str, Sequence[Sequence[float]]]
"""Price to layer to candidate to value."""


def tilted_front(table: PriceTable, spread: float, generator: np.random.Generator) -> Sequence[tuple[int, ...]]:
    """The knapsack's rank maps where every layer's and format's predicted error is multiplied by a random factor."""
    tilted = []
    for layer, own in zip(table.layers, layer_losses(table, PREDICTED), strict=True):
        factor = {c.format: np.exp(spread * generator.standard_normal()) for c in layer.candidates}
        tilted.append([float(e * factor[c.format]) for e, c in zip(own, layer.candidates, strict=True)])
    return predicted_front(layer_costs(table, "macs"), tilted)


def rank_maps(table: PriceTable) -> Iterator[tuple[float, tuple[int, ...]]]:
    """Budgets and choices, all different."""
    generator = np.random.default_rng(0)
    seen: set[tuple[int, ...]] = set()
    for budget in BUDGETS:
        made = 0
        while made < MAPS:
            spread = SPREADS[made % len(SPREADS)]
            front = tilted_front(table, spread, generator)
            choices = dearest(table, front, budget)
            if choices not in seen:
                seen.add(choices)
                made += 1
                yield budget, choices


def priced(storage: Path) -> tuple[Bench, Prices]:
    """What evaluates the rank maps, and the prices of all candidates."""
    settings = [
        "formats=[tucker2,spatial-svd]",
        "evaluation.factors=activation-aware",
        "resources.engine=local",
    ]
    network, bench = prepared(SPACE, settings, storage, storage / "weights")
    data, table = network.data, bench.table
    images = to_input(data.calibration[:IMAGES], data)
    found = measure(
        network.model,
        table,
        {key: {name: torch.from_numpy(own) for name, own in arrays.items()} for key, arrays in bench.factors.items()},
        images,
        torch.as_tensor(data.train.labels[:IMAGES]).long(),
        kind="activation-aware",
        cache=storage,
    ).prices
    prices: dict[str, Sequence[Sequence[float]]]
    prices = {price: [[row[price] for row in found[layer.name]] for layer in table.layers] for price in PRICES}
    return bench, {PREDICTED: layer_losses(table, PREDICTED), **prices}


def evaluators(bench: Bench) -> dict[str, Callable[[Task], Any]]:
    """By name, the ways in which a rank map is scored, from the cheapest on."""

    def with_(steps: int = 0, **changes: Any) -> Evaluator:
        own = bench.space.evaluation
        tuned = own.fine_tune.model_copy(update={"steps": steps})
        evaluation = own.model_copy(update={**changes, "fine_tune": tuned})
        return Evaluator(replace(bench, space=bench.space.model_copy(update={"evaluation": evaluation})))

    return {
        "factors alone": with_(refit=False, recalibrate="never"),
        "recalibrated": with_(refit=False, recalibrate="always"),
        "regression": with_(),
        f"regression, {BRIEF} steps": with_(BRIEF),
        "long": with_(LONG),
    }


def evaluate(bench: Bench, path: Path) -> None:
    """Score all rank maps that the file of results lacks."""
    known = {tuple(json.loads(line)["choices"]) for line in path.read_text().splitlines()} if path.exists() else set()
    ways = evaluators(bench)
    for number, (budget, choices) in enumerate(rank_maps(bench.table)):
        if choices in known:
            continue
        row: dict[str, Any] = {"budget": budget, "choices": choices, "macs_ratio": bench.table.macs_ratio(choices)}
        for name, way in ways.items():
            # Kept ones are scored on the report images too.
            outcome = way(Task(number=number, choices=choices, seed=number, keep=name == "long", incumbents=((0, 0),)))
            row[name] = outcome.accuracy if name == "long" else outcome.accuracy_search
            row[f"{name}, seconds"] = outcome.seconds
            if name == "regression":
                row["measured loss"], row["measured divergence"] = outcome.loss, outcome.details["divergence"]
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def slices(bench: Bench, rows: Sequence[dict[str, Any]]) -> float:
    """Add to the rows their accuracy as slices of a network of all ranks; returns the seconds that this one took."""
    started, generator = time.perf_counter(), np.random.default_rng(1)

    def drawn() -> tuple[int, ...]:
        front = tilted_front(bench.table, SPREADS[generator.integers(len(SPREADS))], generator)
        budget = generator.uniform(min(BUDGETS), max(BUDGETS))
        return dearest(bench.table, front, budget)

    nested = Nested(Evaluator(bench))
    plain = tilted_front(bench.table, 0.0, generator)
    nested.train(dearest(bench.table, plain, min(BUDGETS)), drawn)
    trained = time.perf_counter() - started
    for row in rows:
        begun = time.perf_counter()
        row["slices"] = nested.accuracy(tuple(row["choices"]))
        row["slices, seconds"] = time.perf_counter() - begun
    return trained


def correlation(rows: Sequence[Mapping[str, Any]], key: str, sign: float) -> float:
    """Mean over the budgets of Spearman's correlation with the accuracy after the longer training."""
    found = []
    for budget in BUDGETS:
        ours = [row for row in rows if row["budget"] == budget]
        found.append(spearmanr([sign * row[key] for row in ours], [row["long"] for row in ours]).statistic)
    return float(np.nanmean(found))


def mean(rows: Sequence[Mapping[str, Any]], key: str, budget: float) -> str:
    """The mean of an accuracy at one budget, in per cent."""
    return f"{100 * np.mean([row[key] for row in rows if row['budget'] == budget]):.1f}"


def resampled(rows: Sequence[Mapping[str, Any]]) -> Iterator[list[Mapping[str, Any]]]:
    """Bootstrap samples, drawn within each budget."""
    generator = np.random.default_rng(0)
    groups = [[row for row in rows if row["budget"] == budget] for budget in BUDGETS]
    for _ in range(2000):
        yield [group[i] for group in groups for i in generator.integers(len(group), size=len(group))]


def main() -> None:
    """Measure what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, required=True, help="JSON lines; continued where it ends")
    arguments = parser.parse_args()
    started = time.process_time()
    with tempfile.TemporaryDirectory(prefix="ranksearch-benchmark-") as folder, threads(1):
        bench, prices = priced(Path(folder))
        pricing = time.process_time() - started
        evaluate(bench, arguments.results)
        rows = [json.loads(line) for line in arguments.results.read_text().splitlines()]
        trained = slices(bench, rows)
    for row in rows:
        for price, losses in prices.items():
            row[price] = sum(own[i] for own, i in zip(losses, row["choices"], strict=True))
    for price in PRICES:
        whole = {one: np.mean([row[one] for row in rows]) for one in (price, PREDICTED)}
        for row in rows:
            row[f"{price} and {PREDICTED}"] = sum(row[one] / each for one, each in whole.items())
    print(
        "# Which price predicts\n\nPrinted by `python -m benchmarks.price_study`, whose first lines say what is done.\n"
    )
    print(f"{len(rows)} rank maps; {LONG} steps of 128 images after regression are the longer training.")
    for budget in BUDGETS:
        ours = [100 * row["long"] for row in rows if row["budget"] == budget]
        print(
            f"At {budget:.2f} it ends between {min(ours):.1f} and {max(ours):.1f} %, {np.mean(ours):.1f} % on average."
        )
    means = " | ".join(f"mean at {budget:.2f}, %" for budget in BUDGETS)
    print(f"\n| | needs | Spearman | 5 to 95 % | {means} | seconds a rank map |\n|---|---|---:|---:|{'---:|' * 4}")
    samples = list(resampled(rows))
    table: list[tuple[str, str, float, str | None]]
    table = [(price, "labels" if price in ("loss", "drop") else "images", -1.0, None) for price in prices]
    table[0] = (PREDICTED, "factors", -1.0, None)
    table += [(f"{price} and {PREDICTED}", needs, -1.0, None) for price, needs, _, _ in table[1:]]
    table += [
        ("measured divergence", "the network", -1.0, "regression"),
        ("measured loss", "the network", -1.0, "regression"),
    ]
    ways = ("factors alone", "recalibrated", "regression", f"regression, {BRIEF} steps", "slices")
    table += [(way, "the network", 1.0, way) for way in ways]
    found = [(correlation(rows, key, sign), key, needs, sign, way) for key, needs, sign, way in table]
    for value, key, needs, sign, way in sorted(found, key=lambda row: -row[0]):
        low, high = np.quantile([correlation(sample, key, sign) for sample in samples], [0.05, 0.95])
        seconds = f"{np.median([row[f'{way}, seconds'] for row in rows]):.1f}" if way else ""
        shown = " | ".join(mean(rows, key, budget) if key in ways else "" for budget in BUDGETS)
        print(f"| {key} | {needs} | {value:.2f} | {low:.2f} to {high:.2f} | {shown} | {seconds} |")
    print(f"\nThe network of all ranks took {trained:.0f} s to train.")
    print(f"All prices took {pricing:.0f} processor seconds, decompositions and statistics with them.\n")
    print(machine())


if __name__ == "__main__":
    main()
