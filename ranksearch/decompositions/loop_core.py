"""The best value of one core of a loop of three, the other two fixed: by least squares, or of least sensitivity.

The loop is a ring of ``X_n`` (size of the mode, left bond, right bond), the right bond of one being the left bond of
the next: the shared core G as (D, q, p), U as (S, p, R), V as (T, R, q). The error is quadratic in each of them, with a
normal matrix over its two bonds that follows from Grams of the size of bonds. Where that matrix is large (the shared
core's is pq x pq) its equations are solved in a Krylov space and it is never formed. The sensitivity is quadratic too
(arXiv 2203.02617), and diagonal in the eigenvectors of the neighbours' Grams; so least sensitivity within an error
bound is a ridge path with one scalar to find (arXiv 2008.05441, for CP).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, einsum

from ranksearch.decompositions.format import descending_eigh

Ring = tuple[Tensor, Tensor, Tensor]

_DIRECT = 320
"""Unknowns in a row of a core above which its equations are solved in a Krylov space instead of by factorisation."""
_KRYLOV = 8
"""Dimensions of that space: the core in hand is in it, so that a small space makes an update weak, never wrong."""


def left_gram(x: Tensor) -> Tensor:
    """Gram over the left bond."""
    rows = x.transpose(0, 1).flatten(1)
    return rows @ rows.T


def right_gram(x: Tensor) -> Tensor:
    """Gram over the right bond."""
    rows = x.flatten(0, 1)
    return rows.T @ rows


def replaced(ring: Ring, n: int, value: Tensor) -> Ring:
    """The ring with another core n."""
    core, first, last = (value if i == n else other for i, other in enumerate(ring))
    return core, first, last


@dataclass(frozen=True, kw_only=True, eq=False)
class System:
    """Squared error ``1 - 2 <target, y> + <y gamma, y>`` of a tensor of norm 1 as a function of one core.

    Coordinates ``y`` are (rows, k); where the system is weighted, the sensitivity is ``‖y‖²`` and a constant.
    """

    gamma: Tensor
    target: Tensor
    old: Tensor
    """Coordinates of the core in hand."""
    lift: Callable[[Tensor], Tensor]
    """From coordinates to the core."""

    def error(self, y: Tensor) -> float:
        """Squared error at ``y``."""
        return max(float(1 - 2 * (self.target * y).sum() + (y @ self.gamma * y).sum()), 0.0)


Update = Callable[[System], Tensor]
"""New coordinates of the core."""


def sweep(unit: Tensor, ring: Ring, update: Update, *, weighted: bool = False) -> tuple[Ring, float]:
    """Update every core once; the ring and its squared error for ``unit`` (D, S, T), a tensor of norm 1."""
    half = einsum("dst,trq->dsrq", unit, ring[2])
    ring, _ = step(ring, 1, einsum("dsrq,dqp->spr", half, ring[0]), update, weighted=weighted)
    half = einsum("dst,spr->dtpr", unit, ring[1])
    ring, _ = step(ring, 2, einsum("dtpr,dqp->trq", half, ring[0]), update, weighted=weighted)
    return step(ring, 0, einsum("dtpr,trq->dqp", half, ring[2]), update, weighted=weighted)


def step(ring: Ring, n: int, target: Tensor, update: Update, *, weighted: bool = False) -> tuple[Ring, float]:
    """Update core n; ``target`` is the tensor contracted with the other two, in the shape of the core."""
    system = _system(ring, n, target, weighted)
    y = update(system)
    return replaced(ring, n, system.lift(y)), system.error(y)


def least_squares(system: System) -> Tensor:
    """The best coordinates, damped towards those in hand by as little as makes the equations positive definite."""
    residual = system.target - system.old @ system.gamma
    eye = torch.eye(len(system.gamma), dtype=residual.dtype, device=residual.device)
    for damping in (1e-12, 1e-10, 1e-8, 1e-6):
        lower, failed = torch.linalg.cholesky_ex(system.gamma + damping * system.gamma.diagonal().mean() * eye)
        if not int(failed):
            return system.old + torch.cholesky_solve(residual.T, lower).T
    return system.old


def bounded_ridge(system: System, bound: float) -> Tensor:
    """The shortest coordinates whose squared error is at most ``bound``: ``target (gamma + mu)⁻¹`` for the right mu.

    In the eigenvectors of gamma (values e, target f) the error is ``1 - sum f²/e + sum f² mu² / (e (e + mu)²)``, which
    rises with mu; the largest that keeps the bound is found by zooming into a grid. Where even mu = 0 breaks it, which
    only rounding can bring about, the coordinates in hand stay.
    """
    values, vectors = torch.linalg.eigh(system.gamma)
    values = values.clamp_min(1e-14 * float(values[-1]) + torch.finfo(values.dtype).tiny)
    target = system.target @ vectors
    shares = target.square().sum(0) / values
    room = bound - 1 + shares.sum()
    if not float(room) > 0.0:
        return system.old
    grid = torch.linspace(0, 1, 33, dtype=values.dtype, device=values.device)
    low, width = values[-1].log() - 55.0, 62.0
    for _ in range(10):
        mu = (low + width * grid).exp()[:, None]
        spent = (shares * (mu / (values + mu)).square()).sum(1)
        low = low + width * grid[((spent <= room).sum() - 1).clamp_min(0)]
        width /= 32
    best: Tensor = target / (values + low.exp()) @ vectors.T
    return best


def _system(ring: Ring, n: int, target: Tensor, weighted: bool) -> System:
    """The equations of core n in full, or in a Krylov space where they are large."""
    x = ring[n]
    large = x[0].numel() > _DIRECT
    if not weighted and not large:
        gamma = _normal(ring, n)
        return System(gamma=gamma, target=target.flatten(1), old=x.flatten(1), lift=lambda y: y.reshape(x.shape))
    left, right, form = _form(ring, n, weighted)
    root = form.sqrt()

    def lift(y: Tensor) -> Tensor:
        return left @ (y.reshape(-1, *form.shape) / root) @ right.T

    def pull(gradient: Tensor) -> Tensor:
        return left.T @ gradient @ right / root

    old = left.T @ x @ right * root
    if large:
        product = _normal_product(ring, n)
        return _krylov(lambda y: pull(product(lift(y))), pull(target), old, lift)
    half = pull(_normal(ring, n).reshape(-1, *form.shape)).flatten(1)
    gamma = pull(half.T.reshape(-1, *form.shape)).flatten(1)
    return System(gamma=gamma, target=pull(target).flatten(1), old=old.flatten(1), lift=lift)


def _form(ring: Ring, n: int, weighted: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Orthonormal bases of the left and right bond, and a quadratic form (left, right) of core n diagonal in them.

    Weighted, the form of the sensitivity, ``I_b (right Gram of c ⊗ 1) + I_c (1 ⊗ left Gram of b)`` for the next core b
    and the one after, c. Else the product of the two spectra, a preconditioner for the least squares.
    """
    b, c = ring[(n + 1) % 3], ring[(n + 2) % 3]
    left, left_basis = descending_eigh(right_gram(c))
    right, right_basis = descending_eigh(left_gram(b))
    tiny = torch.finfo(left.dtype).tiny ** 0.25
    left, right = left + 1e-12 * left[0] + tiny, right + 1e-12 * right[0] + tiny
    form = b.shape[0] * left[:, None] + c.shape[0] * right if weighted else left[:, None] * right
    return left_basis, right_basis, form


