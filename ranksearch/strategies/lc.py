"""LC, one-shot: one exchange rate of cost against relative error for the whole network.

Y. Idelbayev and M. A. Carreira-Perpinan, "Low-rank Compression of Neural Nets: Learning the Rank of Each Layer", CVPR
2020: the C step of their learning-compression algorithm, in which layer l takes

    r_l(alpha) = argmin_r  alpha C_l(r) + sum_{i > r} s_i^2 / ||W_l||^2.

Their algorithm alternates it with training, the weights drawn to the compressed ones; here it is taken once, on the
pretrained weights. Ours: alpha is not searched for a budget but swept over all its breakpoints, which are the slopes of
the layers' lower convex hulls, so every rank map that some alpha gives is found exactly; and any price of the table may
stand for the relative error.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ranksearch.strategies.hull import Corner, Cost, check_cost, layer_costs, layer_losses, lower_hull
from ranksearch.strategies.ladder import Choices, sweep
from ranksearch.table import PREDICTED, PriceTable


@dataclass(frozen=True, kw_only=True)
class Lc:
    """Rank maps of one exchange rate."""

    price: str = PREDICTED
    cost: Cost = "macs"
    """C: ``macs``, ``params``, ``latency`` or ``bit-operations``."""

    name = "lc"

    def __post_init__(self) -> None:
        check_cost(self.cost)

    def maps(self, table: PriceTable) -> tuple[Choices, ...]:
        """Every rank map that one alpha > 0 gives, by falling alpha; of equal candidates the dearer."""
        costs, losses = layer_costs(table, self.cost), layer_losses(table, self.price)
        hulls = [lower_hull(*pair) for pair in zip(costs, losses, strict=True)]
        return sweep(tuple(hull[0].choice for hull in hulls), [_steps(hull) for hull in hulls])


def _steps(hull: Sequence[Corner]) -> list[tuple[float, int]]:
    """Thresholds of -alpha, with the corner that is best from there on."""
    return [(-corner.gain, corner.choice) for corner in hull[1:]]
