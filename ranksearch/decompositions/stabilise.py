"""Error Preserving Correction: CP factors of the same error that noise in the factors disturbs least.

Phan et al., "Stable Low-rank Tensor Decomposition for Compression of CNN" (arXiv 2008.05441). Plain ALS drifts into
components that grow and cancel; such factors neither train nor quantise. The measure is the sensitivity, the expected
squared error per unit variance of independent noise on all factors,

    ss = sum_r sum_n I_n prod_(m != n) |a_r^(m)|^2,

and the correction minimises it subject to ``|X - X_hat| <= delta``. In one factor A, the others fixed, ss is a weighted
norm ``sum_r w_r |a_r|^2`` plus a constant and the constraint a quadratic: the solutions are a ridge path
``A(mu) = P (K + mu W)^-1`` (P the tensor times the others, K their Gram matrix), and the one on the bound is the root
of a monotone scalar equation. Each update keeps the bound and cannot raise ss.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from ranksearch.decompositions.als import (
    Factors,
    accelerated,
    cp_tensor,
    others,
    rebalanced,
    squared_error,
    sweep,
)
from ranksearch.decompositions.peel import compressed
from ranksearch.errors import DecompositionError

Objective = Literal["sensitivity", "norms"]
SWEEPS = 60
TOLERANCE = 1e-3
_EXACT = 1e-12
"""Relative squared error under which a fit is exact: no room to correct it, and the bound drowns in rounding."""
_FLOOR = 1e-14
"""Least eigenvalue of a mode's system over its largest."""

_MARGIN = 1e-11
"""Share of a bound left to rounding, besides what the cancellation of the components costs."""


def cp_sensitivity(factors: Sequence[Tensor]) -> float:
    """Expected squared error of the tensor per unit variance of independent noise on every entry of the factors."""
    return _sensitivity(factors, [f.shape[0] for f in factors])


def rebalance(factors: Sequence[Tensor]) -> Factors:
    """The same tensor at its least sensitivity by scaling: in every component |a^(n)|^2 proportional to I_n."""
    return _balanced(factors, [f.shape[0] for f in factors])


def degeneracy(factors: Sequence[Tensor]) -> float:
    """Largest norm of a component over the norm of the tensor; far over 1 where components cancel."""
    whole = float(cp_tensor([f.double() for f in factors]).norm())
    largest = float(_product([f.double().norm(dim=0) for f in factors]).max())
    return largest / whole if whole > 0 else 0.0 if largest == 0 else math.inf


def correct(
    tensor: Tensor,
    factors: Sequence[Tensor],
    *,
    slack: float = 1.05,
    objective: Objective = "sensitivity",
    sweeps: int = SWEEPS,
    tolerance: float = TOLERANCE,
) -> Factors:
    """Factors of least sensitivity whose error stays within ``slack`` times that of ``factors``; rebalanced, float64.

    Args:
        tensor: the tensor that ``factors`` fit.
        factors: one ``(I_n, R)`` matrix a mode, of a preceding `cp_als`.
        slack: bound on the norm of the residual, as a multiple of its present norm, from 1. An exact fit has no room
            to correct and is only rebalanced.
        objective: ``sensitivity``, or ``norms``: the sum of the components' squared norms.
        sweeps: the most sweeps.
        tolerance: stop when a sweep lowers the objective by less than this share.

    Raises:
        DecompositionError: ``slack`` is below 1, or the tensor or the factors are not finite.
    """
    if not slack >= 1:
        raise DecompositionError(f"the slack must be at least 1, the error that the factors have; found {slack}.")
    unit, norm, factors = _normalised(tensor, factors)
    error = squared_error(unit, factors) if norm > 0 else 0.0
    bound = slack * slack * error
    if error <= _EXACT or bound >= 1.0:
        return _scaled(factors, norm)
    descend = partial(_descended, sizes=unit.shape, objective=objective, tolerance=tolerance)
    core, bases = _within(unit, factors)
    if core.numel() <= unit.numel() // 2:
        inside = [b.T @ f for b, f in zip(bases, factors, strict=True)]
        better = descend(core, inside, bound - (1.0 - float(core.square().sum())), sweeps=sweeps)
        factors = tuple(b @ f for b, f in zip(bases, better, strict=True))
        sweeps = sweeps // 4
    return _scaled(descend(unit, factors, bound, sweeps=sweeps), norm)


