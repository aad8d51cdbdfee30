"""Measured prices: what replacing one layer alone, by each of its candidates, costs on calibration images.

For every batch the dense network runs once; each candidate then runs on its layer's stored input, and only the network
downstream of the layer runs again. The prices, per candidate:

* ``weight``: squared error of the composed kernel, relative to the dense kernel's squared norm.
* ``output``: squared error of the layer's output, relative to the variance of the dense output (about channel means).
* ``divergence``: Kullback-Leibler divergence of the network's outputs from the dense ones, nats per image; no labels.
* ``loss``: increase of the cross-entropy with the labels, nats per image.
* ``drop``: fall of the top-1 accuracy, as a share of the images.
* ``second-order``: estimate of ``divergence``, half the Fisher quadratic form of the output's change, from one backward
  pass for all candidates of all layers; no labels, and nothing downstream of a layer runs again.

The Fisher matrix ``sum_c p_c (grad log p_c) (grad log p_c)^T`` is sampled by ``v = sum_c s_c sqrt(p_c) grad log p_c``
with random signs ``s_c``: ``E[v v^T]`` is that matrix, as it is with ``v = grad log p_c`` of a label ``c`` drawn from
the outputs; yet where the network is sure of a class, a drawn label nearly always gives next to nothing and rarely a
huge value, the signs always a moderate one (ours).
"""

from __future__ import annotations

import builtins
import math
import time
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from ranksearch.decompositions import Kind
from ranksearch.decompositions.format import STABILISED
from ranksearch.errors import DataError
from ranksearch.factors import cached, content_hash, store_cached
from ranksearch.measurement import PRICES, WITH_LABELS, Measurement, Price, share
from ranksearch.mirror import fetch, offer
from ranksearch.pricing import Factors
from ranksearch.scoring import reproducible
from ranksearch.space import StabiliseSpec
from ranksearch.surgery import evaluating
from ranksearch.table import LayerPrices, PriceTable

__all__ = ["PRICES", "Map", "Measured", "Price", "measure", "with_prices"]

