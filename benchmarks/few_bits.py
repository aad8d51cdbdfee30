"""ResNet-20 on CIFAR-10 with factors and activations of few bits, nothing trained; Markdown.

Run from the root of the repository: ``RANKSEARCH_DATA=folder python -m benchmarks.few_bits``, the folder as
``search_spaces/resnet20-cifar10.yaml`` describes it. Of each format the knapsack's rank map by predicted error at half
of the MACs, activation-aware, all factors refitted: in float32, then with weights of 8 and 4 bits and activations of 8,
the layers left dense at 8. Last, what rounding to 4 bits costs when it comes after the regression instead of within it.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from torch import nn

from benchmarks.common import dearest, machine, prepared
from ranksearch.evaluation import Evaluator
from ranksearch.rounding import round_weights, weight_bytes, widths_of
from ranksearch.scoring import as_deployed, reproducible, score
from ranksearch.strategies.knapsack import Knapsack
from ranksearch.table import PriceTable

SPACE = "resnet20-cifar10.yaml"
FORMATS = ("tucker2", "spatial-svd")
TARGET = 0.5


def evaluator(form: str, bits: int, folder: Path) -> Evaluator:
    """What evaluates rank maps of one format with weights of so many bits."""
    settings = [f"formats=[{form}]", "evaluation.factors=activation-aware", "strategy={name: knapsack}"]
    settings += ["resources.engine=local", *([f"quantise={{weight_bits: [{bits}]}}"] if bits < 32 else [])]
    return Evaluator(prepared(SPACE, settings, folder, folder / "weights")[1])


def halved(table: PriceTable) -> tuple[int, ...]:
    """The knapsack's dearest rank map within the target, by the predicted error."""
    return dearest(table, Knapsack().maps(table), TARGET)


def row(form: str, words: str, model: nn.Module, ours: Evaluator, operations: int, size: int) -> None:
    """Print one network's accuracies and costs."""
    bench = ours.bench
    with as_deployed(model, bench.space.quantise, bench.data):
        search, report = (
            score(model, split, bench.data, batch_images=128, device=ours.device)
            for split in (bench.data.search, bench.data.report)
        )
    share = 100 * operations / bench.table.dense_bit_operations
    accuracies = f"{100 * report.accuracy:.2f} | {100 * search.accuracy:.2f} | {report.loss:.3f}"
    print(f"| {form} | {words} | {accuracies} | {share:.2f} | {size / 1e3:.1f} |", flush=True)


def main() -> None:
    """Build, score and print."""
    print("# Factors and activations of few bits\n")
    print(
        "`python -m benchmarks.few_bits` says in its first lines what is compared. One seed; the report images' loss.\n"
    )
    print("| format | weights, activations | report, % | search, % | loss | bit operations, % of float32 dense | kB |")
    print("|---|---|---:|---:|---:|---:|---:|")
    with tempfile.TemporaryDirectory(prefix="ranksearch-benchmark-") as folder, reproducible(1):
        for form in FORMATS:
            for bits in (32, 8, 4):
                ours = evaluator(form, bits, Path(folder))
                table = ours.bench.table
                choices = halved(table)
                picked = {name: c for name, c in table.picked(choices).items() if not c.dense}
                widths = {name: c.bits for name, c in picked.items()}
                model = ours.build(picked).model
                size = weight_bytes(model, widths_of(model, widths, table.other_bits))
                words = "float32" if bits == 32 else f"{bits} bits, 8 bits"
                row(form, words, model, ours, table.bit_operations(choices), size)
                if bits == 32:
                    plain = model
            round_weights(plain, widths_of(plain, widths, 8))
            row(form, "4 bits, 8 bits, rounded after the regression", plain, ours, table.bit_operations(choices), size)
    print(f"\n{machine()}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
