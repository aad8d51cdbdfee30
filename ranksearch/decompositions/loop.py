"""The shared-core block-term decomposition of a kernel, which is the order-3 tensor chain: fit, gauge, correction.

``W[d, s, t] = sum_{r, a, b} G[d, a, b] U[s, r, a] V[t, r, b]`` (Phan et al., arXiv 2203.02617): R blocks, each a
Tucker-2 with bases of its own and a core shared by all. R = 1 is Tucker-2, p = q = 1 is CP with one spatial filter. The
cores form a loop with bonds (R, p, q). A fit is alternating least squares on the normal equations, extrapolated (Ang,
Cohen and Gillis 2019). The sensitivity of a loop can grow without bound while its error falls; two cures: the gauge of
every bond in closed form (ours; the tensor is unchanged), and error-bounded alternating least squares, which spends a
little more error on far less sensitivity. All is float64 inside, bounded in sweeps, and deterministic.

Inside, the cores are the ring of :mod:`~ranksearch.decompositions.loop_core`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, einsum

from ranksearch.decompositions.loop_core import (
    Ring,
    bounded_ridge,
    least_squares,
    left_gram,
    replaced,
    right_gram,
    sweep,
)
from ranksearch.decompositions.loop_starts import hooi, leading, starts
from ranksearch.errors import DecompositionError, RankError

Cores = tuple[Tensor, Tensor, Tensor]
"""G (D, p, q), U (S, R, p) and V (T, R, q)."""
Ranks = tuple[int, int, int]
"""(R, p, q)."""

_TRIAL_SWEEPS = 8
"""Sweeps that every start gets before the better half goes on."""
_FLOOR = 1e-9
"""Of the two forms that the gauge of a bond balances, as a share of their traces."""
_PATIENCE = 3
"""Small gains in a row that end a fit: after an undone step a single one is small by chance."""
_EXACT = 1e-13
"""Relative squared error below which a fit is exact: what double precision can tell from zero through a Gram."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ChainFit:
    """A fitted chain."""

    cores: Cores
    """In the dtype of the tensor, and in the gauge of :func:`regauge`."""
    error: float
    """Squared norm of the residual over that of the tensor, 0 to 1."""
    sweeps: int
    """Sweeps over the cores on the way to them."""


@contextmanager
def _converging() -> Iterator[None]:
    try:
        yield
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined, unused-ignore]  # public, not re-exported
        raise DecompositionError(f"a chain did not converge: {error}. Leave this layer dense.") from error


def chain_tensor(cores: Cores) -> Tensor:
    """The tensor ``(D, S, T)`` of a chain."""
    core, first, last = cores
    return einsum("dsrb,trb->dst", einsum("dab,sra->dsrb", core, first), last)


def chain_sensitivity(cores: Cores) -> float:
    """Expected squared error of the tensor per unit variance of independent noise on the entries of the cores.

    ``sum_n I_n ‖chain without core n‖²``; each norm is the inner product of two Grams of the size of a bond.
    """
    return _sensitivity(_ring(cores))


@_converging()
def regauge(cores: Cores, *, sweeps: int = 30, tolerance: float = 1e-3) -> Cores:
    """The same tensor by cores of the least sensitivity that changes of basis on the bonds reach.

    Per bond the best basis is known in closed form; the three bonds take turns until the sensitivity falls by less than
    ``tolerance`` (relative) in a sweep. The basis change is the symmetric one: cores that are balanced already stay as
    they are, so that it can run during training, every few steps (one to three sweeps suffice there).

    Raises:
        DecompositionError: the cores hold NaN or infinite values.
    """
    _require_finite("the cores", *cores)
    ring = _ring(cores)
    before = _sensitivity(ring)
    for _ in range(sweeps):
        ring = _gauge_sweep(ring)
        after = _sensitivity(ring)
        if before - after <= tolerance * before:
            break
        before = after
    return _cast(_cores(ring), cores[0].dtype)