Map = Callable[[Callable[[Any], Any], Iterable[Any]], Iterable[Any]]
"""Like the builtin ``map``: results in the order of the items."""
_CACHE_VERSION = "3"


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Prices, and what they took."""

    prices: Mapping[str, Sequence[Mapping[str, float]]]
    """By layer, of every candidate in the order of the table; zero for the dense one."""
    seconds: float
    """Wall time of the measurement, of prices from the cache when they were measured."""


def measure(
    dense: nn.Module,
    table: PriceTable,
    factors: Factors,
    images: Tensor | np.ndarray,
    labels: Tensor | np.ndarray | None = None,
    *,
    kind: Kind,
    prices: Sequence[Price] | None = None,
    batch_images: int = 32,
    dtype: torch.dtype = torch.float32,
    threads: int = 1,
    seed: int = 0,
    stabiliser: StabiliseSpec = STABILISED,
    cache: Path | None = None,
    map: Map = builtins.map,
    progress: Callable[[int, int], None] | None = None,
) -> Measured:
    """Prices of every candidate of every searched layer.

    The work is split by images, not by layers: the dense pass is shared by all layers, and no batch is much longer than
    another. The numbers do not depend on ``map``.

    Args:
        dense: the dense network, in float32, on the device to measure on; it is not changed.
        table: the layers and their candidates.
        factors: prepared tensors of these layers' formats, of ``kind``.
        images: network inputs ``(N, C, H, W)``.
        labels: ``(N,)``; only ``loss`` and ``drop`` need them.
        kind: kind of the factors that candidates are built of, with the bias that goes with it.
        prices: which prices; without, all that can be had (with or without labels).
        batch_images: images that run at a time, one piece of work for ``map``; all activations of these are held.
        dtype: of weights and activations, float32 or bfloat16.
        threads: CPU threads of one piece of work; the last bits depend on their number.
        seed: of the signs of ``second-order``.
        stabiliser: of candidates that are fitted.
        cache: folder where fits are, and prices are kept by a hash of all they depend on; without, none are kept.
        map: runs the pieces of work: the builtin, a process pool's, or a cluster's. The function it is given holds the
            network and the images, and can be pickled where the network can; it is faster from its second call on.
        progress: called with the pieces of work done and their total.

    Raises:
        DataError: no images, or labels that are needed and missing or of another number.
        ModelError: the network runs a layer of the table more than once.
    """
    # Copied: arrays may be mapped read-only, which torch cannot express.
    images = images if isinstance(images, Tensor) else torch.tensor(images)
    labels = torch.tensor(labels) if isinstance(labels, np.ndarray) else labels
    chosen = _chosen(prices, images, labels)
    keys, fetched = {}, set()
    if cache is not None:
        about = _about(dense, images, labels, f"{chosen} {kind} {dtype} {batch_images} {threads} {seed} {stabiliser}")
        keys = {x.name: cache / "prices" / f"{_key(x, factors, kind, about)}.safetensors" for x in table.layers}
        fetched = {path for path in keys.values() if not path.exists() and fetch(path, cache)}
    known = {x.name: _read(keys.get(x.name), len(x.candidates), len(chosen)) for x in table.layers}
    found = {name: entry for name, entry in known.items() if entry is not None}
    missing = [layer for layer in table.layers if layer.name not in found]
    if missing:
        work = Measurement(
            dense=dense,
            layers=tuple(missing),
            prepared={k[:2]: v for k, v in factors.items() if k[2] == kind and k[0] in {x.name for x in missing}},
            images=images,
            labels=labels,
            prices=chosen,
            batch_images=batch_images,
            dtype=dtype,
            threads=threads,
            seed=seed,
            stabiliser=stabiliser,
            cache=cache,
        )
        started = time.perf_counter()
        measured = _measured(work, map, progress)
        seconds = torch.tensor((time.perf_counter() - started) / len(missing), dtype=torch.float64)
        for layer, values in measured.items():
            found[layer] = {"prices": values, "seconds": seconds}
            if layer in keys:
                store_cached(found[layer], keys[layer])
                offer(keys[layer], cast(Path, cache), anew=keys[layer] in fetched)
    rows = {x.name: found[x.name]["prices"].tolist() for x in table.layers}
    return Measured(
        prices={name: [dict(zip(chosen, row, strict=True)) for row in own] for name, own in rows.items()},
        seconds=sum(float(entry["seconds"]) for entry in found.values()),
    )


def with_prices(table: PriceTable, found: Mapping[str, Sequence[Mapping[str, float]]]) -> PriceTable:
    """The table with what :func:`measure` found of its candidates."""
    layers = [
        replace(
            layer,
            candidates=tuple(
                replace(candidate, prices=tuple(values.items()))
                for candidate, values in zip(layer.candidates, found[layer.name], strict=True)
            ),
        )
        for layer in table.layers
    ]
    return replace(table, layers=tuple(layers))


def _chosen(prices: Sequence[Price] | None, images: Tensor, labels: Tensor | None) -> tuple[Price, ...]:
    """The prices to measure, in their usual order."""
    if not len(images):
        raise DataError("prices are measured on at least one image, found none. Check data.train.")
    if labels is not None and len(labels) != len(images):
        raise DataError(f"every image needs one label, found {len(images)} images and {len(labels)} labels.")
    if prices is None:
        return tuple(p for p in PRICES if labels is not None or p not in WITH_LABELS)
    unknown = [p for p in prices if p not in PRICES]
    if unknown:
        raise ValueError(f"prices must be among {', '.join(PRICES)}, found {', '.join(unknown)}")
    needing = [p for p in prices if p in WITH_LABELS]
    if needing and labels is None:
        raise DataError(f"the prices {' and '.join(needing)} need labels, found none. Give labels, or take divergence.")
    return tuple(p for p in PRICES if p in prices)


def _measured(work: Measurement, run: Map, progress: Callable[[int, int], None] | None) -> dict[str, Tensor]:
    """Prices ``(candidates, prices)`` of the layers of ``work``, float64."""
    weight = {layer.name: [0.0] * len(layer.candidates) for layer in work.layers}
    total: dict[str, tuple[Any, Any]] = {layer.name: (0.0, 0.0) for layer in work.layers}
    pieces = work.pieces
    with ExitStack() as stack:
        results = run(work, pieces)
        if isinstance(results, Generator):
            stack.enter_context(closing(results))  # an error here ends the workers at once
        for done, (piece, found) in enumerate(zip(pieces, results, strict=True)):
            if isinstance(piece, str):
                weight[piece] = found
            else:
                total = {name: (total[name][0] + rows, total[name][1] + more) for name, (rows, more) in found.items()}
            if progress is not None:
                progress(done + 1, len(pieces))
    return {name: _priced(work.prices, weight[name], *total[name], len(work.images)) for name in total}


def _priced(prices: Sequence[Price], weight: Sequence[float], rows: np.ndarray, channels: np.ndarray, n: int) -> Tensor:
    """Prices ``(candidates, prices)`` of one layer out of its sums over ``n`` images; infinite where not a number."""
    count, total, squares = channels
    variance = float((squares - total**2 / count).sum())
    divergence, loss, right = (rows[:, 2:] / n).T
    found: dict[str, Any] = {
        "weight": np.array(weight),
        "output": np.array([share(error, variance) for error in rows[:, 0]]),
        "second-order": rows[:, 1] / n,
        "divergence": divergence.clip(0),  # rounding
        "loss": loss - loss[-1],
        "drop": right[-1] - right,
    }
    values = np.stack([found[price] for price in prices], axis=1)
    return torch.from_numpy(np.where(np.isfinite(values), values, math.inf))


def _about(dense: nn.Module, images: Tensor, labels: Tensor | None, text: str) -> str:
    """Hash of what all prices depend on; equal weights may stand in another forward pass: the outputs tell."""
    parameter = next(dense.parameters())
    with torch.no_grad(), evaluating(dense), reproducible(1):
        outputs = dense(images[:2].to(parameter))
    tensors = [outputs, images, *dense.state_dict().values(), *([] if labels is None else [labels])]
    return content_hash(tensors, f"{_CACHE_VERSION} {text} {dense}")


def _key(layer: LayerPrices, factors: Factors, kind: Kind, about: str) -> str:
    """Hash of all that the prices of one layer depend on."""
    forms = sorted({c.format for c in layer.candidates if not c.dense})
    prepared = [(form, factors[layer.name, form, kind]) for form in forms]
    names = [(form, *sorted(tensors)) for form, tensors in prepared]
    values = [tensors[key] for _, tensors in prepared for key in sorted(tensors)]
    return content_hash(values, f"{about} {names} {layer}")


def _read(path: Path | None, candidates: int, prices: int) -> dict[str, Tensor] | None:
    """``prices`` ``(candidates, prices)`` and their ``seconds`` from the cache; an unreadable entry is removed."""
    if path is None or not path.exists():
        return None
    entry = cached(path) or {}
    shapes = {name: (values.shape, values.dtype) for name, values in entry.items()}
    if shapes == {"prices": ((candidates, prices), torch.float64), "seconds": ((), torch.float64)}:
        return entry
    path.unlink(missing_ok=True)
    return None
