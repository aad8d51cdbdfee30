"""Latencies predicted from single layers against those of built networks, and what choosing by them gains; Markdown.

Run from the root of the repository: ``python -m benchmarks.latency_prediction [--runtime eager] [--network resnet18]``,
on an otherwise idle machine. ResNet-18 at 224 x 224 and ResNet-20 at 32 x 32, with random weights: a latency does not
depend on them (which candidates are on offer, and which ranks are picked, does: errors are those of random kernels).
One thread, float32, batch norms folded, dense and compressed alike.

First, 20 random rank maps (every layer one of its candidates) are predicted and built. Then, within half of the MACs,
the rank map of least predicted error that is predicted to take at most 1/1.9 of the dense latency is built, beside the
knapsack's over MACs alone at 0.5 and uniform ranks, all timed in one run in turns.
"""

from __future__ import annotations

import argparse
import random
import statistics
from collections.abc import Callable, Sequence

import torch
from torch import nn

from benchmarks.common import machine
from ranksearch.decompositions import FORMATS, compressed_stages, error, prepare
from ranksearch.factors import threads
from ranksearch.latency import LatencyTable, checked, latencies, with_latencies
from ranksearch.models.cifar_resnet import resnet20
from ranksearch.models.resnet import resnet18
from ranksearch.preparation import versions
from ranksearch.space import LatencySpec
from ranksearch.strategies.hull import layer_costs, layer_losses
from ranksearch.strategies.knapsack import predicted_front
from ranksearch.strategies.uniform import Uniform
from ranksearch.surgery import Shape, count_macs, count_params, find_layers, kernel_of
from ranksearch.table import DENSE, Candidate, LayerPrices, PriceTable

NETWORKS: dict[str, tuple[Callable[[], nn.Module], Shape, int]] = {
    "resnet18": (resnet18, (3, 224, 224), 8),
    "resnet20": (resnet20, (3, 32, 32), 1),
}
"""Name to builder, input and the multiple of ranks."""
FORMS = ("tucker2", "spatial-svd", "channel-svd")
RATIOS = (0.125, 0.25, 0.375, 0.5, 0.625, 0.75)
MAPS = 20
SHARE, FASTER = 0.5, 1.9
BATCHES = (1, 16)


def table_of(model: nn.Module, shape: Shape, multiple: int) -> PriceTable:
    """The 3x3 convolutions but the stem, every format at every share of its ranks that costs less than dense."""
    layers = []
    for layer in find_layers(model, shape)[1:]:
        conv = layer.conv
        if conv.kernel != (3, 3):
            continue
        weight, _ = kernel_of(model.get_submodule(layer.name))
        found = []
        for name in FORMS:
            prepared = prepare(FORMATS[name], conv, weight)
            bounds = FORMATS[name].max_rank(conv)
            for ratio in RATIOS:
                ranks = tuple(min(b, max(1, round(ratio * b / multiple)) * multiple) for b in bounds)
                stages = compressed_stages(FORMATS[name], conv, ranks)
                macs, params = sum(s.macs for s in stages), sum(s.params for s in stages)
                if macs < conv.macs:
                    lost = error(FORMATS[name], conv, prepared, ranks)
                    found.append(Candidate(format=name, ranks=ranks, macs=macs, params=params, error=lost))
        unique = sorted(dict.fromkeys(found), key=lambda c: c.macs)
        dense = Candidate(format=DENSE, macs=conv.macs, params=conv.params, error=0.0)
        layers.append(LayerPrices(name=layer.name, conv=conv, candidates=(*unique, dense)))
    macs, params = count_macs(model, shape), count_params(model)
    return PriceTable(
        layers=tuple(layers),
        other_macs=macs - sum(x.conv.macs for x in layers),
        other_params=params - sum(x.conv.params for x in layers),
        dense_macs=macs,
        dense_params=params,
    )


