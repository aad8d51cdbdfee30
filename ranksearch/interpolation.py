"""Measured prices of all candidates from those of some of them.

Ours. Within one layer, format and width a price is a smooth function of the ranks and of the predicted error. So a few
candidates are measured, each as far as can be from those before it in the logarithms of the ranks and the error
(T. F. Gonzalez, "Clustering to minimize the maximum intercluster distance", 1985), and the others are interpolated by
linear radial basis functions (J. Duchon, "Splines minimizing rotation-invariant semi-norms in Sobolev spaces", 1977).
What is interpolated is ``asinh(price / SMALL)``: the logarithm of what is large, of either sign, and the price itself
where it is small. How near that comes: benchmarks/thinned_prices.py.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import inf
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from scipy.interpolate import RBFInterpolator
from scipy.spatial.distance import cdist

from ranksearch.table import LayerPrices, PriceTable

SMALL: Final = 1e-3
"""Prices below, in nats or as a share of the images, hardly matter in a network."""
LEAST_ERROR: Final = 1e-9
"""Predicted errors below count as this: they have no logarithm."""

Floats = NDArray[np.float64]


def sampled(table: PriceTable, points: int | None) -> PriceTable:
    """The table with at most ``points`` candidates for each rank of a layer's format and width, and the dense ones.

    ``None`` keeps all.
    """
    layers = [
        replace(layer, candidates=tuple(layer.candidates[i] for i in _kept(layer, points))) for layer in table.layers
    ]
    return replace(table, layers=tuple(layers))


def interpolated(
    table: PriceTable, points: int | None, found: Mapping[str, Sequence[Mapping[str, float]]]
) -> dict[str, list[dict[str, float]]]:
    """Prices of every candidate of ``table``, by layer, from those ``found`` of :func:`sampled` with these points.

    A candidate whose nearest measured one broke the network (an infinite price) is taken to break it too.
    """
    return {layer.name: _filled(layer, points, found[layer.name]) for layer in table.layers}


def _series(layer: LayerPrices) -> list[tuple[list[int], Floats]]:
    """Of each format and width the candidates' indices by predicted error, and where they lie, each axis 0 to 1."""
    alike: dict[tuple[str, int], list[int]] = defaultdict(list)
    for i, candidate in enumerate(layer.candidates):
        if not candidate.dense:
            alike[candidate.format, candidate.bits].append(i)
    found = []
    for indices in alike.values():
        indices.sort(key=lambda i: layer.candidates[i].error)
        candidates = [layer.candidates[i] for i in indices]
        place = np.log([(*c.ranks, max(c.error, LEAST_ERROR)) for c in candidates])
        place -= place.min(0)
        found.append((indices, place / np.where(place.max(0) > 0, place.max(0), 1.0)))
    return found


def _chosen(places: Floats, points: int) -> list[int]:
    """The first and the last, and so many in all, each the farthest from those before it."""
    chosen = list(dict.fromkeys((0, len(places) - 1)))
    while len(chosen) < min(points, len(places)):
        distances = cdist(places, places[chosen]).min(1)
        distances[chosen] = -1.0
        chosen.append(int(distances.argmax()))
    return chosen


def _kept(layer: LayerPrices, points: int | None) -> list[int]:
    """Indices of the candidates to measure, rising."""
    if points is None:
        return list(range(len(layer.candidates)))
    kept = [len(layer.candidates) - 1]  # dense
    for indices, places in _series(layer):
        ranks = len(layer.candidates[indices[0]].ranks)
        kept += [indices[k] for k in _chosen(places, points * ranks)]
    return sorted(kept)


def _filled(layer: LayerPrices, points: int | None, found: Sequence[Mapping[str, float]]) -> list[dict[str, float]]:
    prices = dict(zip(_kept(layer, points), map(dict, found), strict=True))
    for indices, places in _series(layer):
        known = [k for k, i in enumerate(indices) if i in prices]
        others = [k for k in range(len(indices)) if k not in known]
        if not others:
            continue
        rows = [prices[indices[k]] for k in known]
        nearest = cdist(places[others], places[known]).argmin(1)
        new: dict[str, Any] = {}
        for price in found[0]:
            values = np.array([row[price] for row in rows])
            whole = np.isfinite(values)
            new[price] = np.full(len(others), inf)
            if whole.any():
                smooth = _smooth(places[known][whole], values[whole], places[others])
                new[price] = np.where(whole[nearest], smooth, inf)
        for at, k in enumerate(others):
            prices[indices[k]] = {price: float(values[at]) for price, values in new.items()}
    return [prices[i] for i in range(len(layer.candidates))]


def _smooth(places: Floats, values: Floats, wanted: Floats) -> Floats:
    """Values at the ``wanted`` places from those at others, none beyond these."""
    if len(values) == 1:
        return np.repeat(values, len(wanted))
    surface = RBFInterpolator(places, np.arcsinh(values / SMALL), kernel="linear", degree=0)
    found: Floats = np.clip(np.sinh(surface(wanted)) * SMALL, values.min(), values.max())
    return found
