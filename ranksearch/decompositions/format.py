"""What a format is: one convolution written as a chain of convolutions ("stages").

A format supplies ``max_rank``, ``stages`` and ``factors``, the last in two steps: ``prepare`` does everything that does
not depend on the ranks, once per layer, and ``factors`` slices it or, where smaller ranks are no slices of larger ones,
fits at the ranks asked for. MACs, parameters, modules, bounds, gauge and biases are written once, for all formats, from
these.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.nn import functional as F

from ranksearch.conv import Conv
from ranksearch.errors import DecompositionError, RankError, UnsupportedLayer
from ranksearch.space import RanksSpec, StabiliseSpec

Ranks = tuple[int, ...]
Prepared = Mapping[str, Tensor]
"""Tensors that ``factors`` and ``error`` need."""
Kind = Literal["weight-only", "activation-aware"]


UNSTABILISED = StabiliseSpec(method="none")


@dataclass(frozen=True, kw_only=True, eq=False)
class Statistics:
    """What calibration images show of one layer of the dense network; S input and T output channels, float64."""

    input_moment: Tensor
    """``(S, S)``: mean of x xᵀ over images and input pixels; ``(0, 0)`` for 1x1 kernels, where no format reads it."""
    patch_mean: Tensor
    """``(S, height, width)``: mean of the patch under the kernel over images and output pixels, padding included."""
    output_mean: Tensor
    """``(T,)``: mean of the layer's output, bias included."""
    output_covariance: Tensor
    """``(T, T)``: covariance of the layer's output."""


class Format(Protocol):
    """One way to factorise a kernel ``(T, S, height, width)``."""

    name: str
    nested: bool
    """Whether smaller ranks are slices of larger ones; else ``factors`` is a fit, which is kept in the cache."""

    def max_rank(self, conv: Conv) -> Ranks:
        """The largest ranks, at which the format is exact; raises UnsupportedLayer with the reason."""
        ...

    def stages(self, conv: Conv, ranks: Ranks) -> tuple[Conv, ...]:
        """The chain of convolutions; only the last one has a bias."""
        ...

    def prepare(self, weight: Tensor, statistics: Statistics | None) -> Prepared:
        """Everything that does not depend on the ranks; activation-aware where ``statistics`` is given."""
        ...

    def error(self, prepared: Prepared, ranks: Ranks) -> float:
        """Predicted share of the squared norm lost, 0 to 1, in the metric of the factors' kind; no fit, so cheap."""
        ...

    def factors(self, prepared: Prepared, ranks: Ranks, stabiliser: StabiliseSpec = UNSTABILISED) -> list[Tensor]:
        """The kernels of the stages at these ranks: slices, or a fit that the stabiliser then works on."""
        ...


@runtime_checkable
class OwnGrid(Protocol):
    """What a format may have besides, where one ratio a rank makes no sense."""

    def grid(self, conv: Conv, spec: RanksSpec) -> list[Ranks]:
        """The rank tuples to offer for a layer."""
        ...


def check_ranks(form: Format, conv: Conv, ranks: Ranks) -> None:
    """Raise :class:`RankError`, naming the bounds, unless ``ranks`` are within them."""
    bounds = form.max_rank(conv)
    if len(ranks) != len(bounds) or not all(1 <= r <= bound for r, bound in zip(ranks, bounds, strict=False)):
        raise RankError(
            f"ranks of {form.name} must be {len(bounds)} integers from 1 to {bounds} for a layer of "
            f"{conv.in_channels} to {conv.out_channels} channels, kernel {conv.kernel}; found {ranks}. "
            "Choose ranks within the bounds."
        )


def require_plain(conv: Conv, name: str, *, pointwise: bool) -> None:
    """Raise :class:`UnsupportedLayer` for grouped layers, and for kernels that another format is meant for."""
    if conv.groups == conv.in_channels and conv.groups > 1:
        raise UnsupportedLayer("depthwise: there is no channel mode to factorise")
    if conv.groups > 1:
        raise UnsupportedLayer(f"grouped convolution (groups={conv.groups})")
    if pointwise and not conv.pointwise:
        raise UnsupportedLayer(f"{name} is for 1x1 convolutions and linear layers, the kernel is {conv.kernel}")
    if not pointwise and conv.pointwise:
        raise UnsupportedLayer(f"{name} needs a spatial kernel, the kernel is 1x1: use svd")