@_converging()
def chain_als(
    tensor: Tensor,
    ranks: Ranks,
    *,
    start: Cores | None = None,
    sweeps: int = 100,
    tolerance: float = 1e-4,
    restarts: int = 1,
    seed: int = 0,
) -> ChainFit:
    """Fit a chain by alternating least squares.

    Args:
        tensor: ``(D, S, T)``, finite; float32 is computed in float64.
        ranks: ``(R, p, q)``.
        start: cores to start from instead of the built-in starts; of these ranks.
        sweeps: bound on the sweeps.
        tolerance: stop when sweeps in a row change the error by less than this each (relative).
        restarts: 1 for the two starts made from the tensor alone; each one more adds a random start.
        seed: of the random starts, and of directions that the tensor does not provide.

    Raises:
        RankError: ranks out of bounds.
        DecompositionError: NaN or infinite values, or a start of other shapes.
    """
    _check(tensor, ranks, start)
    _require_finite("the kernel and the start", tensor, *(start or ()))
    scale = torch.linalg.vector_norm(tensor.double())
    blocks, p, q = ranks
    if not float(scale) > 0.0:
        core, first, last = (tensor.new_zeros(shape) for shape in _shapes(tensor, ranks))
        return ChainFit(cores=(core, first, last), error=0.0, sweeps=0)
    unit = tensor.double() / scale
    begin = None if start is None else _ring((start[0] / scale, start[1], start[2]))
    if (p, q) == tuple(tensor.shape[1:]):
        ring, used = _exact(unit, blocks), 0
    elif blocks == 1:
        ring, used = hooi(unit, p, q, None if begin is None else begin[2], sweeps, tolerance)
    elif begin is not None:
        ring, _, used = _descend(unit, begin, sweeps, tolerance)
    else:
        ring, used = _fit(unit, ranks, restarts, seed, sweeps, tolerance)
    cores = regauge(_cores((ring[0] * scale, ring[1], ring[2])))
    return ChainFit(cores=_cast(cores, tensor.dtype), error=min(_error(unit, scale, cores), 1.0), sweeps=used)


@_converging()
def correct_chain(
    tensor: Tensor, cores: Cores, *, slack: float = 1.05, sweeps: int = 20, tolerance: float = 1e-3
) -> Cores:
    """Cores of less sensitivity whose error norm is at most ``slack`` times that of ``cores``.

    Core after core takes the value of least sensitivity within the bound, in closed form but for one scalar (a ridge
    path; arXiv 2008.05441 for CP), each sweep followed by the gauge of the bonds. An exact chain is only re-gauged, and
    the bound never goes beyond half of what the chain explains, so that the answer is never nought.

    Args:
        tensor: ``(D, S, T)``, what the chain was fitted to.
        cores: the fit.
        slack: at least 1; 1.03 to 1.05 is where most of the gain is.
        sweeps: bound on the sweeps.
        tolerance: stop when a sweep lowers the sensitivity by less than this (relative).

    Raises:
        DecompositionError: values that are not finite, or a slack below 1.
    """
    if not slack >= 1.0:
        raise DecompositionError(f"slack must be at least 1, found {slack}. 1.05 is a good value.")
    _require_finite("the kernel and its cores", tensor, *cores)
    balanced = regauge(_cast(cores, torch.float64))
    scale = torch.linalg.vector_norm(tensor.double()).clamp_min(torch.finfo(torch.float64).tiny)
    unit = tensor.double() / scale
    error = _error(unit, scale, balanced)
    if not _EXACT < error < 1.0:
        return _cast(balanced, cores[0].dtype)
    bound = min(slack**2 * error, (error + 1.0) / 2)
    ring = _ring((balanced[0] / scale, balanced[1], balanced[2]))
    before = _sensitivity(ring)
    for _ in range(sweeps):
        ring, _ = sweep(unit, ring, partial(bounded_ridge, bound=bound), weighted=True)
        ring = _gauge_sweep(ring)
        after = _sensitivity(ring)
        if before - after <= tolerance * before:
            break
        before = after
    corrected = regauge(_cores((ring[0] * scale, ring[1], ring[2])))
    # The bound is kept through Grams; where rounding broke it, the re-gauged fit is the answer.
    kept = _error(unit, scale, corrected) <= bound * (1 + 1e-6)
    return _cast(corrected if kept else balanced, cores[0].dtype)


