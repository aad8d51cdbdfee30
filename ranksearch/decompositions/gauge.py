"""The gauge of a chain of plain stages: which of the many equal chains is taken.

An invertible matrix between two stages leaves the network unchanged, yet decides how well it trains.
"""

from __future__ import annotations

import torch
from torch import Tensor


def orthonormal_gauge(weights: list[Tensor]) -> list[Tensor]:
    """The same chain with orthonormal outer factors and the magnitude in the middle.

    Stages before the middle get orthonormal rows, those after it orthonormal columns; of two stages, both share the
    singular values evenly. Kernels are ``(out, in, *kernel)``; no stage has groups.
    """
    weights = list(weights)
    middle = len(weights) // 2
    for i in range(middle):
        rows = weights[i].flatten(1)
        if rows.shape[0] <= rows.shape[1]:
            q, r = torch.linalg.qr(rows.T)
            weights[i] = q.T.reshape(weights[i].shape)
            weights[i + 1] = torch.einsum("oi...,ji->oj...", weights[i + 1], r)
    for i in range(len(weights) - 1, max(middle, 1) - 1, -1):
        columns = weights[i].movedim(1, -1)
        if weights[i].shape[1] <= columns.flatten(0, -2).shape[0] and i > middle:
            q, r = torch.linalg.qr(columns.flatten(0, -2))
            weights[i] = q.reshape(columns.shape).movedim(-1, 1)
            weights[i - 1] = torch.einsum("oi...,jo->ji...", weights[i - 1], r)
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
    first = torch.einsum("ri,is...->rs...", root[:, None] * vh, first)
    return [first, (u * root).reshape(columns.shape).movedim(-1, 1)]