def prepare(form: Format, conv: Conv, weight: Tensor, statistics: Statistics | None = None) -> dict[str, Tensor]:
    """The prepared tensors of one layer in float32, with what its biases need.

    Args:
        form: the format.
        conv: geometry of the dense layer.
        weight: dense kernel ``(T, S, height, width)``; a linear layer's as ``(T, S, 1, 1)``.
        statistics: of the layer, for activation-aware factors; weight-only without.

    Raises:
        UnsupportedLayer: the format is not for this layer.
        DecompositionError: the kernel or the statistics are not finite, or a decomposition failed.
    """
    form.max_rank(conv)
    if not bool(torch.isfinite(weight).all()):
        raise DecompositionError("the kernel holds NaN or infinite values. Check the pretrained weights.")
    try:
        prepared = dict(form.prepare(weight.double(), statistics))
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined, unused-ignore]  # public, not re-exported
        raise DecompositionError(f"{form.name} did not converge: {error}. Leave this layer dense.") from error
    if statistics is not None:
        prepared |= {"patch_mean": statistics.patch_mean, "output_mean": statistics.output_mean}
    broken = [name for name, value in prepared.items() if not bool(torch.isfinite(value).all())]
    if broken:
        raise DecompositionError(f"{form.name} gave values that are not finite in {', '.join(broken)}.")
    return {name: value.float().contiguous() for name, value in prepared.items()}


def compressed_stages(form: Format, conv: Conv, ranks: Ranks) -> tuple[Conv, ...]:
    """The chain that replaces a layer; it always ends with a bias, which keeps the mean of the layer's output."""
    return form.stages(conv.resized(bias=True), ranks)


def kernels(
    form: Format, conv: Conv, prepared: Prepared, ranks: Ranks, stabiliser: StabiliseSpec = UNSTABILISED
) -> list[Tensor]:
    """Kernels of the stages in a gauge that trains well: the orthonormal one, or for fits their own.

    Raises:
        RankError: ranks out of bounds.
        DecompositionError: a fit failed.
    """
    check_ranks(form, conv, ranks)
    if form.nested:
        return orthonormal_gauge(form.factors(prepared, ranks))
    try:
        fitted = form.factors(prepared, ranks, stabiliser)
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined, unused-ignore]  # public, not re-exported
        raise DecompositionError(
            f"{form.name} at ranks {ranks} did not converge: {error}. Leave this layer dense, or change its ranks."
        ) from error
    if not all(bool(torch.isfinite(weight).all()) for weight in fitted):
        raise DecompositionError(
            f"{form.name} at ranks {ranks} gave factors that are not finite. "
            "Leave this layer dense, or change its ranks."
        )
    return [weight.to(prepared["weight"].dtype).contiguous() for weight in fitted]


def chain(
    form: Format,
    conv: Conv,
    prepared: Prepared,
    ranks: Ranks,
    bias: Tensor | None,
    weights: list[Tensor] | None = None,
) -> tuple[list[Tensor], Tensor]:
    """Kernels of the stages, and the bias ``(T,)`` of the last one.

    Weight-only factors keep the dense ``bias``; activation-aware ones take the bias that keeps the mean output.

    Args:
        form: the format.
        conv: geometry of the dense layer.
        prepared: as :func:`prepare` gives it.
        ranks: within the bounds.
        bias: of the dense layer.
        weights: the stages' :func:`kernels` at these ranks, where they are known already.

    Raises:
        RankError: ranks out of bounds.
        DecompositionError: a fit failed.
    """
    weights = kernels(form, conv, prepared, ranks) if weights is None else weights
    if "patch_mean" in prepared:
        stages = compressed_stages(form, conv, ranks)
        bias = prepared["output_mean"] - response(stages, weights, prepared["patch_mean"])
    return weights, weights[-1].new_zeros(conv.out_channels) if bias is None else bias


