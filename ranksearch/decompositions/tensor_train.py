"""Tensor train: 1x1 S to r1, a column r1 to r2, a row r2 to r3, 1x1 r3 to T.

The kernel as a train of the modes S, height, width, T (Oseledets 2011; of convolutions: Garipov et al. 2016, arXiv
1611.03214). The outer bases are those of ``tucker2`` and the core between them is split by one truncated SVD at the
ranks asked for, which loses as little as the successive SVDs of the paper; slices of one large SVD err by 2 to 7 % more
on the layers of ResNet-20. So it is not nested; there is nothing to stabilise.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ranksearch.conv import Conv
from ranksearch.decompositions.cp import along
from ranksearch.decompositions.format import (
    STABILISED,
    Prepared,
    Ranks,
    Statistics,
    lost,
    pointwise,
    require_plain,
    square_roots,
)
from ranksearch.decompositions.grid import distinct, rounded_up, shares
from ranksearch.decompositions.ladder import core_error, core_errors, resampled
from ranksearch.decompositions.tucker2 import Tucker2
from ranksearch.errors import UnsupportedLayer
from ranksearch.space import RanksSpec, StabiliseSpec

_POINTS = 17
_MULTIPLES = (0.5, 0.75, 1.0, 1.5, 2.0)
"""Inner ranks on offer, as multiples of the larger outer rank."""
_BASES = Tucker2()


class TensorTrain:
    """Ranks ``(r1, r2, r3)``."""

    name = "tensor-train"
    nested = False

    def max_rank(self, conv: Conv) -> Ranks:
        """``(S, min(S height, T width), T)``."""
        require_plain(conv, self.name, pointwise=False)
        if len(conv.kernel) != 2:
            raise UnsupportedLayer(f"{self.name} is for kernels of two axes, the kernel is {conv.kernel}")
        return conv.in_channels, _middle(conv.in_channels, conv.out_channels, *conv.kernel), conv.out_channels

    def grid(self, conv: Conv, spec: RanksSpec) -> list[Ranks]:
        """The outer ranks as for ``tucker2``, each with inner ranks about as large."""
        found = []
        for r1, r3 in shares(spec, (conv.in_channels, conv.out_channels)):
            top = _middle(r1, r3, *conv.kernel)
            wanted = [rounded_up(m * max(r1, r3), spec.multiple, top) for m in _MULTIPLES]
            found += [(r1, r2, r3) for r2 in wanted]
        return distinct(found)

    def stages(self, conv: Conv, ranks: Ranks) -> tuple[Conv, ...]:
        """The column has the vertical stride, padding and dilation, the row the horizontal ones."""
        r1, r2, r3 = ranks
        column = along(conv, (0,), conv.size).resized(in_channels=r1, out_channels=r2)
        row = along(conv, (1,), column.output_size).resized(in_channels=r2, out_channels=r3)
        return conv.pointwise_to(r1), column, row, row.after(conv.out_channels, bias=conv.bias)

    def prepare(self, weight: Tensor, statistics: Statistics | None) -> Prepared:
        """What ``tucker2`` has, the kernel, and what the split of cores of some sizes loses at every rank."""
        known = {"weight": weight, **_BASES.prepare(weight, statistics)}
        if statistics is not None:
            known["root"], _ = square_roots(statistics.input_moment)
        return {**known, "errors": core_errors(known["core"], _split_errors)}

    def error(self, prepared: Prepared, ranks: Ranks) -> float:
        """What Tucker-2 loses, and of what it keeps the share that the split loses of a core of that size."""
        r1, r2, r3 = ranks
        outside = lost(prepared["energy"], (r1, r3))
        t, s, height, width = prepared["core"].shape
        top = _middle(r1, r3, height, width)
        if r2 >= top:
            return outside
        return outside + (1 - outside) * core_error(prepared["errors"], r1 * r3 / (s * t), r2, top)

    def factors(self, prepared: Prepared, ranks: Ranks, stabiliser: StabiliseSpec = STABILISED) -> list[Tensor]:
        """Slices of the bases, orthonormal, and the core between them as two factors that share its singular values."""
        r1, r2, r3 = ranks
        first, last = prepared["first"][:r1].double(), prepared["last"][:, :r3].double()
        core = prepared["core"][:r3, :r1].double()
        left, values, right = _split(core, r2)
        basis, triangle = torch.linalg.qr(first.T)  # orthonormal, as the whitened basis is not
        height, width = core.shape[2:]
        whole = torch.einsum("ba,akr->bkr", triangle, (left * values).reshape(r1, height, -1)).flatten(0, 1) @ right
        left, values, right = torch.linalg.svd(whole, full_matrices=False)
        root = values[:r2].sqrt()
        # A rank above what the core needs is filled up with nothing.
        spare = (0, r2 - root.numel())
        column = torch.nn.functional.pad(left[:, :r2] * root, spare).reshape(r1, height, r2, 1).permute(2, 0, 1, 3)
        row = torch.nn.functional.pad((root[:, None] * right[:r2]).T, spare).reshape(width, r3, r2, 1)
        return [pointwise(basis.T, 2), column, row.permute(1, 2, 3, 0), pointwise(last, 2)]


def _middle(wide: int, deep: int, height: int, width: int) -> int:
    return min(wide * height, deep * width)


def _unfolded(core: Tensor) -> Tensor:
    """``(r3, r1, height, width)`` as a matrix ``(r1 height, width r3)``."""
    return core.permute(1, 2, 3, 0).flatten(2).flatten(0, 1)


def _split(core: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Truncated SVD of the core between its two spatial modes."""
    left, values, right = torch.linalg.svd(_unfolded(core), full_matrices=False)
    return left[:, :rank], values[:rank], right[:rank]


def _split_errors(core: Tensor) -> list[float]:
    """Shares of the squared norm that the split loses, at ranks evenly spaced in the logarithm."""
    energies = torch.linalg.svdvals(_unfolded(core)).square()
    total = float(energies.sum())
    tails = (1 - energies.cumsum(0) / total).clamp_min(0.0) if total > 0 else torch.zeros_like(energies)
    return resampled(range(1, len(energies) + 1), [*tails[:-1].tolist(), 0.0], _POINTS)
