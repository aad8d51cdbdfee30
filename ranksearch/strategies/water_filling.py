"""Water-filling: over all layers, keep next the singular direction with the most energy per MAC that it costs.

The rule is reverse water-filling of rate-distortion theory (T. M. Cover and J. A. Thomas, "Elements of Information
Theory", section on parallel Gaussian sources) with MACs for the rate: a direction's energy is its squared singular
value over ||W||^2 of its layer. Ours: on a grid of candidates a layer's next step is the next corner of the lower
convex hull of (MACs, energy lost); where every rank of a format of one rank is a candidate, that is one direction.

The energy is read off the spectra of the dense kernels for formats of one rank, and is the predicted error for others
and where the table has no spectra. So it differs from ``lc`` at the predicted error only where that error is
activation-aware, or steps tie.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ranksearch.strategies.hull import climb, lower_hull
from ranksearch.strategies.ladder import Choices
from ranksearch.table import UNFOLDINGS, LayerPrices, PriceTable


@dataclass(frozen=True, kw_only=True)
class WaterFilling:
    """Rank maps of rising energy, one step of most energy per MAC apart."""

    name = "water-filling"

    def maps(self, table: PriceTable) -> tuple[Choices, ...]:
        """Every rank map on the way from the cheapest to the exact one."""
        hulls = [lower_hull([c.macs for c in layer.candidates], lost_energy(layer)) for layer in table.layers]
        return tuple(climb(hulls))


def lost_energy(layer: LayerPrices) -> list[float]:
    """Share of the kernel's squared norm that every candidate loses."""
    tails = {}
    for name, values in layer.spectra:
        squares = np.square(values)[::-1].cumsum()[::-1]
        tails[name] = np.append(squares, 0.0) / (squares[0] or 1.0)
    # Of several widths the widest, beside which the others lose something too.
    exact = {(c.format, c.ranks): c.error for c in sorted(layer.candidates, key=lambda c: c.bits)}
    lost = []
    for candidate in layer.candidates:
        unfolding = UNFOLDINGS.get(candidate.format, ())
        if len(unfolding) == 1 and unfolding[0] in tails:
            tail = tails[unfolding[0]]
            rounding = candidate.error - exact[candidate.format, candidate.ranks]
            lost.append(float(tail[min(candidate.ranks[0], len(tail) - 1)]) + rounding)
        else:
            lost.append(candidate.error)
    return lost