def bounded(
    tensor: Tensor,
    factors: Sequence[Tensor],
    *,
    limit: float,
    sweeps: int = SWEEPS,
    tolerance: float = TOLERANCE,
) -> Factors:
    """Factors of least error whose sensitivity is at most ``limit``: the dual of `correct`; rebalanced, float64.

    Factors over the limit are shrunk to it first; then every update lowers the error and keeps the limit.

    Args:
        tensor: the tensor that ``factors`` fit.
        factors: one ``(I_n, R)`` matrix a mode.
        limit: bound on `cp_sensitivity`, above 0.
        sweeps: the most sweeps.
        tolerance: stop when a sweep lowers the squared error by less than this share.

    Raises:
        DecompositionError: ``limit`` is not above 0, or the tensor or the factors are not finite.
    """
    if not limit > 0:
        raise DecompositionError(f"the limit on the sensitivity must be above 0; found {limit}.")
    unit, norm, factors = _normalised(tensor, factors)
    if norm == 0:
        return _scaled(factors, norm)
    order = len(factors)
    cap = limit * norm ** (-2 * (order - 1) / order)
    shrink = min(1.0, cap / max(cp_sensitivity(factors), 1e-300)) ** (0.5 / (order - 1))
    factors = tuple(f * shrink for f in factors)
    update = partial(_least_error, limit=cap, sizes=unit.shape)

    def step(factors: Factors, _: float) -> tuple[Factors, float]:
        new, product, grams = sweep(unit, factors, update)
        error = _error(1.0, product, new, grams)
        return (new := rebalance(new)), error if cp_sensitivity(new) <= cap * (1 + 1e-13) else math.inf

    error = squared_error(unit, factors)
    return _scaled(accelerated(factors, error, step, sweeps=sweeps, tolerance=tolerance, enough=_EXACT)[0], norm)


def _normalised(tensor: Tensor, factors: Sequence[Tensor]) -> tuple[Tensor, float, Factors]:
    """The tensor at norm 1, its norm, and the factors to match, rebalanced; float64 throughout."""
    norm = float(torch.linalg.vector_norm(tensor, dtype=torch.float64))
    if not math.isfinite(norm) or not all(bool(torch.isfinite(f).all()) for f in factors):
        raise DecompositionError("the kernel or its factors hold NaN or infinite values. Decompose it afresh.")
    scale = norm if norm > 0 else 1.0
    doubles = [f.detach().double() for f in factors]
    return tensor.detach().double() / scale, norm, rebalance([*doubles[:-1], doubles[-1] / scale])


def _scaled(factors: Factors, norm: float) -> Factors:
    """The factors of the unit tensor as those of the tensor."""
    return rebalance([*factors[:-1], factors[-1] * (norm if norm > 0 else 1.0)])


