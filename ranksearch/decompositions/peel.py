"""Starts of a CP decomposition: the leading singular triples of the slices of a tensor, and the tensor compressed.

The two largest modes span the slices; the others are rotated to their principal axes, so that few slices hold most of
the norm. The terms are orthogonal, there are as many as an exact decomposition needs, and the squared error falls by
the squared norm of each. On the residual of a fit they extend it to a higher rank without raising its error.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from ranksearch.decompositions.format import descending_eigh


def compressed(tensor: Tensor, rank: int) -> tuple[Tensor, list[Tensor]]:
    """The tensor in the leading eigenvectors of its modes, a quarter more than ``rank`` of each, and these bases."""
    core, bases = tensor, []
    for mode, size in enumerate(tensor.shape):
        keep = min(size, rank + max(8, rank // 4))
        if keep < size:
            rows = core.movedim(mode, 0).flatten(1)
            basis = descending_eigh((rows @ rows.T).double())[1][:, :keep].contiguous()
            core = torch.tensordot(basis.T.to(core.dtype), core, ([1], [mode])).movedim(0, mode)
        else:
            basis = torch.eye(size, dtype=torch.float64, device=tensor.device)
        bases.append(basis)
    return core.contiguous(), bases


def peel(tensor: Tensor, rank: int) -> tuple[Tensor, ...]:
    """Factors ``(I_n, rank)``, float64, of the leading terms; the norm of a term is in its column of the largest mode.

    Exact at the product of all sizes but the largest; columns beyond are 0.
    """
    core, bases = compressed(tensor.double(), rank)
    order = sorted(range(core.ndim), key=lambda mode: core.shape[mode])
    small, (rows, columns) = sorted(order[:-2]), order[-1:] + order[-2:-1]
    axes = []
    for mode in small:
        flat = core.movedim(mode, 0).flatten(1)
        axes.append(descending_eigh(flat @ flat.T)[1])
        core = torch.tensordot(axes[-1].T, core, ([1], [mode])).movedim(0, mode)
    slices = core.permute(*small, rows, columns).reshape(-1, core.shape[rows], core.shape[columns])
    energies, right = torch.linalg.eigh(slices.mT @ slices)
    chosen = energies.flatten().argsort(descending=True, stable=True)[:rank]
    piece, column = chosen // energies.shape[1], chosen % energies.shape[1]
    factors = [torch.empty(0)] * core.ndim
    factors[columns] = right[piece, :, column].T
    left = slices @ right
    factors[rows] = left[piece, :, column].T
    for mode, axis in zip(reversed(small), reversed(axes), strict=True):
        factors[mode] = axis[:, piece % axis.shape[0]]
        piece = piece // axis.shape[0]
    whole = [basis @ factor for basis, factor in zip(bases, factors, strict=True)]
    return tuple(functional.pad(f, (0, rank - f.shape[1])) for f in whole)
