"""What a format is: one convolution written as a chain of convolutions ("stages").

A format supplies ``max_rank``, ``stages`` and ``factors``, the last in two steps: ``prepare`` does everything that does
not depend on the ranks, once per layer, and ``factors`` slices it or, where smaller ranks are no slices of larger ones,
fits at the ranks asked for. MACs, parameters, modules, bounds, gauge and biases are written once, for all formats, from
these. So are grouped layers: a format sees one group at a time, as a convolution of its own, and the groups' stages run
side by side.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.nn import functional as F

from ranksearch.conv import Conv
from ranksearch.decompositions.gauge import orthonormal_gauge
from ranksearch.errors import DecompositionError, RankError, UnsupportedLayer
from ranksearch.space import RanksSpec, StabiliseSpec

Ranks = tuple[int, ...]
Prepared = Mapping[str, Tensor]
"""Tensors that ``factors`` and ``error`` need; of a layer with groups, each with an axis of groups in front."""
Kind = Literal["weight-only", "activation-aware"]


STABILISED = StabiliseSpec()
"""What is done to fits unless a space or a rank map says otherwise."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Statistics:
    """What calibration images show of one layer of the dense network; S input and T output channels, float64."""

    input_moment: Tensor
    """``(S, S)``: mean of x xᵀ over images and input pixels; ``(0, 0)`` for 1x1 kernels, where no format reads it."""
    patch_mean: Tensor
    """``(S, *kernel)``: mean of the patch under the kernel over images and output pixels, padding included. That of a
    transposed convolution holds the input pixel that each kernel element brings to the output pixel, or zero."""
    output_mean: Tensor
    """``(T,)``: mean of the layer's output, bias included."""
    output_covariance: Tensor
    """``(T, T)``: covariance of the layer's output."""


class Format(Protocol):
    """One way to factorise a kernel ``(T, S, *kernel)``, of one to three spatial axes; groups it never sees."""

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
        """Everything that does not depend on the ranks; activation-aware where ``statistics`` is given.

        ``norm``, if it is among it, is the squared norm that ``error`` is a share of; without, it is that of the kernel
        in the metric of the input moment.
        """
        ...

    def error(self, prepared: Prepared, ranks: Ranks) -> float:
        """Predicted share of the squared norm lost, 0 to 1, in the metric of the factors' kind; no fit, so cheap."""
        ...

    def factors(self, prepared: Prepared, ranks: Ranks, stabiliser: StabiliseSpec = STABILISED) -> list[Tensor]:
        """The kernels of the stages at these ranks: slices, or a fit that the stabiliser then works on."""
        ...


@runtime_checkable
class OwnGrid(Protocol):
    """What a format may have besides, where one ratio a rank makes no sense."""

    def grid(self, conv: Conv, spec: RanksSpec) -> list[Ranks]:
        """The rank tuples to offer for a layer."""
        ...


@runtime_checkable
class OwnGauge(Protocol):
    """What a format may have besides, whose factors training may make sensitive without need."""

    def gauge(self, kernels: Sequence[Tensor]) -> list[Tensor]:
        """The kernels of the stages of the same chain, least sensitive."""
        ...


def max_rank(form: Format, conv: Conv) -> Ranks:
    """The largest ranks of a layer (of each of its groups); raises UnsupportedLayer with the reason."""
    if conv.depthwise:
        raise UnsupportedLayer("depthwise: there is no channel mode to factorise")
    return form.max_rank(conv.group)


def check_ranks(form: Format, conv: Conv, ranks: Ranks) -> None:
    """Raise :class:`RankError`, naming the bounds, unless ``ranks`` are within them."""
    bounds = max_rank(form, conv)
    if len(ranks) != len(bounds) or not all(1 <= r <= bound for r, bound in zip(ranks, bounds, strict=False)):
        groups = f" in {conv.groups} groups" if conv.groups > 1 else ""
        raise RankError(
            f"ranks of {form.name} must be {len(bounds)} integers from 1 to {bounds} for a layer of "
            f"{conv.in_channels} to {conv.out_channels} channels{groups}, kernel {conv.kernel}; found {ranks}. "
            "Choose ranks within the bounds."
        )