def fast_map(table: PriceTable) -> Sequence[int]:
    """Of the front of latency against error, within ``SHARE`` of the MACs, the best one predicted to be fast enough."""
    assert table.timing is not None
    limit = table.timing.dense_ms / FASTER
    # MACs and latency are two limits; a front over their mix holds what keeps both.
    best: tuple[float, Sequence[int]] = (float("inf"), table.dense)
    losses = layer_losses(table, "predicted")
    times, macs = layer_costs(table, "latency"), layer_costs(table, "macs")
    for weight in (1.0, 0.75, 0.5, 0.25):
        scale = sum(c[-1] for c in times) / sum(c[-1] for c in macs)
        pairs = zip(times, macs, strict=True)
        mixed = [[round(weight * t + (1 - weight) * scale * m) for t, m in zip(*pair, strict=True)] for pair in pairs]
        for choices in predicted_front(mixed, losses):
            lost = sum(own[i] for own, i in zip(losses, choices, strict=True))
            taken = table.latency_ms(choices) or float("inf")
            if lost < best[0] and taken <= limit and table.macs_ratio(choices) <= SHARE:
                best = (lost, choices)
    return best[1]


def report(name: str, runtime: str, batch: int) -> None:
    """Measure one network in one runtime at one batch, and print it."""
    build, shape, multiple = NETWORKS[name]
    torch.manual_seed(0)
    model = build().eval()
    table = table_of(model, shape, multiple)
    spec = LatencySpec.model_validate({"runtime": runtime, "batch_images": batch})
    found: LatencyTable = latencies(model, shape, table, spec, threads=1, versions=versions())
    timed = with_latencies(table, found, faster=True)
    rng = random.Random(0)
    maps = [[rng.randrange(len(layer.candidates)) for layer in table.layers] for _ in range(MAPS)]
    errors = [abs(predicted / ms - 1) for _, predicted, ms in checked(model, shape, table, found, maps)]
    within = predicted_front(layer_costs(table, "macs"), layer_losses(table, "predicted"))
    macs_only = max((m for m in within if table.macs_ratio(m) <= SHARE), key=table.macs)
    uniform = max((m for m in Uniform().maps(table) if table.macs_ratio(m) <= SHARE), key=table.macs)
    fast = fast_map(timed)
    places = [{c: i for i, c in enumerate((x.format, x.ranks) for x in layer.candidates)} for layer in table.layers]
    picked = [timed.layers[i].candidates[c] for i, c in enumerate(fast)]
    own = [place[c.format, c.ranks] for place, c in zip(places, picked, strict=True)]
    rows = {"dense": table.dense, "uniform": uniform, "knapsack over MACs": macs_only, "by latency": own}
    built = checked(model, shape, table, found, list(rows.values()))
    dense_ms = built[0][2]
    losses = layer_losses(table, "predicted")
    print(f"\n## {name}, {runtime}, batch {batch}\n")
    print(
        f"{len(found.layers_ms)} candidates; a layer's gain alone counts {found.scale:.2f} in the network. "
        f"{MAPS} random rank maps: median error {100 * statistics.median(errors):.1f} %, largest "
        f"{100 * max(errors):.1f} %.\n"
    )
    print("| rank map | MACs | sum of errors | predicted, ms | measured, ms | times faster |")
    print("|---|---:|---:|---:|---:|---:|")
    for (label, choices), (share, predicted, ms) in zip(rows.items(), built, strict=True):
        lost = sum(own_losses[i] for own_losses, i in zip(losses, choices, strict=True))
        print(f"| {label} | {share:.3f} | {lost:.2f} | {predicted:.2f} | {ms:.2f} | {dense_ms / ms:.2f} |", flush=True)


def main() -> None:
    """Measure and print all that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", nargs="+", choices=sorted(NETWORKS), default=sorted(NETWORKS))
    parser.add_argument("--runtime", nargs="+", choices=("eager", "onnxruntime"), default=["eager", "onnxruntime"])
    arguments = parser.parse_args()
    print("# Latency: predicted, measured, chosen by\n\nPrinted by `python -m benchmarks.latency_prediction`.")
    with threads(1):
        for name in arguments.network:
            for runtime in arguments.runtime:
                for batch in BATCHES:
                    report(name, runtime, batch)
    print(f"\n{machine()}")


if __name__ == "__main__":
    main()