def _gram(x: Tensor) -> Tensor:
    """Gram over both bonds, (left, right, left, right)."""
    rows = x.flatten(1)
    return (rows.T @ rows).reshape(*x.shape[1:], *x.shape[1:])


def _normal(ring: Ring, n: int) -> Tensor:
    """The normal matrix of core n, (left right, left right), without any object of the size of two modes."""
    core, first, last = ring
    if n == 0:
        gamma = einsum("arbs,rcsz->cazb", _gram(first), _gram(last))
    elif n == 1:
        gamma = einsum("darsz,dzb->arbs", einsum("dca,rcsz->darsz", core, _gram(last)), core)
    else:
        gamma = einsum("dcrbs,dzb->rcsz", einsum("dca,arbs->dcrbs", core, _gram(first)), core)
    return gamma.reshape(ring[n][0].numel(), -1)


def _normal_product(ring: Ring, n: int) -> Callable[[Tensor], Tensor]:
    """What multiplies a value of core n by its normal matrix; that of the shared core is never formed."""
    if n != 0:
        gamma = _normal(ring, n)
        return lambda x: (x.flatten(1) @ gamma).reshape(x.shape)
    first, last = _gram(ring[1]), _gram(ring[2])
    return lambda x: einsum("arbs,drcsb->dca", first, einsum("rcsz,dzb->drcsb", last, x))


def _krylov(
    product: Callable[[Tensor], Tensor], target: Tensor, old: Tensor, lift: Callable[[Tensor], Tensor]
) -> System:
    """The system on the span of the core in hand and the Krylov space of its residual, orthonormalised."""
    basis, images = old.new_zeros(0, old.numel()), old.new_zeros(0, old.numel())
    vector = old.flatten()
    for k in range(_KRYLOV):
        if k > 0:
            vector = images[-1] if k > 1 else (target - product(old)).flatten()
        size = float(torch.linalg.vector_norm(vector))
        for _ in range(2):
            vector = vector - (basis @ vector) @ basis
        norm = float(torch.linalg.vector_norm(vector))
        if norm > 1e-10 * size:
            basis = torch.cat([basis, vector[None] / norm])
            images = torch.cat([images, product(basis[-1].reshape(old.shape)).flatten()[None]])
        elif k > 0:
            break
    gamma = basis @ images.T
    return System(
        gamma=(gamma + gamma.T) / 2,
        target=(basis @ target.flatten())[None],
        old=(basis @ old.flatten())[None],
        lift=lambda y: lift((y @ basis).reshape(old.shape)),
    )
