"""Measured prices of ResNet-20 on CIFAR-10: all candidates at once against one candidate after another; Markdown.

Run from the root of the repository: ``RANKSEARCH_DATA=folder python -m benchmarks.price_measurement``, the folder as
``search_spaces/resnet20-cifar10.yaml`` describes it. Each of the 18 layers gets 24 candidates, 12 ranks of ``tucker2``
and 12 of ``spatial-svd``, spread evenly over the ranks that cost less than dense; 1,024 training images, float32, two
processes of one thread. Ours measures all six prices of all candidates, the processes started for it; then only those
that need nothing downstream (``weight``, ``output``, ``second-order``); then only the peer's, on a quarter of the
images and scaled up, so that what every process makes once is counted four times. The peer takes each candidate alone:
decompose the layer afresh, exchange it, run the whole network, compare outputs (divergence, loss and drop only); it is
timed on a random sample of the candidates, one half before ours and the other after, and scaled up. Both sides have the
statistics of the layers given and run the same batches, channels-last, and their prices are compared. A second peer
is the loop as most would write it: PyTorch's default layout, batches of 128, the same decomposition. tensorly's
``partial_tucker`` instead of our decomposition is timed for information. Processor seconds bear other work on the
machine better than wall seconds; over two they are the wall seconds of an idle machine. Exits with 1 where these are
over 180 for ours, or where ours is not twice as fast.

What can be had at most: the network downstream of a layer is 0.47 of this network on average, and convolutions run at
the processor's speed, so the ratio is bounded by about 2.9, of which the candidates themselves and what is compared
take their part.
"""

from __future__ import annotations

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
from scipy.stats import spearmanr
from tensorly.decomposition import partial_tucker
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.common import machine
from ranksearch.calibration import collect
from ranksearch.config import load_space
from ranksearch.conv import Conv
from ranksearch.data import to_input
from ranksearch.decompositions import FORMATS, Statistics, compressed_stages, prepare
from ranksearch.engine.pool import over_processes
from ranksearch.location import located
from ranksearch.preparation import Network, read_network
from ranksearch.prices import Map, Price, measure
from ranksearch.pricing import Factors
from ranksearch.surgery import build_layer, channels_last, kernel_of, replaced
from ranksearch.table import DENSE, Candidate, LayerPrices, PriceTable

SPACE = Path(__file__).parent.parent / "search_spaces" / "resnet20-cifar10.yaml"
FORMS = ("tucker2", "spatial-svd")
RANKS = 12
IMAGES = 1024
BATCH = 32
PLAIN_BATCH = 128
SAMPLE = 36
THREE: tuple[Price, ...] = ("divergence", "loss", "drop")
"""What the peer measures."""
LARGEST_SECONDS, LEAST_RATIO = 180.0, 2.0


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
        self.default = images.contiguous()

    @torch.no_grad()
    def __call__(self, task: tuple[str, Conv, Candidate], plain: bool = False) -> tuple[float, float, float]:
        """Divergence, increase of the loss and fall of the accuracy; ``plain``: default layout, batches of 128."""
        name, conv, candidate = task
        form = FORMATS[candidate.format]
        weight, bias = kernel_of(self.dense.get_submodule(name))
        prepared = prepare(form, conv, weight, self.statistics[name])
        module = build_layer(form, conv, prepared, candidate.ranks, bias, weight.dtype)
        model = replaced(self.dense, {name: module})
        if plain:
            logits = torch.cat([model(images) for images in self.default.split(PLAIN_BATCH)])
        else:
            channels_last(model)
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


