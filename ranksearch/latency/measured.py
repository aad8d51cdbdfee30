"""Latencies of every candidate, measured alone on the target, and of whole networks predicted from them.

Ours. Each different (geometry, format, ranks) is timed once, alone, with random weights; so are the dense layers, and
the whole dense network, its batch norms folded. A network then takes

    t(m) = t(dense) + a * sum over layers of (t_l(m_l) - t_l(dense)).

A layer alone has its input in the cache and pays for being called, so ``a`` is not quite 1: it is fitted to whole
networks that are really built and timed, one at each of a few budgets (least squares through the dense network).

Everything is timed in rounds, one after the other, so that a slow spell of the machine meets all alike; of a round the
median counts, and of the rounds the least median: what else a machine does only ever adds.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ranksearch.conv import Conv
from ranksearch.decompositions import FORMATS, compressed_stages
from ranksearch.errors import LatencyError
from ranksearch.factors import threads as thread_limit
from ranksearch.folding import folded
from ranksearch.latency.record import Key, LatencyTable
from ranksearch.latency.runtimes import Runtime, runner
from ranksearch.space import LatencySpec
from ranksearch.stages import build_stage
from ranksearch.surgery import Shape, replaced, run_one
from ranksearch.table import Candidate, PriceTable, Timing

ROUNDS = 3
"""How often everything is timed."""
REPEATS, SECONDS = 5, 0.01
"""Runs of one thing in a round at least, and how long at least."""
CHECKS = (0.7, 0.5, 0.35)
"""Shares of the MACs of the networks that are built and timed."""
_DEPENDS_ON = ("torch", "python", "platform")

Progress = Callable[[str, int, int], None]


def device_name(device: torch.device) -> str:
    """What latencies depend on most: the name of the GPU, or of the processor and its cores."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    except OSError:
        pass
    return f"{name}, {os.cpu_count()} cores"


def latencies(
    model: nn.Module,
    input_shape: Shape,
    table: PriceTable,
    spec: LatencySpec,
    *,
    threads: int,
    versions: Mapping[str, str],
    rank_multiple: int = 1,
    cache: Path | None = None,
    progress: Progress | None = None,
) -> LatencyTable:
    """Every candidate of ``table`` and a few whole networks, timed on the device of ``model``, or as they were timed.

    Args:
        model: the dense network in float32; it is not changed.
        input_shape: of one image.
        table: layers and candidates.
        spec: runtime and batch, or the file of a table that was measured before.
        threads: CPU threads, where ``spec`` names none.
        versions: of the packages; what latencies depend on is kept with the table.
        rank_multiple: of the candidates' ranks, kept with the table.
        cache: folder where the table is kept for this device, these versions and candidates.
        progress: told what is timed, how much of it is done, and of how much.

    Raises:
        LatencyError: the runtime cannot run the network; or there is no such file, or it was measured otherwise than
            ``spec`` says.
    """
    if spec.table is not None:
        return _brought(Path(spec.table), spec)
    device, threads = next(model.parameters()).device, spec.threads or threads
    versions = relevant(versions, spec)
    keys = list(dict.fromkeys(key for layer in _layers(table) for key in layer))
    about = [*target(spec, threads, device, versions), list(input_shape), rank_multiple, _work(model, input_shape)]
    file = None if cache is None else cache / "latencies" / f"{_digest(about, table)}.json"
    if file is not None and file.exists():
        try:
            return LatencyTable.load(file)
        except LatencyError:
            pass  # measured again
    with thread_limit(threads):
        alone = _alone(keys, spec, threads, device, progress)
        maps = [table.dense, *_checked(table)]
        whole = _whole(model, input_shape, table, maps, spec, threads, progress)
    savings = [_saving(table, choices, alone) for choices in maps]
    gained = [whole[0] - ms for ms in whole]
    square = sum(saving * saving for saving in savings)
    scale = sum(s * g for s, g in zip(savings, gained, strict=True)) / square if square > 0 else 1.0
    # Networks that come out no faster say nothing of single layers; and no layers take longer than the network.
    layers = sum(alone[conv, "dense", ()] for conv in table.convs.values())
    scale = min(scale if scale > 0 else 1.0, whole[0] / layers)
    found = LatencyTable(
        runtime=spec.runtime,
        batch_images=spec.batch_images,
        threads=threads,
        device=device_name(device),
        dense_ms=whole[0],
        scale=scale,
        layers_ms=alone,
        checks=tuple(
            (table.macs_ratio(choices), whole[0] - scale * saving, ms)
            for choices, saving, ms in zip(maps, savings, whole, strict=True)
        ),
        versions=dict(versions),
        rank_multiple=rank_multiple,
    )
    if file is not None:
        found.save(file)
    return found


