"""Measured prices of all candidates from those of some of them.

Ours. Within one layer, format and width a price rises with the predicted error nearly as a power of it, and where it
does not, that is mostly chance in the images (benchmarks/thinned_prices.py). So a few candidates are measured, evenly
spread over the ranks, and the others lie on the straight lines between these: logarithm of the price against logarithm
of the predicted error; of prices that may be negative (``loss``, ``drop``) the price itself.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import inf
from typing import Final

import numpy as np

from ranksearch.measurement import WITH_LABELS
from ranksearch.table import LayerPrices, PriceTable

LEAST: Final = 1e-9
"""Prices and errors below count as this: they have no logarithm."""


def sampled(table: PriceTable, points: int | None) -> PriceTable:
    """The table with at most ``points`` candidates of each layer, format and width, and the dense ones; None: all."""
    layers = [
        replace(layer, candidates=tuple(layer.candidates[i] for i in sorted(_kept(layer, points))))
        for layer in table.layers
    ]
    return replace(table, layers=tuple(layers))


def interpolated(
    table: PriceTable, points: int | None, found: Mapping[str, Sequence[Mapping[str, float]]]
) -> dict[str, list[dict[str, float]]]:
    """Prices of every candidate of ``table``, by layer, from those ``found`` of :func:`sampled` with these points.

    Between a candidate that broke the network (an infinite price) and its neighbours all are taken to break it.
    """
    return {layer.name: _filled(layer, points, found[layer.name]) for layer in table.layers}


def _series(layer: LayerPrices) -> list[list[int]]:
    """Indices of the candidates of each format and width, by predicted error."""
    alike: dict[tuple[str, int], list[int]] = defaultdict(list)
    for i, candidate in enumerate(layer.candidates):
        if not candidate.dense:
            alike[candidate.format, candidate.bits].append(i)
    return [sorted(indices, key=lambda i: layer.candidates[i].error) for indices in alike.values()]


def _kept(layer: LayerPrices, points: int | None) -> set[int]:
    """Indices of the candidates to measure: the first and the last of each series, and evenly between."""
    if points is None:
        return set(range(len(layer.candidates)))
    kept = {len(layer.candidates) - 1}  # dense
    for series in _series(layer):
        kept.update(series[round(place)] for place in np.linspace(0, len(series) - 1, min(points, len(series))))
    return kept


def _filled(layer: LayerPrices, points: int | None, found: Sequence[Mapping[str, float]]) -> list[dict[str, float]]:
    prices: list[dict[str, float]] = [{} for _ in layer.candidates]
    for i, row in zip(sorted(_kept(layer, points)), found, strict=True):
        prices[i] = dict(row)
    for series in _series(layer):
        errors = np.log([max(layer.candidates[i].error, LEAST) for i in series])
        known = [place for place, i in enumerate(series) if prices[i]]
        for price in found[0]:
            values = np.array([prices[series[place]][price] for place in known])
            whole = np.isfinite(values)
            signed = price in WITH_LABELS
            heights = np.where(whole, values if signed else np.log(np.maximum(values, LEAST)), 0.0)
            lines = np.interp(errors, errors[known], heights)
            lines = np.where(np.interp(errors, errors[known], ~whole) > 0, inf, lines if signed else np.exp(lines))
            for i, value in zip(series, lines.tolist(), strict=True):
                prices[i].setdefault(price, value)
    return prices
