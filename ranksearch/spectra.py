"""Singular values of the dense kernels' unfoldings, for the allocators that read them off the price table."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from ranksearch.conv import Conv
from ranksearch.stages import kernel_of
from ranksearch.table import PriceTable

_COLUMN_GROUPS = (1, 2, 4, 8)
"""Numbers of groups of input channels that ALDS chooses among, where they divide the channels."""


def with_spectra(table: PriceTable, model: nn.Module) -> PriceTable:
    """The table with the spectra of every searched layer of the dense ``model``."""
    layers = [
        replace(layer, spectra=spectra(layer.conv, kernel_of(model.get_submodule(layer.name))[0]))
        for layer in table.layers
    ]
    return replace(table, layers=tuple(layers))


@torch.no_grad()
def spectra(conv: Conv, weight: Tensor) -> tuple[tuple[str, tuple[float, ...]], ...]:
    """Singular values by unfolding, largest first, as :attr:`ranksearch.table.LayerPrices.spectra` has them.

    Args:
        conv: geometry of the layer; of a grouped one, at every place the largest among the groups.
        weight: kernel ``(T, S / groups, *spatial)``.
    """
    each = weight.double().reshape(conv.groups, -1, *weight.shape[1:])
    groups, t, s, first, *_ = each.shape
    split = each.reshape(groups, t, s, first, -1)
    matrices = {
        "in": split.transpose(1, 2).reshape(groups, s, -1),
        "out": split.reshape(groups, t, -1),
        "row": split.permute(0, 2, 3, 1, 4).reshape(groups, s * first, -1),
    }
    for count in (n for n in _COLUMN_GROUPS if s % n == 0):
        columns = split.reshape(groups, t, count, -1).transpose(1, 2)
        matrices[f"columns-{count}"] = columns.reshape(groups * count, t, -1)
    return tuple((name, tuple(torch.linalg.svdvals(m).amax(0).tolist())) for name, m in matrices.items())