def _within(tensor: Tensor, factors: Factors) -> tuple[Tensor, list[Tensor]]:
    """The tensor in bases that hold the factors and the leading eigenvectors of its modes, and these bases.

    The factors keep their residual there, but for the part of the tensor outside, which no factors inside can change.
    """
    rank, core = factors[0].shape[1], tensor
    _, leading = compressed(tensor, rank // 4)
    bases = []
    for mode, (factor, axes) in enumerate(zip(factors, leading, strict=True)):
        both = torch.cat([factor, axes[:, : rank // 4]], 1)
        basis = torch.linalg.qr(both)[0] if both.shape[1] < both.shape[0] else torch.eye(len(both)).to(both)
        core = torch.tensordot(basis.T, core, ([1], [mode])).movedim(0, mode)
        bases.append(basis)
    return core.contiguous(), bases


def _descended(
    tensor: Tensor,
    factors: Sequence[Tensor],
    bound: float,
    *,
    sizes: Sequence[int],
    objective: Objective,
    sweeps: int,
    tolerance: float,
) -> Factors:
    """Sweeps that lower the objective, of factors of modes of these sizes, at a squared error up to ``bound``."""
    total = float(tensor.square().sum())
    update = partial(_least_sensitive, total=total, bound=bound, sizes=sizes, objective=objective)

    def step(factors: Factors, _: float) -> tuple[Factors, float]:
        new, product, grams = sweep(tensor, factors, update)
        kept = _error(total, product, new, grams) <= bound
        return (new := _balanced(new, sizes)), _objective(new, sizes, objective) if kept else math.inf

    start = _balanced(factors, sizes)
    return accelerated(start, _objective(start, sizes, objective), step, sweeps=sweeps, tolerance=tolerance)[0]


def _balanced(factors: Sequence[Tensor], sizes: Sequence[int]) -> Factors:
    """In every component the squared norms of the columns proportional to the sizes."""
    mean = math.prod(sizes) ** (0.5 / len(sizes))
    balanced = rebalanced([f.double() for f in factors])
    return tuple(f * (n**0.5 / mean) for f, n in zip(balanced, sizes, strict=True))


def _sensitivity(factors: Sequence[Tensor], sizes: Sequence[int]) -> float:
    squares = [f.double().square().sum(0) for f in factors]
    return float(torch.stack([n * _product(squares, mode) for mode, n in enumerate(sizes)]).sum())


def _objective(factors: Sequence[Tensor], sizes: Sequence[int], objective: Objective) -> float:
    if objective == "sensitivity":
        return _sensitivity(factors, sizes)
    return float(_product([f.square().sum(0) for f in factors]).sum())


def _product(values: Sequence[Tensor], *without: int) -> Tensor:
    """The product over the modes, some left out."""
    return math.prod((v for n, v in enumerate(values) if n not in without), start=torch.ones_like(values[0]))


def _weights(squares: Sequence[Tensor], mode: int, sizes: Sequence[int], objective: Objective) -> Tensor:
    """``w_r``: the factor of |a_r|^2 of one mode in the objective, from the squared column norms of the others."""
    if objective == "norms":
        return _product(squares, mode)
    return torch.stack([sizes[m] * _product(squares, m, mode) for m in range(len(squares)) if m != mode]).sum(0)


def _least_sensitive(
    mode: int,
    product: Tensor,
    grams: list[Tensor],
    old: Tensor,
    *,
    total: float,
    bound: float,
    sizes: Sequence[int],
    objective: Objective,
) -> Tensor:
    """The factor of least weighted norm among those of squared error ``bound``; ``total`` is that of the tensor.

    Along the path the error is ``total - sum f^2/e + sum f^2 mu^2 / (e (e + mu)^2)``; its root is found in ``1 / mu``.
    """
    weights = _weights([g.diagonal() for g in grams], mode, sizes, objective)
    path = _RidgePath(product, others(grams, mode), weights)
    rounding = 64 * torch.finfo(torch.float64).eps * (total + float(_product([g.diagonal() for g in grams]).sum()))
    room = bound * (1 - _MARGIN) - rounding - (total - float((path.squares / path.values).sum()))
    if room <= 0:
        return path.factor(0.0)
    inverse = _root(path.squares / path.values**3, 1 / path.values, room)
    return path.factor(1 / inverse if inverse > 0 else math.inf)


def _least_error(
    mode: int, product: Tensor, grams: list[Tensor], old: Tensor, *, limit: float, sizes: Sequence[int]
) -> Tensor:
    """The factor of least squared error among those of sensitivity at most ``limit``."""
    squares = [g.diagonal() for g in grams]
    path = _RidgePath(product, others(grams, mode), _weights(squares, mode, sizes, "sensitivity"))
    room = limit * (1 - 1e-13) - sizes[mode] * float(_product(squares, mode).sum())
    if room <= 0:
        return old
    return path.factor(_root(path.squares, path.values, room))


def _error(total: float, product: Tensor, factors: Factors, grams: list[Tensor]) -> float:
    """Squared error of the factors of a sweep over a tensor of squared norm ``total``."""
    return float(total - 2.0 * (product * factors[-1]).sum() + (others(grams, len(grams) - 1) * grams[-1]).sum())


class _RidgePath:
    """``A(mu) = P (K + mu W)^-1`` diagonalised: ``values`` e of the scaled K, ``squares`` f^2 of the rotated P."""

    def __init__(self, product: Tensor, gram: Tensor, weights: Tensor) -> None:
        self.scale = torch.where(weights > 0, weights, 1.0).rsqrt()
        values, self.vectors = torch.linalg.eigh(gram * self.scale * self.scale[:, None])
        self.values = values.clamp_min(float(values[-1]) * _FLOOR + 1e-300)
        self.rotated = (product * self.scale) @ self.vectors
        self.squares = self.rotated.square().sum(0)

    def factor(self, mu: float) -> Tensor:
        """``A(mu)``."""
        factor: Tensor = (self.rotated / (self.values + mu)) @ (self.vectors.T * self.scale)
        return factor


def _root(numerators: Tensor, poles: Tensor, target: float) -> float:
    """The ``x >= 0`` where ``sum numerators / (poles + x)^2`` falls to ``target``; 0 where it is below already.

    Newton on the sum to the power -1/2, which is concave and almost straight in x: from 0 the iterates rise to the
    root and never pass it (Reinsch 1971; More & Sorensen 1983).
    """
    x = 0.0
    for _ in range(100):
        shifted = poles + x
        terms = numerators / shifted.square()
        value, slope = float(terms.sum()), float((terms / shifted).sum())
        if value <= target * (1 + 1e-14) or slope <= 0:
            break
        step = value / slope * ((value / target) ** 0.5 - 1)
        x, before = x + step, x
        if x == before:
            break
    return x
