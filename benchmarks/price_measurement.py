"""Measured prices of ResNet-20 on CIFAR-10: all candidates at once against one candidate after another; Markdown.

Run from the root of the repository: ``RANKSEARCH_DATA=folder python -m benchmarks.price_measurement``, the folder as
``search_spaces/resnet20-cifar10.yaml`` describes it. Each of the 18 layers gets 24 candidates, 12 ranks of ``tucker2``
and 12 of ``spatial-svd``, spread evenly over the ranks that cost less than dense; 1,024 training images, float32, two
processes of one thread. Ours measures all six prices of all candidates. The peer takes each candidate alone: decompose
the layer afresh, exchange it, run the whole network, compare outputs (divergence, loss and drop only); it is timed on a
random sample of the candidates, one half before ours and the other after, and scaled up. Both sides have the statistics
of the layers given, run the same batches, and their prices are compared. tensorly's ``partial_tucker`` instead of our
decomposition is timed for information. Processor seconds are beside wall seconds: they bear other work on the machine
better. Exits with 1 where ours is not under 180 s, or not 3 times as fast.
"""

from __future__ import annotations

import os
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from tensorly.decomposition import partial_tucker
from torch import Tensor, nn
from torch.nn import functional as F

from ranksearch.calibration import collect
from ranksearch.config import load_space
from ranksearch.conv import Conv
from ranksearch.data import to_input
from ranksearch.decompositions import FORMATS, Statistics, compressed_stages, prepare
from ranksearch.preparation import Network, located, read_network, versions
from ranksearch.prices import measure
from ranksearch.pricing import Factors
from ranksearch.surgery import build_layer, channels_last, kernel_of, replaced
from ranksearch.table import DENSE, Candidate, LayerPrices, PriceTable

SPACE = Path(__file__).parent.parent / "search_spaces" / "resnet20-cifar10.yaml"
FORMS = ("tucker2", "spatial-svd")
RANKS = 12
IMAGES = 1024
BATCH = 32
SAMPLE = 36
LARGEST_SECONDS, LEAST_RATIO = 180.0, 3.0