def require_plain(conv: Conv, name: str, *, pointwise: bool) -> None:
    """Raise :class:`UnsupportedLayer` for kernels that another format is meant for."""
    if pointwise and not conv.pointwise:
        raise UnsupportedLayer(f"{name} is for 1x1 convolutions and linear layers, the kernel is {conv.kernel}")
    if not pointwise and conv.pointwise:
        raise UnsupportedLayer(f"{name} needs a spatial kernel, the kernel is 1x1: use svd")


def stages(form: Format, conv: Conv, ranks: Ranks) -> tuple[Conv, ...]:
    """The chain of convolutions that replaces a layer, those of all groups side by side."""
    alone = form.stages(conv.group, ranks)
    return alone if conv.groups == 1 else tuple(stage.times(conv.groups) for stage in alone)


def compressed_stages(form: Format, conv: Conv, ranks: Ranks) -> tuple[Conv, ...]:
    """The chain that replaces a layer; it always ends with a bias, which keeps the mean of the layer's output."""
    return stages(form, conv.resized(bias=True), ranks)


def prepare(
    form: Format,
    conv: Conv,
    weight: Tensor,
    statistics: Statistics | None = None,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    """The prepared tensors of one layer, with what its biases need; computed in float64 whatever ``dtype`` they get.

    Args:
        form: the format.
        conv: geometry of the dense layer.
        weight: dense kernel ``(T, S / groups, *kernel)``; a linear layer's as ``(T, S, 1, 1)``.
        statistics: of the layer, for activation-aware factors; weight-only without.
        dtype: of the tensors.

    Raises:
        UnsupportedLayer: the format is not for this layer.
        DecompositionError: the kernel or the statistics are not finite, or a decomposition failed.
    """
    max_rank(form, conv)
    if not bool(torch.isfinite(weight).all()):
        raise DecompositionError("the kernel holds NaN or infinite values. Check the pretrained weights.")
    parts = []
    for group, own in enumerate(weight.double().chunk(conv.groups)):
        known = statistics if statistics is None or conv.groups == 1 else _of_group(statistics, conv.groups, group)
        try:
            parts.append({"norm": _norm(own, known), **form.prepare(own, known)})
        except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined, unused-ignore]  # public, not re-exported
            raise DecompositionError(f"{form.name} did not converge: {error}. Leave this layer dense.") from error
    prepared = (
        parts[0] if conv.groups == 1 else {name: torch.stack([part[name] for part in parts]) for name in parts[0]}
    )
    if statistics is not None:
        prepared |= {"patch_mean": statistics.patch_mean, "output_mean": statistics.output_mean}
    broken = [name for name, value in prepared.items() if not bool(torch.isfinite(value).all())]
    if broken:
        raise DecompositionError(f"{form.name} gave values that are not finite in {', '.join(broken)}.")
    return {name: value.to(dtype).contiguous() for name, value in prepared.items()}


def _of_group(statistics: Statistics, groups: int, group: int) -> Statistics:
    """What the images show of one group of a layer."""

    def own(x: Tensor, *axes: int) -> Tensor:
        for axis in axes:
            x = x.chunk(groups, axis)[group]
        return x

    moment = statistics.input_moment
    return Statistics(
        input_moment=own(moment, 0, 1) if moment.numel() else moment,
        patch_mean=own(statistics.patch_mean, 0),
        output_mean=own(statistics.output_mean, 0),
        output_covariance=own(statistics.output_covariance, 0, 1),
    )


def _norm(weight: Tensor, statistics: Statistics | None) -> Tensor:
    """Squared norm of a kernel in the metric of the input moment, where that is known."""
    if statistics is None or not statistics.input_moment.numel():
        return weight.square().sum()
    flat = weight.flatten(2)
    return torch.einsum("tsk,sr,trk->", flat, statistics.input_moment, flat)


_WHOLE = ("patch_mean", "output_mean")
"""Prepared tensors that have no axis of groups: they are the layer's."""


