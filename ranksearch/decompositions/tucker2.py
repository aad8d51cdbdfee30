"""Tucker-2: 1x1 S to r_in, kernel r_in to r_out, 1x1 r_out to T.

Weight-only: truncated HOSVD by the eigenvectors of the two channel-mode Gram matrices, which is nested: smaller ranks
are slices of larger ones (De Lathauwer et al. 2000). Activation-aware: the output basis is that of the output
covariance, the input basis that of the kernel whitened by the input second moment.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ranksearch.conv import Conv
from ranksearch.decompositions.format import (
    STABILISED,
    Prepared,
    Ranks,
    Statistics,
    descending_eigh,
    kept,
    lost,
    pointwise,
    require_plain,
    square_roots,
)
from ranksearch.space import StabiliseSpec


class Tucker2:
    """Ranks ``(r_in, r_out)``."""

    name = "tucker2"
    nested = True

    def max_rank(self, conv: Conv) -> Ranks:
        """``(S, T)``."""
        require_plain(conv, self.name, pointwise=False)
        return conv.in_channels, conv.out_channels

    def stages(self, conv: Conv, ranks: Ranks) -> tuple[Conv, ...]:
        """1x1, the kernel with every spatial field of the dense layer, 1x1."""
        r_in, r_out = ranks
        core = conv.resized(in_channels=r_in, out_channels=r_out, bias=False)
        return conv.pointwise_to(r_in), core, core.after(conv.out_channels, bias=conv.bias)

    def prepare(self, weight: Tensor, statistics: Statistics | None) -> Prepared:
        """``first`` (S, S), ``core`` (T, S, *kernel) and ``last`` (T, T) at full rank."""
        if statistics is None:
            metric, whitened = None, weight
            _, last = descending_eigh(torch.einsum("ts...,us...->tu", weight, weight))
        else:
            root, metric = square_roots(statistics.input_moment)
            whitened = torch.einsum("ts...,sr->tr...", weight, root)
            _, last = descending_eigh(statistics.output_covariance)
        _, basis = descending_eigh(torch.einsum("ts...,tr...->sr", whitened, whitened))
        core = torch.einsum("ts...,ta,sb->ab...", whitened, last, basis)
        first = basis.T if metric is None else basis.T @ metric
        energy = kept(core.square().flatten(2).sum(2).T, whitened.square().sum())
        return {"first": first, "core": core, "last": last, "energy": energy}

    def error(self, prepared: Prepared, ranks: Ranks) -> float:
        """As ``energy`` tells."""
        return lost(prepared["energy"], ranks)

    def factors(self, prepared: Prepared, ranks: Ranks, stabiliser: StabiliseSpec = STABILISED) -> list[Tensor]:
        """Slices of the full-rank factors."""
        r_in, r_out = ranks
        first, core, last = prepared["first"][:r_in], prepared["core"][:r_out, :r_in], prepared["last"][:, :r_out]
        return [pointwise(first, core.ndim - 2), core, pointwise(last, core.ndim - 2)]