# -- the ring -------------------------------------------------------------------------------------------------------


def _exact(unit: Tensor, blocks: int) -> Ring:
    """The tensor itself as the core of the first block; there is nothing left for the others."""
    _, s, t = unit.shape
    first, last = unit.new_zeros(s, s, blocks), unit.new_zeros(t, blocks, t)
    first[:, :, 0].fill_diagonal_(1.0)
    last[:, 0].fill_diagonal_(1.0)
    return unit.transpose(1, 2).contiguous(), first, last


def _ring(cores: Cores) -> Ring:
    core, first, last = (value.detach().double() for value in cores)
    return core.transpose(1, 2).contiguous(), first.transpose(1, 2).contiguous(), last.contiguous()


def _cores(ring: Ring) -> Cores:
    return ring[0].transpose(1, 2).contiguous(), ring[1].transpose(1, 2).contiguous(), ring[2].contiguous()


def _cast(cores: Cores, dtype: torch.dtype) -> Cores:
    return cores[0].to(dtype), cores[1].to(dtype), cores[2].to(dtype)


def _error(unit: Tensor, scale: Tensor, cores: Cores) -> float:
    """Squared norm of the residual over that of the tensor, which is ``scale`` times ``unit``."""
    return float((unit - chain_tensor(cores) / scale).square().sum())


def _sensitivity(ring: Ring) -> float:
    terms = [ring[n - 1].shape[0] * (right_gram(ring[n]) * left_gram(ring[(n + 1) % 3])).sum() for n in range(3)]
    return float(sum(terms[1:], terms[0]))


def _check(tensor: Tensor, ranks: Ranks, start: Cores | None) -> None:
    if tensor.ndim != 3:
        raise DecompositionError(f"a chain is fitted to a tensor (D, S, T), found the shape {tuple(tensor.shape)}.")
    _, s, t = tensor.shape
    if not (min(ranks) >= 1 and ranks[1] <= s and ranks[2] <= t):
        raise RankError(
            f"ranks of a chain must be (R, p, q) with R >= 1, 1 <= p <= {s} and 1 <= q <= {t}; found {ranks}. "
            "Choose ranks within the bounds."
        )
    shapes = [tuple(core.shape) for core in start] if start is not None else []
    if start is not None and shapes != _shapes(tensor, ranks):
        raise DecompositionError(f"the start's cores must be {_shapes(tensor, ranks)} for {ranks}, found {shapes}.")


def _shapes(tensor: Tensor, ranks: Ranks) -> list[tuple[int, ...]]:
    (d, s, t), (blocks, p, q) = tensor.shape, ranks
    return [(d, p, q), (s, blocks, p), (t, blocks, q)]


def _require_finite(what: str, *values: Tensor) -> None:
    if not all(bool(torch.isfinite(value).all()) for value in values):
        raise DecompositionError(f"{what} must be finite, found NaN or infinite values. Check the weights.")


# -- the gauge of a bond --------------------------------------------------------------------------------------------


def _gauge_sweep(ring: Ring) -> Ring:
    for n in range(3):
        a, b, c = (ring[(n + i) % 3] for i in range(3))
        # The terms of the sensitivity that a basis P on the bond a-b changes: tr(Pᵀ after P) of the open chain c, a
        # and tr(P⁻¹ before P⁻ᵀ) of b, c, each times the size of the missing core's mode.
        through = einsum("lm,ilx->imx", right_gram(c), a)
        after = b.shape[0] * einsum("imx,imy->xy", through, a)
        through = einsum("lm,jxl->jxm", left_gram(c), b)
        before = a.shape[0] * einsum("jxm,jym->xy", through, b)
        basis = _best_basis(after, before)
        if basis is not None:
            ring = replaced(replaced(ring, n, a @ basis[0]), (n + 1) % 3, einsum("xy,jym->jxm", basis[1], b))
    return ring