def candidates(conv: Conv) -> tuple[Candidate, ...]:
    """``RANKS`` candidates of each format, spread evenly over the ranks that cost less than dense, and dense."""
    found = []
    for name in FORMS:
        bounds = FORMATS[name].max_rank(conv)
        grid = [tuple(-(-i * bound // max(bounds)) for bound in bounds) for i in range(1, max(bounds) + 1)]
        cheaper = []
        for ranks in grid:
            stages = compressed_stages(FORMATS[name], conv, ranks)
            macs, params = sum(stage.macs for stage in stages), sum(stage.params for stage in stages)
            if macs < conv.macs:
                cheaper.append(Candidate(format=name, ranks=ranks, macs=macs, params=params, error=0.0))
        found += [cheaper[round(i * (len(cheaper) - 1) / (RANKS - 1))] for i in range(RANKS)]
    found.sort(key=lambda c: c.macs)
    return (*found, Candidate(format=DENSE, macs=conv.macs, params=conv.params, error=0.0))


def table_of(network: Network) -> PriceTable:
    """The price table of the searched layers."""
    selection = network.selection
    convs = {name: selection.layers[name].conv for name in selection.searched}
    return PriceTable(
        layers=tuple(LayerPrices(name=n, conv=conv, candidates=candidates(conv)) for n, conv in convs.items()),
        other_macs=selection.macs - sum(conv.macs for conv in convs.values()),
        other_params=selection.params - sum(conv.params for conv in convs.values()),
        dense_macs=selection.macs,
        dense_params=selection.params,
    )


class Peer:
    """The prices of one candidate alone, from nothing but the dense network and the statistics."""

    def __init__(self, dense: nn.Module, statistics: dict[str, Statistics], images: Tensor, labels: Tensor) -> None:
        self.dense, self.statistics, self.images, self.labels = dense, statistics, images, labels

    @torch.no_grad()
    def __call__(self, task: tuple[str, Conv, Candidate]) -> tuple[float, float, float]:
        """Divergence, increase of the loss and fall of the accuracy."""
        name, conv, candidate = task
        form = FORMATS[candidate.format]
        weight, bias = kernel_of(self.dense.get_submodule(name))
        prepared = prepare(form, conv, weight, self.statistics[name])
        module = build_layer(form, conv, prepared, candidate.ranks, bias, weight.dtype)
        model = channels_last(replaced(self.dense, {name: module}))
        logits = torch.cat([model(images) for images in self.images.split(BATCH)])
        found, dense = logits.double().log_softmax(1), LOGITS[0]
        divergence = float(F.kl_div(found, dense, reduction="batchmean", log_target=True))
        loss = float(F.nll_loss(found, self.labels) - F.nll_loss(dense, self.labels))
        right = float(
            (dense.argmax(1) == self.labels).double().mean() - (found.argmax(1) == self.labels).double().mean()
        )
        return divergence, loss, right


PEER: list[Peer] = []
LOGITS: list[Tensor] = []


def start(peer: Peer) -> None:
    """Prepare a process: one thread, and what the peer needs, which is not timed."""
    torch.set_num_threads(1)
    with torch.no_grad():
        logits = torch.cat([peer.dense(images) for images in peer.images.split(BATCH)])
    PEER[:], LOGITS[:] = [peer], [logits.double().log_softmax(1)]


def alone(task: tuple[str, Conv, Candidate]) -> tuple[float, float, float]:
    """The peer's prices of one candidate."""
    return PEER[0](task)


class Timed:
    """A function that also gives the processor seconds it took."""

    def __init__(self, work: Callable[[Any], Any]) -> None:
        self.work = work

    def __call__(self, item: Any) -> tuple[Any, float]:
        """The value, and the processor seconds."""
        started = time.process_time()
        value = self.work(item)
        return value, time.process_time() - started


class Clock:
    """A parallel ``map`` that adds up wall and processor seconds."""

    def __init__(self, pool: ProcessPoolExecutor) -> None:
        self.pool, self.wall, self.processor = pool, 0.0, 0.0

    def __call__(self, work: Callable[[Any], Any], items: Iterable[Any]) -> list[Any]:
        """All values, in order."""
        started, values = time.perf_counter(), []
        for value, seconds in self.pool.map(Timed(work), items):
            values.append(value)
            self.processor += seconds
        self.wall += time.perf_counter() - started
        return values


def warm(_: int) -> None:
    """Occupy a process for a moment, so that both have started."""
    time.sleep(0.5)


def tensorly_seconds(dense: nn.Module, tasks: Sequence[tuple[str, Conv, Candidate]]) -> float:
    """Mean seconds of a ``partial_tucker`` of the sampled Tucker-2 candidates."""
    chosen = [(name, candidate.ranks) for name, _, candidate in tasks if candidate.format == "tucker2"]
    started = time.process_time()
    for name, (r_in, r_out) in chosen:
        partial_tucker(kernel_of(dense.get_submodule(name))[0].numpy(), rank=[r_out, r_in], modes=[0, 1])
    return (time.process_time() - started) / len(chosen)


def main() -> None:
    """Measure, compare and print."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="ranksearch-benchmark-") as folder:
        network = read_network(located(load_space(SPACE)), Path(folder))
        dense, data, table = network.model, network.data, table_of(network)
        images, labels = to_input(data.train.images[:IMAGES], data), torch.as_tensor(data.train.labels[:IMAGES]).long()
        statistics = collect(dense, table.convs, images.split(256))
        tasks = [(x.name, x.conv, c) for x in table.layers for c in x.candidates if not c.dense]
        sample = random.Random(0).sample(tasks, SAMPLE)
        peer = Peer(dense, statistics, images, labels)
        with ProcessPoolExecutor(2, get_context("forkserver"), initializer=start, initargs=(peer,)) as pool:
            list(pool.map(warm, range(2)))
            apart, ours = Clock(pool), Clock(pool)
            values = apart(alone, sample[: SAMPLE // 2])
            started = time.perf_counter()
            factors: Factors = {}
            for layer in table.layers:
                weight, _ = kernel_of(dense.get_submodule(layer.name))
                for form in FORMS:
                    prepared = prepare(FORMATS[form], layer.conv, weight, statistics[layer.name])
                    factors[layer.name, form, "activation-aware"] = prepared
            cache = Path(folder)
            found = measure(
                dense,
                table,
                factors,
                images,
                labels,
                kind="activation-aware",
                batch_images=BATCH,
                map=ours,
                cache=cache,
            )
            wall = time.perf_counter() - started
            started = time.perf_counter()
            measure(dense, table, factors, images, labels, kind="activation-aware", batch_images=BATCH, cache=cache)
            cached = time.perf_counter() - started
            values += apart(alone, sample[SAMPLE // 2 :])
            tensorly = tensorly_seconds(dense, sample)
        indices = {layer.name: {c: i for i, c in enumerate(layer.candidates)} for layer in table.layers}
        rows = [found[name][indices[name][candidate]] for name, _, candidate in sample]
        differences = [
            max(abs(row[key] - value[i]) for row, value in zip(rows, values, strict=True))
            for i, key in enumerate(("divergence", "loss", "drop"))
        ]
    scale = len(tasks) / SAMPLE
    show(len(tasks), wall, ours.processor, apart.wall * scale, apart.processor * scale, cached, tensorly, differences)
    if wall > LARGEST_SECONDS or apart.processor * scale < LEAST_RATIO * ours.processor:
        sys.exit(1)


def show(
    count: int,
    wall: float,
    processor: float,
    peer_wall: float,
    peer_processor: float,
    cached: float,
    tensorly: float,
    differences: Sequence[float],
) -> None:
    """Print the report."""
    print("# Measured prices: all candidates at once against one after another\n")
    print(
        f"ResNet-20 on CIFAR-10, {count} candidates of 18 layers, {IMAGES} images, float32, two processes of one "
        "thread."
    )
    print("`python -m benchmarks.price_measurement` says in its first lines what is compared.\n")
    print("| | wall, s | processor, s |\n|---|---:|---:|")
    print(f"| ours, all six prices | {wall:.1f} | {processor:.1f} |")
    print(f"| ours again, from the cache | {cached:.2f} | |")
    print(f"| peer, three prices, {SAMPLE} sampled candidates scaled up | {peer_wall:.1f} | {peer_processor:.1f} |")
    print(f"| ratio | {peer_wall / wall:.2f} | {peer_processor / processor:.2f} |\n")
    print(
        f"tensorly takes {1e3 * tensorly:.1f} ms for the `tucker2` decomposition of a sampled candidate (weight-only),"
    )
    print(f"{tensorly * count:.1f} s for {count} of them.\n")
    print("Largest differences of the sampled prices between the two ways: ", end="")
    print(
        ", ".join(f"{d:.1e} ({name})" for d, name in zip(differences, ("divergence", "loss", "drop"), strict=True))
        + ".\n"
    )
    print(
        f"Machine: {os.cpu_count()} cores; " + ", ".join(f"{name} {value}" for name, value in versions().items()) + "."
    )


if __name__ == "__main__":
    main()