def relevant(versions: Mapping[str, str], spec: LatencySpec) -> dict[str, str]:
    """Those of the versions that latencies depend on."""
    found = {name: version for name, version in versions.items() if name in _DEPENDS_ON}
    if spec.runtime == "onnxruntime":
        with suppress(importlib.metadata.PackageNotFoundError):  # builds of other names; without any, timing tells
            found["onnxruntime"] = importlib.metadata.version("onnxruntime")
    return found


def target(spec: LatencySpec, threads: int, device: torch.device, versions: Mapping[str, str]) -> list[Any]:
    """What is timed on, in JSON types."""
    return [device_name(device), spec.runtime, spec.batch_images, threads, [list(v) for v in sorted(versions.items())]]


def checked(
    model: nn.Module,
    input_shape: Shape,
    table: PriceTable,
    found: LatencyTable,
    maps: Sequence[Sequence[int]],
    progress: Progress | None = None,
) -> list[tuple[float, float, float]]:
    """Rank maps whose networks are built and timed: share of the MACs, predicted and measured milliseconds of each.

    Args:
        model: the dense network, on the device to measure on.
        input_shape: of one image.
        table: the layers and their candidates.
        found: their latencies.
        maps: choices of the table.
        progress: told what is timed.
    """
    spec = LatencySpec.model_validate({"runtime": found.runtime, "batch_images": found.batch_images})
    with thread_limit(found.threads):
        measured = _whole(model, input_shape, table, maps, spec, found.threads, progress)
    return [
        (table.macs_ratio(choices), found.dense_ms - found.scale * _saving(table, choices, found.layers_ms), ms)
        for choices, ms in zip(maps, measured, strict=True)
    ]


def _brought(path: Path, spec: LatencySpec) -> LatencyTable:
    """A table from elsewhere, checked against what the space says of it."""
    found = LatencyTable.load(path)
    for name in ("runtime", "batch_images", "threads"):
        wanted, there = getattr(spec, name), getattr(found, name)
        if name in spec.model_fields_set and wanted is not None and wanted != there:
            raise LatencyError(
                f"$.latency.{name} must be what {path} was measured with, found {wanted} here and {there} there. Leave "
                "it out, or measure again."
            )
    return found


def with_latencies(table: PriceTable, latencies: LatencyTable, *, faster: bool) -> PriceTable:
    """The price table with the latency of every candidate.

    Args:
        table: the price table.
        latencies: of all its candidates.
        faster: leave out candidates that are no faster than the dense layer.

    Raises:
        LatencyError: a candidate is missing: the latencies are of another space.
    """
    wanted = [key for layer in _layers(table) for key in layer]
    missing = [key for key in wanted if key not in latencies.layers_ms]
    if missing:
        conv, form, ranks = missing[0]
        raise LatencyError(
            f"a latency table must have every candidate of the space, found none of {len(set(missing))} of "
            f"{len(set(wanted))}, such as {form} {ranks} of a layer {conv.in_channels} -> {conv.out_channels}. Measure "
            "it with this space: `ranksearch latency`."
        )

    def ms(conv: Conv, candidate: Candidate) -> float:
        return latencies.scale * latencies.layers_ms[conv, candidate.format, candidate.ranks]

    layers, other = [], latencies.dense_ms
    for layer in table.layers:
        timed = [replace(c, latency_ms=ms(layer.conv, c)) for c in layer.candidates]
        dense = timed[-1].latency_ms or 0.0
        kept = [c for c in timed[:-1] if not faster or (c.latency_ms or 0.0) < dense]
        layers.append(replace(layer, candidates=(*kept, timed[-1])))
        other -= dense
    pinned = []
    for name, conv, candidate in table.pinned:
        pinned.append((name, conv, replace(candidate, latency_ms=ms(conv, candidate))))
        other += ms(conv, candidate) - latencies.scale * latencies.layers_ms[conv, "dense", ()]
    about = {name: getattr(latencies, name) for name in ("runtime", "batch_images", "threads", "device")}
    timing = Timing(dense_ms=latencies.dense_ms, other_ms=other, **about)
    return replace(table, layers=tuple(layers), pinned=tuple(pinned), timing=timing)


def _layers(table: PriceTable) -> list[list[Key]]:
    """The keys of every layer's candidates, and of the pinned layers' one with the dense one."""
    searched = [[(x.conv, c.format, c.ranks) for c in x.candidates] for x in table.layers]
    return searched + [[(conv, c.format, c.ranks), (conv, "dense", ())] for _, conv, c in table.pinned]


