"""Where the fit of a chain starts: Tucker-2 and its residuals, leading subspaces shared out, or chance.

Deflation can only improve on the Tucker-2 of the same core; subspaces dealt out to the blocks in turn, so that all have
like spectra for the core that they share, are better where the blocks are many.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, einsum

from ranksearch.decompositions.format import descending_eigh
from ranksearch.decompositions.loop_core import Ring, least_squares, left_gram, right_gram, step


def starts(unit: Tensor, ranks: tuple[int, int, int], restarts: int, seed: int) -> Iterator[Ring]:
    """Starts for the ranks (R, p, q): deflation, then shared subspaces, then ``restarts - 1`` random ones."""
    blocks, p, q = ranks
    generator = torch.Generator().manual_seed(seed)
    yield _deflated(unit, blocks, p, q)
    for attempt in range(restarts):
        bases = []
        for rows, rank in ((unit.transpose(0, 1).flatten(1), p), (unit.permute(2, 0, 1).flatten(1), q)):
            noise = torch.randn(len(rows), blocks * rank, generator=generator, dtype=torch.float64).to(unit.device)
            if attempt == 0:
                gram = rows @ rows.T
                vectors = descending_eigh(gram)[1][:, : blocks * rank]
                # Where there are more columns than directions, the rest are mixtures in proportion to their energy.
                extra = torch.nn.functional.normalize(gram @ noise[:, vectors.shape[1] :], dim=0)
                noise = torch.cat([vectors, extra], dim=1)
            bases.append(noise.reshape(len(rows), rank, blocks))
        first, last = bases[0], bases[1].transpose(1, 2)
        target = einsum("dtpr,trq->dqp", einsum("dst,spr->dtpr", unit, first), last)
        yield step((torch.zeros_like(target), first, last.contiguous()), 0, target, least_squares)[0]


def _deflated(unit: Tensor, blocks: int, p: int, q: int) -> Ring:
    """Tucker-2 for the first block and its core for all; every other block is fitted to what is left."""
    (core, first, last), _ = hooi(unit, p, q, None, 5, 0.0)
    firsts, lasts = [first], [last]
    residual = unit
    for _ in range(blocks - 1):
        residual = residual - einsum("dpt,spr->dst", einsum("dqp,trq->dpt", core, lasts[-1]), firsts[-1])
        ring: Ring = (core, *leading(residual, p, q))
        for _ in range(2):
            target = einsum("dsq,dqp->sp", einsum("dst,trq->dsq", residual, ring[2]), core)
            ring, _ = step(ring, 1, target[..., None], least_squares)
            target = einsum("dtp,dqp->tq", einsum("dst,spr->dtp", residual, ring[1]), core)
            ring, _ = step(ring, 2, target[:, None], least_squares)
        firsts.append(ring[1])
        lasts.append(ring[2])
    return core, torch.cat(firsts, dim=2), torch.cat(lasts, dim=1)


def leading(unit: Tensor, p: int, q: int) -> tuple[Tensor, Tensor]:
    """The leading eigenvectors of the two channel modes, as one block: (S, p, 1) and (T, 1, q)."""
    first = descending_eigh(left_gram(unit))[1][:, :p, None]
    last = descending_eigh(right_gram(unit))[1][:, None, :q]
    return first, last


def hooi(unit: Tensor, p: int, q: int, start: Tensor | None, sweeps: int, tolerance: float) -> tuple[Ring, int]:
    """Tucker-2 by higher-order orthogonal iteration (De Lathauwer et al. 2000): each basis the best for the other.

    ``unit`` (D, S, T) has norm 1; ``start`` is a first (T, 1, q). The ring with R = 1, and the iterations.
    """
    last = leading(unit, p, q)[1] if start is None else torch.linalg.qr(start.flatten(1))[0][:, None]
    error, used = float("inf"), 0
    for _ in range(max(sweeps, 1)):
        used += 1
        half = einsum("dst,trq->sdq", unit, last).flatten(1)
        first = descending_eigh(half @ half.T)[1][:, :p]
        half = einsum("dst,sp->tdp", unit, first)
        last = descending_eigh(half.flatten(1) @ half.flatten(1).T)[1][:, None, :q]
        core = einsum("tdp,trq->dqp", half, last)
        before, error = error, max(float(1 - core.square().sum()), 0.0)
        if before - error <= tolerance * error:
            break
    return (core, first[..., None].contiguous(), last.contiguous()), used
