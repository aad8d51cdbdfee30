"""TKD-CP: Tucker-2, then CP of its core (Phan et al. 2020, arXiv 2008.05441).

1x1 S to r_in, 1x1 to r, depthwise, 1x1 to r_out, 1x1 to T; two neighbouring 1x1 stages are folded into one where that
is cheaper. The bases are those of ``tucker2``; the core is fitted at each rank, so it is not nested. The outer stages
that are not folded are orthonormal, and what makes them so goes into the core's factors.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ranksearch.conv import Conv
from ranksearch.decompositions.cp import depthwise, exact_rank, fitted
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
from ranksearch.decompositions.ladder import core_error, core_errors, cp_ladder, resampled
from ranksearch.decompositions.stabilise import rebalance
from ranksearch.decompositions.tucker2 import Tucker2
from ranksearch.space import RanksSpec, StabiliseSpec

_POINTS = 13
_MULTIPLES = (0.5, 1.0, 1.5, 2.0, 3.0)
"""CP ranks on offer, as multiples of the larger channel rank."""
_BASES = Tucker2()


class TkdCp:
    """Ranks ``(r_in, r_out, r)``."""

    name = "tkd-cp"
    nested = False

    def max_rank(self, conv: Conv) -> Ranks:
        """``(S, T, r)`` with the rank at which CP of the whole kernel is exact."""
        require_plain(conv, self.name, pointwise=False)
        return conv.in_channels, conv.out_channels, exact_rank(_modes(conv))

    def grid(self, conv: Conv, spec: RanksSpec) -> list[Ranks]:
        """The channel ranks as for ``tucker2``, each with CP ranks about as large."""
        *_, largest = self.max_rank(conv)
        found = []
        for r_in, r_out in shares(spec, (conv.in_channels, conv.out_channels)):
            top = min(largest, exact_rank((math.prod(conv.kernel), r_in, r_out)))
            wanted = [rounded_up(m * max(r_in, r_out), spec.multiple, top) for m in _MULTIPLES]
            found += [(r_in, r_out, rank) for rank in wanted]
        return distinct(found)

    def stages(self, conv: Conv, ranks: Ranks) -> tuple[Conv, ...]:
        """Three to five: both 1x1 stages of a side, or their product."""
        r_in, r_out, rank = ranks
        narrow, wide = _apart(conv.in_channels, r_in, rank), _apart(conv.out_channels, r_out, rank)
        first = (conv.pointwise_to(r_in),) if narrow else ()
        second = first[-1].after(rank, bias=False) if first else conv.pointwise_to(rank)
        (filters,) = depthwise(conv, rank, [tuple(range(len(conv.kernel)))])
        fourth = (filters.after(r_out, bias=False),) if wide else ()
        return *first, second, filters, *fourth, (fourth or (filters,))[-1].after(conv.out_channels, bias=conv.bias)

    def prepare(self, weight: Tensor, statistics: Statistics | None) -> Prepared:
        """What ``tucker2`` has, the kernel, and the CP errors of cores of some sizes."""
        known = {"weight": weight, **_BASES.prepare(weight, statistics)}
        if statistics is not None:
            known["root"], _ = square_roots(statistics.input_moment)
        return {**known, "errors": core_errors(known["core"], _ladder)}

    def error(self, prepared: Prepared, ranks: Ranks) -> float:
        """What Tucker-2 loses, and of what it keeps the share that CP loses of a core of that size.

        A core of more channels than terms can do no worse than one of as many.
        """
        r_in, r_out, rank = ranks
        sizes = {(r_in, r_out), (min(r_in, rank), min(r_out, rank))}
        return min(self._error(prepared, *size, rank) for size in sizes)

    def _error(self, prepared: Prepared, r_in: int, r_out: int, rank: int) -> float:
        outside = lost(prepared["energy"], (r_in, r_out))
        t, s, *kernel = prepared["core"].shape
        top = exact_rank((math.prod(kernel), r_in, r_out))
        if rank >= top:
            return outside
        return outside + (1 - outside) * core_error(prepared["errors"], r_in * r_out / (s * t), rank, top)

    def factors(self, prepared: Prepared, ranks: Ranks, stabiliser: StabiliseSpec = STABILISED) -> list[Tensor]:
        """Slices of the bases, and a stabilised fit of the core between them."""
        r_in, r_out, rank = ranks
        first, last = prepared["first"][:r_in].double(), prepared["last"][:, :r_out].double()
        core = _tensor(prepared["core"][:r_out, :r_in].double())
        filters, into, out_of = fitted(core, min(rank, exact_rank(core.shape)), stabiliser)
        basis, triangle = torch.linalg.qr(first.T)  # orthonormal, as the whitened basis is not
        into = triangle @ into
        narrow, wide = _apart(first.shape[1], r_in, rank), _apart(last.shape[0], r_out, rank)
        into, out_of = into if narrow else basis @ into, out_of if wide else last @ out_of
        # A rank above what the core needs is filled up with nothing.
        parts = [torch.nn.functional.pad(f, (0, rank - f.shape[1])) for f in (filters, into, out_of)]
        filters, into, out_of = rebalance(parts)
        kernel, ndim = prepared["core"].shape[2:], prepared["core"].ndim - 2
        matrices = [basis.T] * narrow + [into.T], [out_of] + [last] * wide
        before, after = ([pointwise(matrix, ndim) for matrix in side] for side in matrices)
        return [*before, filters.T.reshape(rank, 1, *kernel), *after]


def _apart(channels: int, inner: int, rank: int) -> bool:
    """Whether two 1x1 stages, channels to inner to rank, cost less than one."""
    return inner * (channels + rank) < channels * rank


def _modes(conv: Conv) -> tuple[int, int, int]:
    return math.prod(conv.kernel), conv.in_channels, conv.out_channels


def _tensor(core: Tensor) -> Tensor:
    """``(T, S, *spatial)`` as ``(D, S, T)``."""
    return core.flatten(2).permute(2, 1, 0)


def _ladder(core: Tensor) -> list[float]:
    """CP errors of a core, at ranks evenly spaced in the logarithm."""
    tensor = _tensor(core)
    return resampled(*cp_ladder(tensor.float(), exact_rank(tensor.shape)), _POINTS)
