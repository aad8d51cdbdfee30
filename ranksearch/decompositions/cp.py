"""CP: 1x1 S to r, one depthwise filter a component, 1x1 r to T.

The kernel as a sum of r outer products (Lebedev et al. 2015, arXiv 1412.6553), fitted by alternating least squares and
stabilised (Phan et al. 2020, arXiv 2008.05441). ``cp`` has the spatial modes in one: a filter of full size a component.
``cp4`` has them apart: a depthwise convolution along every spatial axis. Activation-aware: the input mode is whitened
by the input second moment, so that the fit's error is that of the output. Not nested: fitted at each rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod

import torch
from torch import Tensor

from ranksearch.conv import Conv
from ranksearch.decompositions.als import Factors, cp_als
from ranksearch.decompositions.format import (
    STABILISED,
    Prepared,
    Ranks,
    Statistics,
    pointwise,
    require_plain,
    square_roots,
)
from ranksearch.decompositions.grid import shares
from ranksearch.decompositions.ladder import cp_ladder, interpolated
from ranksearch.decompositions.peel import peel
from ranksearch.decompositions.stabilise import bounded, correct, rebalance
from ranksearch.space import RanksSpec, StabiliseSpec


class Cp:
    """Rank ``(r,)``; the spatial modes in one, or ``apart``."""

    nested = False

    def __init__(self, name: str, *, apart: bool) -> None:
        self.name = name
        self.apart = apart

    def max_rank(self, conv: Conv) -> Ranks:
        """The product of all modes but the largest."""
        require_plain(conv, self.name, pointwise=False)
        return (exact_rank(self._modes(conv.kernel, conv.in_channels, conv.out_channels)),)

    def grid(self, conv: Conv, spec: RanksSpec) -> list[Ranks]:
        """Ratios of the rank at which the layer costs as much as dense: the largest rank costs several times that."""
        bounds = self.max_rank(conv)
        one = sum(stage.macs for stage in self.stages(conv, (1,)))
        return shares(spec, (min(bounds[0], max(1, conv.macs // one)),), bounds)

    def stages(self, conv: Conv, ranks: Ranks) -> tuple[Conv, ...]:
        """1x1, depthwise with every spatial field of the dense layer (an axis a stage if apart), 1x1."""
        first = conv.pointwise_to(ranks[0])
        filters = depthwise(conv, ranks[0], self._axes(conv.kernel))
        return first, *filters, filters[-1].after(conv.out_channels, bias=conv.bias)

    def prepare(self, weight: Tensor, statistics: Statistics | None) -> Prepared:
        """The kernel, the root of the input moment, and the errors of short fits at a ladder of ranks."""
        known = {"weight": weight}
        if statistics is not None:
            known["root"], _ = square_roots(statistics.input_moment)
        tensor = self._tensor(whitened(known))
        ranks, errors = cp_ladder(tensor.float(), exact_rank(tensor.shape))
        ladder = {"ladder": ranks, "errors": errors}
        return known | {name: torch.tensor(values, dtype=torch.float64) for name, values in ladder.items()}

    def error(self, prepared: Prepared, ranks: Ranks) -> float:
        """Between the rungs of the ladder."""
        return interpolated(prepared["ladder"].tolist(), prepared["errors"].tolist(), ranks[0])

    def factors(self, prepared: Prepared, ranks: Ranks, stabiliser: StabiliseSpec = STABILISED) -> list[Tensor]:
        """A fit in the metric of the input, stabilised, brought back from the metric and balanced."""
        weight = prepared["weight"]
        *filters, first, last = fitted(self._tensor(whitened(prepared)), ranks[0], stabiliser)
        *filters, first, last = rebalance([*filters, unwhitened(first, prepared), last])
        groups, ndim = self._axes(tuple(weight.shape[2:])), weight.ndim - 2
        spatial = [
            factor.T.reshape(ranks[0], 1, *(weight.shape[2 + axis] if axis in axes else 1 for axis in range(ndim)))
            for factor, axes in zip(filters, groups, strict=True)
        ]
        return [pointwise(first.T, ndim), *spatial, pointwise(last, ndim)]

    def gauge(self, kernels: Sequence[Tensor]) -> list[Tensor]:
        """The scales of every component balanced."""
        first, *filters, last = kernels
        factors = [*(kernel.flatten(1).T for kernel in filters), first.flatten(1).T, last.flatten(1)]
        *spatial, inner, outer = rebalance(factors)
        shared = [factor.T.reshape(kernel.shape) for factor, kernel in zip(spatial, filters, strict=True)]
        return [inner.T.reshape(first.shape), *shared, outer.reshape(last.shape)]

    def _axes(self, kernel: Sequence[int]) -> list[tuple[int, ...]]:
        """The spatial axes that each depthwise stage extends along; those of size 1 go with the first."""
        every = tuple(range(len(kernel)))
        long = [axis for axis in every if kernel[axis] > 1]
        if not self.apart:
            return [every]
        return [tuple(axis for axis in every if axis == own or (own == long[0] and axis not in long)) for own in long]

    def _modes(self, kernel: Sequence[int], *channels: int) -> list[int]:
        return [*(prod(kernel[axis] for axis in axes) for axes in self._axes(kernel)), *channels]

    def _tensor(self, weight: Tensor) -> Tensor:
        """``(T, S, *spatial)`` with the modes in the order of the factors: spatial ones, S, T."""
        modes = self._modes(tuple(weight.shape[2:]), weight.shape[1], weight.shape[0])
        return weight.movedim((1, 0), (-2, -1)).reshape(modes)


def depthwise(conv: Conv, rank: int, axes: Sequence[tuple[int, ...]]) -> tuple[Conv, ...]:
    """Depthwise stages of ``rank`` channels, each with the spatial fields of ``conv`` along some of its axes."""
    stages: list[Conv] = []
    for own in axes:
        stage = along(conv, own, stages[-1].output_size if stages else conv.size)
        stages.append(stage.resized(in_channels=rank, out_channels=rank, groups=rank))
    return tuple(stages)


def along(conv: Conv, axes: Sequence[int], size: Sequence[int]) -> Conv:
    """``conv`` along some of its spatial axes only, without bias, on an input of another ``size``."""
    fields = (("kernel", 1), ("stride", 1), ("padding", 0), ("dilation", 1), ("output_padding", 0))
    changes = {
        field: tuple(value if axis in axes else idle for axis, value in enumerate(getattr(conv, field)))
        for field, idle in fields
    }
    return conv.resized(size=tuple(size), bias=False, **changes)


def whitened(prepared: Prepared) -> Tensor:
    """The prepared kernel in float64, its input mode in the metric of the input where that is known."""
    weight = prepared["weight"].double()
    return torch.einsum("ts...,sr->tr...", weight, prepared["root"].double()) if "root" in prepared else weight


def unwhitened(factor: Tensor, prepared: Prepared) -> Tensor:
    """A factor ``(S, r)`` of the whitened kernel, for the kernel itself."""
    return torch.linalg.solve(prepared["root"].double(), factor) if "root" in prepared else factor


def exact_rank(sizes: Sequence[int]) -> int:
    """The rank at which slices between the two largest modes, each decomposed, give any tensor of these sizes."""
    return prod(sizes) // max(sizes)


def fitted(tensor: Tensor, rank: int, stabiliser: StabiliseSpec) -> Factors:
    """Stabilised CP factors of a float64 tensor, ``(I_n, rank)`` each, in float64."""
    if rank >= exact_rank(tensor.shape):
        return peel(tensor, rank)
    fit = cp_als(tensor.float(), rank)
    return STABILISERS[stabiliser.method](tensor, fit.factors, stabiliser)


def _bounded(tensor: Tensor, factors: Factors, spec: StabiliseSpec) -> Factors:
    """The limit is a multiple of the balanced sensitivity of as many orthogonal terms of equal norm."""
    order, rank = tensor.ndim, factors[0].shape[1]
    term = float(tensor.norm()) / rank**0.5
    equal = order * prod(tensor.shape) ** (1 / order) * rank * term ** (2 * (order - 1) / order)
    return bounded(tensor, factors, limit=spec.limit * equal)


STABILISERS: dict[str, Callable[[Tensor, Factors, StabiliseSpec], Factors]] = {
    "none": lambda tensor, factors, spec: rebalance(factors),
    "epc": lambda tensor, factors, spec: correct(tensor, factors, slack=spec.slack),
    "norms": lambda tensor, factors, spec: correct(tensor, factors, slack=spec.slack, objective="norms"),
    "bounded": _bounded,
}
"""What is done to a fit, by the method's name."""
