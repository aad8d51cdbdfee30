"""Tucker decomposition of some modes by higher-order orthogonal iteration (De Lathauwer, De Moor & Vandewalle 2000).

The start is the truncated HOSVD, one mode after the other on what is left (Vannieuwenhoven et al. 2012). A sweep gives
each mode the leading space of the tensor compressed in the other modes: one step of orthogonal iteration on its Gram
matrix, from the last space and a quarter more columns, then the best of that space (Rayleigh & Ritz), at a fraction of
an eigendecomposition. The error is at or below that of the HOSVD, but the bases belong to their ranks: a smaller rank
is not a slice.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ranksearch.decompositions.format import descending_eigh
from ranksearch.errors import DecompositionError, RankError


def hooi(tensor: Tensor, ranks: Mapping[int, int], *, sweeps: int = 3) -> tuple[Tensor, dict[int, Tensor]]:
    """The core, and orthonormal bases ``(I_n, ranks[n])`` of the modes named in ``ranks``, in the tensor's precision.

    Args:
        tensor: of any order; the core has its other modes whole.
        ranks: from mode to rank, 1 to the mode's size.
        sweeps: of orthogonal iteration after the truncated HOSVD.

    Raises:
        DecompositionError: the tensor is not finite.
        RankError: a rank is out of bounds.
    """
    for mode, rank in ranks.items():
        if not 1 <= rank <= tensor.shape[mode]:
            raise RankError(f"the rank of mode {mode} must be 1 to {tensor.shape[mode]}; found {rank}.")
    if not bool(torch.isfinite(tensor).all()):
        raise DecompositionError("the kernel holds NaN or infinite values. Check the pretrained weights.")
    wide: dict[int, Tensor] = {}
    for mode in ranks:
        vectors = descending_eigh(_gram(_projected(tensor, _leading(wide, ranks)), mode).double())[1]
        wide[mode] = vectors[:, : ranks[mode] + ranks[mode] // 4 + 8].to(tensor.dtype).contiguous()
    for _ in range(sweeps):
        for mode in ranks:
            rest = _projected(tensor, {n: b for n, b in _leading(wide, ranks).items() if n != mode})
            # In single precision the Gram matrix would blur the directions near the cut.
            gram = _gram(rest.double(), mode)
            space, _ = torch.linalg.qr(gram @ wide[mode].double())
            wide[mode] = (space @ descending_eigh(space.T @ gram @ space)[1]).to(tensor.dtype)
    bases = _leading(wide, ranks)
    return _projected(tensor, bases), bases


def _leading(wide: Mapping[int, Tensor], ranks: Mapping[int, int]) -> dict[int, Tensor]:
    return {mode: basis[:, : ranks[mode]] for mode, basis in wide.items()}


def _projected(tensor: Tensor, bases: Mapping[int, Tensor]) -> Tensor:
    """The tensor in these bases."""
    for mode, basis in bases.items():
        tensor = torch.tensordot(tensor, basis, ([mode], [0])).movedim(-1, mode)
    return tensor


def _gram(tensor: Tensor, mode: int) -> Tensor:
    rows = tensor.movedim(mode, 0).flatten(1)
    return rows @ rows.T
