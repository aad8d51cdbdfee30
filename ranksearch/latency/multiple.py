"""The multiple that ranks are rounded up to where latency counts and nobody says one.

Ours. Kernels work in blocks of channels: to the end of a block more ranks cost no time, and some odd ranks take even
longer. What lies between is no use to a search for latency, so its ranks are multiples of the largest number that ranks
can be rounded up to, on the target, without being slower than rounded up to any other. The largest layers are timed
alone, each at a few odd ranks and at those rounded up.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from statistics import fmean

import torch

from ranksearch.conv import Conv
from ranksearch.decompositions import FORMATS, max_rank
from ranksearch.decompositions.grid import rounded_up
from ranksearch.factors import threads as thread_limit
from ranksearch.latency.measured import Progress, layer_runner, relevant, target, timed
from ranksearch.latency.record import Key
from ranksearch.space import LatencySpec

MULTIPLES = (1, 2, 4, 8, 16, 32)
FREE = 1.02
"""Ratio to the least cost that still counts as no more: what timing alone leaves uncertain."""
SHARES = (0.22, 0.31, 0.38, 0.47, 0.56, 0.68)
"""Of the largest ranks: where is timed."""
_LARGEST_LAYERS = 3
_CHOICES, _COARSE_MACS = 4, 0.1
"""Multiples that a rank has within its largest; fewer may have layers of so large a share of the MACs."""


def rank_multiple(
    layers: Sequence[tuple[Conv, str]],
    spec: LatencySpec,
    *,
    threads: int,
    device: torch.device,
    versions: Mapping[str, str],
    cache: Path | None = None,
    progress: Progress | None = None,
) -> int:
    """The largest of :data:`MULTIPLES` that is as fast as the fastest to round ranks up to, measured or as it was.

    Args:
        layers: every searched layer with the format that it is timed in.
        spec: runtime and batch.
        threads: CPU threads, where ``spec`` names none.
        device: what to time on.
        versions: of the packages.
        cache: folder where the result is kept for this device, these versions and layers.
        progress: told what is timed, how much of it is done, and of how much.

    Raises:
        LatencyError: the runtime cannot run a layer.
    """
    multiples = _fine_enough(layers)
    threads = spec.threads or threads
    about = [target(spec, threads, device, relevant(versions, spec)), multiples]
    counts = Counter(layers)
    largest = sorted(counts, key=lambda one: (-one[0].macs * counts[one], one[1]))[:_LARGEST_LAYERS]
    rows = [[conv.to_json(), form] for conv, form in largest]
    name = hashlib.sha256(json.dumps([about, rows], sort_keys=True).encode()).hexdigest()[:32]
    file = None if cache is None else cache / "latencies" / f"multiple-{name}.json"
    if file is not None:
        with suppress(OSError, ValueError, KeyError, TypeError):  # not there, or damaged: measured again
            return int(json.loads(file.read_text(encoding="utf-8"))["rank_multiple"])
    keys = {q: [key for conv, form in largest for key in _rounded(conv, form, q)] for q in multiples}
    each = list(dict.fromkeys(key for some in keys.values() for key in some))

    def told(done: int, total: int) -> None:
        if progress is not None:
            progress("timing rank multiples", done, total)

    with thread_limit(threads):
        runs = [layer_runner(key, spec.runtime, spec.batch_images, threads, device) for key in each]
        ms = dict(zip(each, timed(runs, told), strict=True))
    found = largest_free({q: [ms[key] for key in some] for q, some in keys.items()})
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({"rank_multiple": found}), encoding="utf-8")
    return found


def largest_free(times: Mapping[int, Sequence[float]]) -> int:
    """The largest multiple that is as fast as the fastest one.

    Args:
        times: by multiple, 1 among them, what the same ranks take rounded up to it. Compared are means of the ratios to
            the times of ranks that are not rounded up.
    """
    costs = {q: fmean(t / plain for t, plain in zip(own, times[1], strict=True)) for q, own in times.items()}
    return max(q for q, cost in costs.items() if cost <= FREE * min(costs.values()))


def _fine_enough(layers: Sequence[tuple[Conv, str]]) -> list[int]:
    """The multiples that leave enough ranks to choose from in all but small layers."""
    reach = [(max(max_rank(FORMATS[form], conv)), conv.macs) for conv, form in layers]
    total = sum(macs for _, macs in reach)
    return [
        q
        for q in MULTIPLES
        if q == 1 or sum(macs for rank, macs in reach if rank < _CHOICES * q) <= _COARSE_MACS * total
    ]


def _rounded(conv: Conv, form: str, multiple: int) -> list[Key]:
    """A few odd ranks, rounded up."""
    bounds = max_rank(FORMATS[form], conv)
    odd = [tuple(min(int(share * bound) | 1, bound) for bound in bounds) for share in SHARES]
    return [
        (conv, form, tuple(rounded_up(r, multiple, b) for r, b in zip(ranks, bounds, strict=True))) for ranks in odd
    ]