def response(stages: Sequence[Conv], weights: Sequence[Tensor], patch: Tensor) -> Tensor:
    """Output ``(T,)`` of the chain, without bias, to one patch ``(S, height, width)`` under the kernel."""
    out = patch[None]
    for stage, weight in zip(stages, weights, strict=True):
        out = F.conv2d(out, weight.to(out.dtype), groups=stage.groups)
    return out.flatten()


def orthonormal_gauge(weights: list[Tensor]) -> list[Tensor]:
    """The same chain with orthonormal outer factors and the magnitude in the middle.

    An invertible matrix between two stages leaves the network unchanged, yet decides how well it trains. Stages before
    the middle get orthonormal rows, those after it orthonormal columns; of two stages, both share the singular values
    evenly.
    """
    weights = list(weights)
    middle = len(weights) // 2
    for i in range(middle):
        rows = weights[i].flatten(1)
        if rows.shape[0] <= rows.shape[1]:
            q, r = torch.linalg.qr(rows.T)
            weights[i] = q.T.reshape(weights[i].shape)
            weights[i + 1] = torch.einsum("oikl,ji->ojkl", weights[i + 1], r)
    for i in range(len(weights) - 1, max(middle, 1) - 1, -1):
        columns = weights[i].movedim(1, -1)
        if weights[i].shape[1] <= columns.flatten(0, -2).shape[0] and i > middle:
            q, r = torch.linalg.qr(columns.flatten(0, -2))
            weights[i] = q.reshape(columns.shape).movedim(-1, 1)
            weights[i - 1] = torch.einsum("oikl,jo->jikl", weights[i - 1], r)
    if len(weights) == 2:
        weights = _share_evenly(*weights)
    return [weight.contiguous() for weight in weights]


def _share_evenly(first: Tensor, second: Tensor) -> list[Tensor]:
    """Two stages with the singular values of their product split by the square root; ``first`` has orthonormal rows."""
    columns = second.movedim(1, -1)
    u, s, vh = torch.linalg.svd(columns.flatten(0, -2), full_matrices=False)
    root = s.clamp_min(s.max() * 1e-7 + 1e-30).sqrt()
    if u.shape[1] < first.shape[0]:
        return [first, second]
    first = torch.einsum("ri,iskl->rskl", root[:, None] * vh, first)
    return [first, (u * root).reshape(columns.shape).movedim(-1, 1)]


def descending_eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (clamped at 0) in descending order, and the eigenvectors as columns, of a symmetric matrix."""
    values, vectors = torch.linalg.eigh(matrix)
    return values.flip(-1).clamp_min(0.0), vectors.flip(-1)


def square_roots(moment: Tensor, floor: float = 1e-6) -> tuple[Tensor, Tensor]:
    """``M^(1/2)`` and ``M^(-1/2)`` of a second moment, eigenvalues floored relative to the largest.

    A dead channel makes the moment singular; the floor keeps its inverse root bounded.
    """
    values, vectors = descending_eigh(moment)
    root = values.clamp_min(float(values[0]) * floor + 1e-30).sqrt()
    return (vectors * root) @ vectors.T, (vectors / root) @ vectors.T


def lost(energy: Tensor, ranks: Ranks) -> float:
    """The error of a nested format whose ``energy`` has one axis a rank: at ``[r1 - 1, ...]`` the share kept."""
    return max(0.0, 1.0 - float(energy[tuple(r - 1 for r in ranks)]))


def kept(energies: Tensor, total: Tensor | float) -> Tensor:
    """Cumulative share of ``energies`` (one axis a rank) in ``total``; 1 everywhere for an all-zero kernel."""
    for axis in range(energies.ndim):
        energies = energies.cumsum(axis)
    denominator = float(total)
    return (energies / denominator).clamp(0.0, 1.0) if denominator > 0 else torch.ones_like(energies)