def plainly(task: tuple[str, Conv, Candidate]) -> tuple[float, float, float]:
    """The second peer's prices of one candidate."""
    return PEER[0](task, plain=True)


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
    """A parallel ``map`` that adds up wall seconds and the processor seconds of the function."""

    def __init__(self, parallel: Map) -> None:
        self.parallel, self.wall, self.processor = parallel, 0.0, 0.0

    def __call__(self, work: Callable[[Any], Any], items: Iterable[Any]) -> list[Any]:
        """All values, in order."""
        started, values = time.perf_counter(), []
        for value, seconds in self.parallel(Timed(work), items):
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
            apart, plain, ours = Clock(pool.map), Clock(pool.map), Clock(over_processes(2))
            values = apart(alone, sample[: SAMPLE // 2])
            plain(plainly, sample[: SAMPLE // 2])
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
            ).prices
            wall = time.perf_counter() - started
            started = time.perf_counter()
            measure(dense, table, factors, images, labels, kind="activation-aware", batch_images=BATCH, cache=cache)
            cached = time.perf_counter() - started
            local = Clock(over_processes(2))
            some: tuple[Price, ...] = ("weight", "output", "second-order")
            measure(
                dense,
                table,
                factors,
                images,
                kind="activation-aware",
                prices=some,
                batch_images=BATCH,
                map=local,
            )
            alike = Clock(over_processes(2))
            measure(
                dense,
                table,
                factors,
                images[: IMAGES // 4],
                labels[: IMAGES // 4],
                kind="activation-aware",
                prices=THREE,
                batch_images=BATCH,
                map=alike,
            )
            values += apart(alone, sample[SAMPLE // 2 :])
            plain(plainly, sample[SAMPLE // 2 :])
            tensorly = tensorly_seconds(dense, sample)
        indices = {layer.name: {c: i for i, c in enumerate(layer.candidates)} for layer in table.layers}
        rows = [found[name][indices[name][candidate]] for name, _, candidate in sample]
        differences = [
            max(abs(row[key] - value[i]) for row, value in zip(rows, values, strict=True))
            for i, key in enumerate(THREE)
        ]
    scale = len(tasks) / SAMPLE
    peer_wall, peer_processor = apart.wall * scale, apart.processor * scale
    print("# Measured prices: all candidates at once against one after another\n")
    print(f"ResNet-20 on CIFAR-10, {len(tasks)} candidates of 18 layers, {IMAGES} images, float32, two processes of")
    print("one thread. `python -m benchmarks.price_measurement` says in its first lines what is compared.\n")
    plain_wall, plain_processor = plain.wall * scale, plain.processor * scale
    print("| | wall, s | processor, s | peer's processor over this | plain peer's |\n|---|---:|---:|---:|---:|")

    def row(words: str, wall: float, processor: float) -> None:
        over = f"{peer_processor / processor:.2f} | {plain_processor / processor:.2f}"
        print(f"| {words} | {wall:.1f} | {processor:.1f} | {over} |")

    row(f"peer, three prices, {SAMPLE} candidates scaled up", peer_wall, peer_processor)
    row("plain peer, likewise", plain_wall, plain_processor)
    row("ours, all six prices", wall, ours.processor)
    row(f"ours, {', '.join(THREE)}", 4 * alike.wall, 4 * alike.processor)
    row(f"ours, {', '.join(some)}", local.wall, local.processor)
    print(f"| ours, all six prices, from the cache | {cached:.2f} | | | |\n")
    print(f"tensorly takes {1e3 * tensorly:.1f} ms to decompose a sampled `tucker2` candidate (weight-only).\n")
    print("Largest differences of the sampled prices between the two ways: ", end="")
    named = zip(differences, THREE, strict=True)
    print(", ".join(f"{difference:.1e} ({name})" for difference, name in named) + ".\n")
    print("Spearman correlation with the divergence, over all candidates of all layers:", end=" ")
    rows = [row for prices in found.values() for row in prices[:-1]]
    divergence = [row["divergence"] for row in rows]
    keys: tuple[Price, ...] = ("second-order", "loss", "drop", "output", "weight")
    ranked = {key: spearmanr(divergence, [row[key] for row in rows]).statistic for key in keys}
    print(", ".join(f"{key} {value:.3f}" for key, value in ranked.items()) + ".\n")
    print(machine())
    if ours.processor / 2 > LARGEST_SECONDS or peer_processor < LEAST_RATIO * ours.processor:
        sys.exit(1)


if __name__ == "__main__":
    # Under its own name: other processes find nothing of this file in their `__main__`.
    from benchmarks import price_measurement

    price_measurement.main()