def _of(prepared: Prepared, conv: Conv) -> list[Prepared]:
    """The prepared tensors of every group."""
    if conv.groups == 1:
        return [prepared]
    split = {name: value for name, value in prepared.items() if name not in _WHOLE}
    return [{name: value[group] for name, value in split.items()} for group in range(conv.groups)]


def error(form: Format, conv: Conv, prepared: Prepared, ranks: Ranks) -> float:
    """Predicted share of the squared norm lost at these ranks, 0 to 1: the mean over groups, by their norms."""
    if conv.groups == 1:
        return form.error(prepared, ranks)
    norms = [float(norm) for norm in prepared["norm"]]
    lost = sum(norm * form.error(part, ranks) for norm, part in zip(norms, _of(prepared, conv), strict=True))
    return lost / sum(norms) if sum(norms) > 0 else 0.0


def kernels(
    form: Format, conv: Conv, prepared: Prepared, ranks: Ranks, stabiliser: StabiliseSpec = STABILISED
) -> list[Tensor]:
    """Kernels of the stages in a gauge that trains well: the orthonormal one, or for fits their own.

    Raises:
        RankError: ranks out of bounds.
        DecompositionError: a fit or the gauge failed.
    """
    check_ranks(form, conv, ranks)
    plain = all(stage.groups == 1 for stage in form.stages(conv.group, ranks))
    try:
        found = [form.factors(part, ranks, stabiliser) for part in _of(prepared, conv)]
        if form.nested and plain:
            found = [orthonormal_gauge(weights) for weights in found]
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined, unused-ignore]  # public, not re-exported
        raise DecompositionError(
            f"{form.name} at ranks {ranks} did not converge: {error}. Leave this layer dense, or change its ranks."
        ) from error
    side_by_side = _side_by_side(found)
    if not all(bool(torch.isfinite(weight).all()) for weight in side_by_side):
        raise DecompositionError(
            f"{form.name} at ranks {ranks} gave factors that are not finite. "
            "Leave this layer dense, or change its ranks."
        )
    if form.nested:
        return side_by_side
    # Strides as a cache gives them back, along axes of size 1 too: the last bits of a convolution depend on them.
    dtype = prepared["weight"].dtype
    return [weight.to(dtype).clone(memory_format=torch.contiguous_format) for weight in side_by_side]


def regauged(form: OwnGauge, conv: Conv, kernels: Sequence[Tensor]) -> list[Tensor]:
    """The kernels of the stages of the same chain in the format's own gauge, group by group."""
    groups = zip(*(kernel.chunk(conv.groups) for kernel in kernels), strict=True)
    return _side_by_side([form.gauge(group) for group in groups])


def _side_by_side(groups: list[list[Tensor]]) -> list[Tensor]:
    """The kernels of every stage, those of all groups one after the other."""
    return groups[0] if len(groups) == 1 else [torch.cat(kernels) for kernels in zip(*groups, strict=True)]


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
        bias = prepared["output_mean"] - response(compressed_stages(form, conv, ranks), weights, prepared["patch_mean"])
    return weights, weights[-1].new_zeros(conv.out_channels) if bias is None else bias


def response(stages: Sequence[Conv], weights: Sequence[Tensor], patch: Tensor) -> Tensor:
    """Output ``(T,)`` of the chain, without bias, to one patch ``(S, *kernel)`` under the kernel."""
    out = patch[None]
    for stage, weight in zip(stages, weights, strict=True):
        convolve = (F.conv1d, F.conv2d, F.conv3d)[stage.ndim - 1]
        if stage.tied > 1:
            shared = weight.chunk(stage.groups // stage.tied)
            weight = torch.cat([kernel for kernel in shared for _ in range(stage.tied)])
        out = convolve(out, weight.to(out.dtype), groups=stage.groups)
    return out.flatten()


def pointwise(matrix: Tensor, ndim: int) -> Tensor:
    """A matrix ``(out, in)`` as a kernel of size 1 along ``ndim`` axes."""
    return matrix.reshape(*matrix.shape, *[1] * ndim)


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