class _Operators(TorchDispatchMode):
    """Keeps which operators run, on tensors of which shapes."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen = hashlib.sha256()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        shapes = [tuple(value.shape) for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        self.seen.update(f"{func} {shapes}\n".encode())
        return func(*args, **(kwargs or {}))


def _work(model: nn.Module, input_shape: Shape) -> str:
    """Hash of what a network computes on an image, whatever its weights: layers alike may stand in any network."""
    operators = _Operators()
    with operators:
        run_one(model, input_shape)
    return operators.seen.hexdigest()


def _digest(about: Sequence[Any], table: PriceTable) -> str:
    rows = [[conv.to_json(), form, ranks] for layer in _layers(table) for conv, form, ranks in layer]
    return hashlib.sha256(json.dumps([about, rows, table.dense_macs], sort_keys=True).encode()).hexdigest()[:32]


def _checked(table: PriceTable) -> list[tuple[int, ...]]:
    """Different rank maps, every layer within the same share of its MACs, near each of ``CHECKS``."""
    found: list[tuple[int, ...]] = []
    for share in CHECKS:
        choices = tuple(layer.within(share * layer.conv.macs) for layer in table.layers)
        if choices not in found and choices != table.dense:
            found.append(choices)
    return found


def _saving(table: PriceTable, choices: Sequence[int], alone: Mapping[Key, float]) -> float:
    """Milliseconds that the layers save, each alone."""
    return sum(
        alone[conv, "dense", ()] - alone[conv, c.format, c.ranks]
        for conv, c in ((table.convs[name], c) for name, c in table.picked(choices).items())
    )


def _alone(
    keys: Sequence[Key], spec: LatencySpec, threads: int, device: torch.device, progress: Progress | None
) -> dict[Key, float]:
    """Milliseconds of every candidate alone."""
    runs = [layer_runner(key, spec.runtime, spec.batch_images, threads, device) for key in keys]

    def told(done: int, total: int) -> None:
        if progress is not None:
            progress("timing candidates", done, total)

    return dict(zip(keys, timed(runs, told), strict=True))


def layer_runner(key: Key, runtime: Runtime, batch: int, threads: int, device: torch.device) -> Callable[[], Any]:
    """Runs one layer in one format alone, with random weights."""
    conv, form, ranks = key
    # A bias always: batch norms are folded.
    stages = [replace(conv, bias=True)] if form == "dense" else compressed_stages(FORMATS[form], conv, ranks)
    # A linear layer is a 1x1 convolution of as many positions as it is applied to.
    positions = () if conv.size == (1, 1) else (conv.size[0],)
    shape = (batch, *positions, conv.in_channels) if conv.linear else (batch, conv.in_channels, *conv.size)
    return runner(_random(stages, device), _noise(shape, device), runtime, threads=threads)


def _random(stages: Sequence[Conv], device: torch.device) -> nn.Module:
    """A chain of these stages with random weights."""
    generator = torch.Generator().manual_seed(0)

    # Small: a value that grows to infinity, or shrinks to subnormal ones, would take another time.
    weights = [torch.randn(s.weight_shape, generator=generator) / prod(s.weight_shape[1:]) ** 0.5 for s in stages]
    return nn.Sequential(*[build_stage(s, w, None) for s, w in zip(stages, weights, strict=True)]).to(device)


def _noise(shape: Sequence[int], device: torch.device) -> Tensor:
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(0)).to(device)


def _whole(
    model: nn.Module,
    input_shape: Shape,
    table: PriceTable,
    maps: Sequence[Sequence[int]],
    spec: LatencySpec,
    threads: int,
    progress: Progress | None,
) -> list[float]:
    """Milliseconds of whole networks, their batch norms folded."""
    device = next(model.parameters()).device
    images = _noise((spec.batch_images, *input_shape), device)
    runs = []
    for choices in maps:
        picked = {name: c for name, c in table.picked(choices).items() if not c.dense}
        chains = {
            n: _random(compressed_stages(FORMATS[c.format], table.convs[n], c.ranks), device) for n, c in picked.items()
        }
        quick = folded(replaced(model, chains), input_shape).model
        runs.append(runner(quick, images, spec.runtime, threads=threads))

    def told(done: int, total: int) -> None:
        if progress is not None:
            progress("timing networks", done, total)

    return timed(runs, told)


def timed(runs: Sequence[Callable[[], Any]], progress: Callable[[int, int], None] | None = None) -> list[float]:
    """Milliseconds of each call, timed in rounds as described above."""
    best = [float("inf")] * len(runs)
    for round_ in range(ROUNDS):
        for i, run in enumerate(runs):
            if progress is not None:
                progress(round_ * len(runs) + i, ROUNDS * len(runs))
            best[i] = min(best[i], _median_ms(run))
    return best


def _median_ms(run: Callable[[], Any]) -> float:
    run()
    times: list[float] = []
    ends = time.perf_counter() + SECONDS
    while len(times) < REPEATS or time.perf_counter() < ends:
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    return 1e3 * sorted(times)[len(times) // 2]
