"""Tensor chain: 1x1 S to R p, one convolution p to q that all R groups share, 1x1 R q to T.

The kernel as R Tucker-2 terms with one core, which is the order-3 loop of Phan et al. 2022 (arXiv 2203.02617); fitted
by alternating least squares and stabilised, as ``loop.py`` says. R = 1 is ``tucker2``, p = q = 1 is CP with one spatial
filter. Activation-aware: the input mode is whitened by the input second moment. Not nested: fitted at each rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ranksearch.conv import Conv
from ranksearch.decompositions.cp import unwhitened, whitened
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
from ranksearch.decompositions.grid import distinct, shares
from ranksearch.decompositions.ladder import interpolated
from ranksearch.decompositions.loop import Cores, chain_als, correct_chain, regauge
from ranksearch.decompositions.tucker2 import Tucker2
from ranksearch.space import RanksSpec, StabiliseSpec

_GROUPS = (2, 4, 8, 16)
"""Numbers of groups on offer; one group is ``tucker2``."""
_SHARES = (0.25, 0.5, 1.0)
"""Widths R p / S, and as many R q / T, at which errors are measured."""
_SWEEPS = 4
_LARGEST = 64
"""Channels that errors are measured on: of larger kernels the leading subspaces, whose errors at the same widths are
taken for those of the whole."""


class TensorChain:
    """Ranks ``(R, p, q)``."""

    name = "tensor-chain"
    nested = False

    def max_rank(self, conv: Conv) -> Ranks:
        """``(min(S, T), S, T)``; exact at p = S, q = T whatever R."""
        require_plain(conv, self.name, pointwise=False)
        return min(conv.in_channels, conv.out_channels), conv.in_channels, conv.out_channels

    def grid(self, conv: Conv, spec: RanksSpec) -> list[Ranks]:
        """R in 2, 4, 8, 16; p and q by ratios of S / R and T / R, or as numbers."""
        most, s, t = self.max_rank(conv)
        found = []
        for groups in (n for n in _GROUPS if 2 <= n <= most):
            each = 1 if spec.values is not None else groups
            found += [(groups, -(-wide // each), -(-deep // each)) for wide, deep in shares(spec, (s, t))]
        return distinct(found)

    def stages(self, conv: Conv, ranks: Ranks) -> tuple[Conv, ...]:
        """1x1, the kernel on every group with every spatial field of the dense layer, 1x1."""
        groups, p, q = ranks
        shared = conv.resized(in_channels=groups * p, out_channels=groups * q, groups=groups, tied=groups, bias=False)
        return conv.pointwise_to(groups * p), shared, shared.after(conv.out_channels, bias=conv.bias)

    def prepare(self, weight: Tensor, statistics: Statistics | None) -> Prepared:
        """The kernel, the root of the input moment, and the errors of short fits at some ranks."""
        known = {"weight": weight}
        if statistics is not None:
            known["root"], _ = square_roots(statistics.input_moment)
        bases = Tucker2().prepare(whitened(known), None)
        return {**known, "energy": bases["energy"], **_ladders(_tensor(bases["core"]))}

    def error(self, prepared: Prepared, ranks: Ranks) -> float:
        """On a line between the widths measured, and no less than Tucker-2 of all groups' channels loses.

        Of the numbers of groups measured, up to the one asked for, the best: fewer groups are a case of more. Of fewer
        groups nothing is known below the widths measured.
        """
        groups, p, q = ranks
        t, s = prepared["weight"].shape[:2]
        width = math.sqrt(p / s * (q / t))
        least = lost(prepared["energy"], (p, q))
        tables = (prepared[name].tolist() for name in ("groups", "widths", "errors"))
        rows = [row for row in zip(*tables, strict=True) if row[0] <= groups]
        for measured, widths, errors in rows:
            if width >= widths[0] or measured == rows[-1][0]:
                outside = lost(prepared["energy"], (min(int(measured) * p, s), min(int(measured) * q, t)))
                least = min(least, max(outside, interpolated(widths, errors, width)))
        return least

    def factors(self, prepared: Prepared, ranks: Ranks, stabiliser: StabiliseSpec = STABILISED) -> list[Tensor]:
        """A fit in the metric of the input, stabilised, brought back from the metric and gauged anew."""
        weight = prepared["weight"]
        tensor = _tensor(whitened(prepared))
        groups, p, q = ranks
        core, first, last = STABILISERS[stabiliser.method](tensor, chain_als(tensor, (groups, p, q)).cores, stabiliser)
        plain = unwhitened(first.flatten(1), prepared).reshape(first.shape)
        core, first, last = regauge((core, plain, last))
        kernel = core.permute(2, 1, 0).reshape(q, p, *weight.shape[2:])
        ndim = weight.ndim - 2
        return [pointwise(first.flatten(1).T, ndim), kernel, pointwise(last.flatten(1), ndim)]

    def gauge(self, kernels: Sequence[Tensor]) -> list[Tensor]:
        """A few sweeps over the bonds."""
        first, kernel, last = kernels
        q, p, *spatial = kernel.shape
        core = kernel.flatten(2).permute(2, 1, 0)
        inner, outer = torch.unflatten(first.flatten(1).T, 1, (-1, p)), torch.unflatten(last.flatten(1), 1, (-1, q))
        core, inner, outer = regauge((core, inner, outer), sweeps=_MOST)
        shared = core.permute(2, 1, 0).reshape(q, p, *spatial)
        return [inner.flatten(1).T.reshape(first.shape), shared, outer.flatten(1).reshape(last.shape)]


_MOST = 3
"""Sweeps of the gauge during training: the cores are near the gauge already."""

STABILISERS: dict[str, Callable[[Tensor, Cores, StabiliseSpec], Cores]] = {
    "none": lambda tensor, cores, spec: regauge(cores),
    "epc": lambda tensor, cores, spec: correct_chain(tensor, cores, slack=spec.slack),
    "norms": lambda tensor, cores, spec: correct_chain(tensor, cores, slack=spec.slack),
    "bounded": lambda tensor, cores, spec: correct_chain(tensor, cores, slack=spec.slack),
}
"""What is done to a fit, by the method's name; a chain knows one correction."""


def _tensor(weight: Tensor) -> Tensor:
    """``(T, S, *spatial)`` as ``(D, S, T)``."""
    return weight.flatten(2).permute(2, 1, 0)


def _ladders(core: Tensor) -> dict[str, Tensor]:
    """For some ``groups``: ``widths`` p / S from small to 1, and the ``errors`` of chains of these widths.

    Args:
        core: the kernel ``(D, S, T)`` in the bases of its HOSVD; chains are fitted to its leading part.
    """
    _, s, t = core.shape
    wide, deep = min(s, _LARGEST), min(t, _LARGEST)
    part = core[:, :wide, :deep]
    groups = [n for n in _GROUPS if n <= min(s, t)]
    tables: dict[str, list[list[float]]] = {"widths": [], "errors": []}
    for n in groups:
        widths: list[float] = []
        errors: list[float] = []
        for share in _SHARES:
            p, q = (max(1, math.ceil(share * size / n)) for size in (wide, deep))
            fit = chain_als(part, (n, p, q), sweeps=_SWEEPS, restarts=0)
            widths.append(math.sqrt(p / wide * (q / deep)))
            errors.append(min([fit.error, *errors[-1:]]))
        tables["widths"].append([*widths, 1.0])
        tables["errors"].append([*errors, 0.0])
    found = {name: torch.tensor(rows, dtype=torch.float64) for name, rows in tables.items()}
    return {**found, "groups": torch.tensor(groups, dtype=torch.float64)}