def _best_basis(after: Tensor, before: Tensor) -> tuple[Tensor, Tensor] | None:
    """``P`` and its inverse with the least ``tr(Pᵀ after P) + tr(P⁻¹ before P⁻ᵀ)``; None where nothing is gained.

    With ``Q = P Pᵀ`` the best has ``Q after Q = before``: ``Q = L⁻ᵀ (Lᵀ before L)^½ L⁻¹`` for ``after = L Lᵀ``. Both
    are floored, for bonds that the chain does not fill. ``P`` is the symmetric root of Q.
    """
    sizes = torch.stack([after.trace(), before.trace()])
    if not bool((sizes > 0).all()) or not bool(torch.isfinite(sizes).all()):
        return None
    eye = torch.eye(after.shape[0], dtype=after.dtype, device=after.device)
    lower, failed = torch.linalg.cholesky_ex(after + _FLOOR * sizes[0] * eye)
    if int(failed):
        return None
    values, vectors = torch.linalg.eigh(lower.T @ (before + _FLOOR * sizes[1] * eye) @ lower)
    # None is truly smaller than the product of both floors; by rounding some are, or even negative.
    root = vectors * values.clamp_min(_FLOOR**2 * sizes.prod()).pow(0.25)
    left, stretch, _ = torch.linalg.svd(torch.linalg.solve_triangular(lower.T, root, upper=True))
    basis, inverse = (left * stretch) @ left.T, (left / stretch) @ left.T
    gained = (basis @ after * basis).sum() + (inverse @ before * inverse).sum() < sizes.sum()
    return (basis, inverse) if bool(gained) else None


# -- fitting --------------------------------------------------------------------------------------------------------


def _fit(unit: Tensor, ranks: Ranks, restarts: int, seed: int, sweeps: int, tolerance: float) -> tuple[Ring, int]:
    """A few sweeps from every start, a few more from the better half, and so on; the rest from the best one.

    In the leading subspaces first, where that is far cheaper: a chain reaches no more than R p and R q dimensions of
    the two channel modes, and nearly the leading ones; after half of the sweeps there, a tenth in full is plenty.
    """
    blocks, p, q = ranks
    small, bases = unit, None
    if 4 * blocks * p * blocks * q <= unit.shape[1] * unit.shape[2]:
        first, last = leading(unit, blocks * p, blocks * q)
        bases = first[:, :, 0], last[:, 0]
        small = bases[0].T @ unit @ bases[1]
    rings, used, error = list(starts(small, ranks, restarts, seed)), 0, float("inf")
    while len(rings) > 1 and used < sweeps:
        trial = min(_TRIAL_SWEEPS, sweeps - used)
        tried = sorted((_descend(small, ring, trial, tolerance) for ring in rings), key=lambda fit: fit[1])
        rings, error, used = [ring for ring, _, _ in tried[: len(rings) // 2]], tried[0][1], used + trial
    ring, limit = rings[0], sweeps if bases is None else used + sweeps // 2
    if error > _EXACT and used < limit:
        ring, error, more = _descend(small, ring, limit - used, tolerance)
        used += more
    if bases is not None:
        ring = ring[0], einsum("sx,xpr->spr", bases[0], ring[1]), einsum("tx,xrq->trq", bases[1], ring[2])
        ring, error, more = _descend(unit, ring, max(sweeps // 10, 1), tolerance)
        used += more
    return ring, used


def _descend(unit: Tensor, ring: Ring, sweeps: int, tolerance: float) -> tuple[Ring, float, int]:
    """Sweeps, each from a point some way beyond what the last one reached; where that does not pay it is undone."""
    at, error, ahead, longest, small_gains = ring, float("inf"), 0.3, 1.0, 0
    for used in range(1, sweeps + 1):
        new, reached = sweep(unit, at, least_squares)
        if not reached <= error:
            at, longest, ahead = ring, ahead, ahead / 2
            continue
        small_gains = small_gains + 1 if error - reached <= tolerance * reached else 0
        if small_gains == _PATIENCE or reached <= _EXACT:
            return new, reached, used
        core, first, last = (x + (ahead if used > 1 else 0.0) * (x - y) for x, y in zip(new, ring, strict=True))
        at, ring, error = (core, first, last), new, reached
        ahead, longest = min(longest, 1.1 * ahead), min(1.5, 1.05 * longest)
    return ring, error, sweeps
