"""Formats of one rank and two stages: ``svd``, ``channel-svd`` and ``spatial-svd``.

``svd`` (1x1 and linear layers) and ``channel-svd`` (kernel S to r, 1x1 r to T; Zhang et al. 2015) are one idea: the
kernel as a T x (S height width) matrix. Weight-only its truncated SVD; activation-aware the projection on the leading
eigenvectors of the output covariance, which is the best for the layer's output. ``spatial-svd`` (Jaderberg et al. 2014)
splits the kernel into a column and a row; activation-aware after whitening the input mode. All are nested.
"""

from __future__ import annotations

from math import prod

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
from ranksearch.errors import UnsupportedLayer
from ranksearch.space import StabiliseSpec


class ChannelSvd:
    """Rank ``(r,)``: the kernel with r outputs, then a 1x1 that mixes them."""

    name = "channel-svd"
    nested = True
    pointwise = False

    def max_rank(self, conv: Conv) -> Ranks:
        """``(min(T, S times the kernel's size),)``."""
        require_plain(conv, self.name, pointwise=self.pointwise)
        return (min(conv.out_channels, conv.in_channels * prod(conv.kernel)),)

    def stages(self, conv: Conv, ranks: Ranks) -> tuple[Conv, ...]:
        """The kernel with every spatial field of the dense layer, then 1x1."""
        first = conv.resized(out_channels=ranks[0], bias=False)
        return first, first.after(conv.out_channels, bias=conv.bias)

    def prepare(self, weight: Tensor, statistics: Statistics | None) -> Prepared:
        """``first`` (r, S, *kernel) and ``last`` (T, r) at full rank."""
        matrix = weight.flatten(1)
        if statistics is None:
            last, values, rows = torch.linalg.svd(matrix, full_matrices=False)
            energies = values.square()
            first = values[:, None] * rows
        else:
            # Within the kernel's column space, so that at full rank nothing is lost that calibration did not excite.
            space, _ = torch.linalg.qr(matrix)
            energies, vectors = descending_eigh(space.T @ statistics.output_covariance @ space)
            last = space @ vectors
            first = last.T @ matrix
        energy = kept(energies, energies.sum())
        first = first.reshape(-1, *weight.shape[1:])
        return {"first": first, "last": last, "energy": energy, "norm": energies.sum()}

    def error(self, prepared: Prepared, ranks: Ranks) -> float:
        """As ``energy`` tells."""
        return lost(prepared["energy"], ranks)

    def factors(self, prepared: Prepared, ranks: Ranks, stabiliser: StabiliseSpec = STABILISED) -> list[Tensor]:
        """Slices of the full-rank factors."""
        (rank,) = ranks
        first = prepared["first"][:rank]
        return [first, pointwise(prepared["last"][:, :rank], first.ndim - 2)]


class Svd(ChannelSvd):
    """Rank ``(r,)``: 1x1 S to r with the stride, 1x1 r to T."""

    name = "svd"
    pointwise = True


class SpatialSvd:
    """Rank ``(r,)``: a column (height x 1) S to r, then a row (1 x width) r to T."""

    name = "spatial-svd"
    nested = True

    def max_rank(self, conv: Conv) -> Ranks:
        """``(min(S height, T width),)``."""
        require_plain(conv, self.name, pointwise=False)
        if conv.ndim != 2:
            raise UnsupportedLayer(
                f"{self.name} splits rows from columns, the kernel {conv.kernel} has {conv.ndim} axes: use channel-svd"
            )
        return (min(conv.in_channels * conv.kernel[0], conv.out_channels * conv.kernel[1]),)

    def stages(self, conv: Conv, ranks: Ranks) -> tuple[Conv, ...]:
        """The column has the vertical stride, padding and dilation, the row the horizontal ones."""
        column = conv.resized(
            out_channels=ranks[0],
            kernel=(conv.kernel[0], 1),
            stride=(conv.stride[0], 1),
            padding=(conv.padding[0], 0),
            dilation=(conv.dilation[0], 1),
            output_padding=(conv.output_padding[0], 0),
            bias=False,
        )
        row = conv.resized(
            in_channels=ranks[0],
            kernel=(1, conv.kernel[1]),
            stride=(1, conv.stride[1]),
            padding=(0, conv.padding[1]),
            dilation=(1, conv.dilation[1]),
            output_padding=(0, conv.output_padding[1]),
            size=column.output_size,
        )
        return column, row

    def prepare(self, weight: Tensor, statistics: Statistics | None) -> Prepared:
        """``first`` (r, S, height, 1) and ``last`` (T, r, 1, width) at full rank."""
        t, s, height, width = weight.shape
        metric = None
        if statistics is not None:
            root, metric = square_roots(statistics.input_moment)
            weight = torch.einsum("tskl,sr->trkl", weight, root)
        matrix = weight.permute(1, 2, 0, 3).reshape(s * height, t * width)
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
        first = (left * values).T.reshape(-1, s, height, 1)
        if metric is not None:
            first = torch.einsum("rskl,su->rukl", first, metric)
        last = right.reshape(-1, t, 1, width).transpose(0, 1)
        return {"first": first, "last": last, "energy": kept(values.square(), values.square().sum())}

    def error(self, prepared: Prepared, ranks: Ranks) -> float:
        """As ``energy`` tells."""
        return lost(prepared["energy"], ranks)

    def factors(self, prepared: Prepared, ranks: Ranks, stabiliser: StabiliseSpec = STABILISED) -> list[Tensor]:
        """Slices of the full-rank factors."""
        (rank,) = ranks
        return [prepared["first"][:rank], prepared["last"][:, :rank]]
