"""The shared-core block-term decomposition of a kernel, which is the order-3 tensor chain: fit, gauge, correction.

``W[d, s, t] = sum_{r, a, b} G[d, a, b] U[s, r, a] V[t, r, b]`` (Phan et al., arXiv 2203.02617): R blocks, each a
Tucker-2 with bases of its own and a core shared by all. R = 1 is Tucker-2, p = q = 1 is CP with one spatial filter. The
cores form a loop with bonds (R, p, q). A fit is alternating least squares on the normal equations, extrapolated (Ang,
Cohen and Gillis 2019). The sensitivity of a loop can grow without bound while its error falls; two cures: the gauge of
every bond in closed form (ours; the tensor is unchanged), and error-bounded alternating least squares, which spends a
little more error on far less sensitivity. All is float64 inside, bounded in sweeps, and deterministic.

Inside, the cores are a ring of ``X_n`` (size of the mode, left bond, right bond), the right bond of one being the left
bond of the next: G as (D, q, p), U as (S, p, R), V as (T, R, q).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, einsum

from ranksearch.decompositions.format import descending_eigh
from ranksearch.errors import DecompositionError, RankError

Cores = tuple[Tensor, Tensor, Tensor]
"""G (D, p, q), U (S, R, p) and V (T, R, q)."""
Ring = tuple[Tensor, Tensor, Tensor]

_DIRECT = 320
"""Unknowns in a row of a core above which its equations are solved in a Krylov space instead of by factorisation."""
_KRYLOV = 12
"""Dimensions of that space: the core in hand is one of them, so a small space makes an update weak, never wrong."""
_TRIAL_SWEEPS = 10
"""Sweeps that every start gets before the best one goes on alone."""
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
    """Sweeps over the cores that the winning start took."""


def chain_tensor(cores: Cores) -> Tensor:
    """The tensor ``(D, S, T)`` of a chain."""
    core, first, last = cores
    return einsum("dsrb,trb->dst", einsum("dab,sra->dsrb", core, first), last)


def chain_sensitivity(cores: Cores) -> float:
    """Expected squared error of the tensor per unit variance of independent noise on the entries of the cores.

    ``sum_n I_n ‖chain without core n‖²``; each norm is the inner product of two Grams of the size of a bond.
    """
    return _sensitivity(_ring(cores))


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
    return _cores(ring, cores[0].dtype)


def chain_als(
    tensor: Tensor,
    ranks: tuple[int, int, int],
    *,
    start: Cores | None = None,
    sweeps: int = 200,
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
        tolerance: stop when a sweep changes the error by less than this (relative).
        restarts: starts of each kind: 1 is the two made from the tensor alone, each one more adds a random one.
        seed: of the random starts, and of directions that the tensor does not provide.

    Raises:
        RankError: ranks out of bounds.
        DecompositionError: the tensor holds NaN or infinite values.
    """
    _check_ranks(tensor, ranks)
    _require_finite("the kernel", tensor)
    scale = torch.linalg.vector_norm(tensor.double())
    blocks, p, q = ranks
    if not float(scale) > 0.0:
        shapes = ((tensor.shape[0], p, q), (tensor.shape[1], blocks, p), (tensor.shape[2], blocks, q))
        return ChainFit(cores=_triple([tensor.new_zeros(shape) for shape in shapes]), error=0.0, sweeps=0)
    unit = tensor.double() / scale
    if (p, q) == tuple(tensor.shape[1:]):
        ring, used = _exact(unit, blocks), 0
    elif blocks == 1:
        ring, used = _hooi(unit, p, q, start, sweeps, tolerance)
    else:
        rings = [_ring(start)] if start is not None else list(_starts(unit, ranks, restarts, seed))
        if start is not None:
            rings = [(rings[0][0] / scale, rings[0][1], rings[0][2])]
        ring, used = _best_descent(unit, rings, sweeps, tolerance)
    cores = regauge(_cores((ring[0] * scale, ring[1], ring[2]), torch.float64))
    error = float((unit - chain_tensor(cores) / scale).square().sum())
    return ChainFit(cores=_triple([core.to(tensor.dtype) for core in cores]), error=min(error, 1.0), sweeps=used)


def correct_chain(
    tensor: Tensor, cores: Cores, *, slack: float = 1.05, sweeps: int = 30, tolerance: float = 1e-3
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
    balanced = regauge(_triple([core.double() for core in cores]))
    scale = torch.linalg.vector_norm(tensor.double())
    unit = tensor.double() / scale.clamp_min(torch.finfo(torch.float64).tiny)
    error = float((unit - chain_tensor(balanced) / scale).square().sum()) if float(scale) > 0.0 else 0.0
    if not _EXACT < error < 1.0:
        return _triple([core.to(cores[0].dtype) for core in balanced])
    bound = min(slack**2 * error, (error + 1.0) / 2)
    ring = _ring((balanced[0] / scale, balanced[1], balanced[2]))
    before = _sensitivity(ring)
    for _ in range(sweeps):
        for n in (1, 2, 0):
            system = _system(unit, ring, n, _weights(ring, n))
            ring = _replaced(ring, n, system.lift(_bounded_ridge(system, bound)))
        ring = _gauge_sweep(ring)
        after = _sensitivity(ring)
        if before - after <= tolerance * before:
            break
        before = after
    corrected = regauge(_cores((ring[0] * scale, ring[1], ring[2]), torch.float64))
    # The bound is kept through Grams; where rounding broke it, the re-gauged fit is the answer.
    kept = float((unit - chain_tensor(corrected) / scale).square().sum()) <= bound * (1 + 1e-6)
    return _triple([core.to(cores[0].dtype) for core in (corrected if kept else balanced)])


# -- the ring -------------------------------------------------------------------------------------------------------


def _exact(unit: Tensor, blocks: int) -> Ring:
    """The tensor itself as the core of the first block; there is nothing left for the others."""
    _, s, t = unit.shape
    first, last = unit.new_zeros(s, s, blocks), unit.new_zeros(t, blocks, t)
    first[:, :, 0] = torch.eye(s)
    last[:, 0] = torch.eye(t)
    return unit.transpose(1, 2).contiguous(), first, last


def _ring(cores: Cores) -> Ring:
    core, first, last = (value.detach().double() for value in cores)
    return core.transpose(1, 2).contiguous(), first.transpose(1, 2).contiguous(), last.contiguous()


def _cores(ring: Ring, dtype: torch.dtype) -> Cores:
    core, first, last = (value.to(dtype) for value in ring)
    return core.transpose(1, 2).contiguous(), first.transpose(1, 2).contiguous(), last.contiguous()


def _triple(values: list[Tensor]) -> Cores:
    first, second, third = values
    return first, second, third


def _replaced(ring: Ring, n: int, value: Tensor) -> Ring:
    return _triple([value if i == n else other for i, other in enumerate(ring)])


def _left(x: Tensor) -> Tensor:
    """Gram over the left bond."""
    rows = x.transpose(0, 1).flatten(1)
    return rows @ rows.T


def _right(x: Tensor) -> Tensor:
    """Gram over the right bond."""
    rows = x.flatten(0, 1)
    return rows.T @ rows


def _sensitivity(ring: Ring) -> float:
    terms = [ring[n - 1].shape[0] * (_right(ring[n]) * _left(ring[(n + 1) % 3])).sum() for n in range(3)]
    return float(sum(terms[1:], terms[0]))


def _check_ranks(tensor: Tensor, ranks: tuple[int, int, int]) -> None:
    if tensor.ndim != 3:
        raise DecompositionError(f"a chain is fitted to a tensor (D, S, T), found the shape {tuple(tensor.shape)}.")
    _, s, t = tensor.shape
    if not (min(ranks) >= 1 and ranks[1] <= s and ranks[2] <= t):
        raise RankError(
            f"ranks of a chain must be (R, p, q) with R >= 1, 1 <= p <= {s} and 1 <= q <= {t}; found {ranks}. "
            "Choose ranks within the bounds."
        )


def _require_finite(what: str, *values: Tensor) -> None:
    if not all(bool(torch.isfinite(value).all()) for value in values):
        raise DecompositionError(f"{what} must be finite, found NaN or infinite values. Check the weights.")


# -- the gauge of a bond --------------------------------------------------------------------------------------------


def _gauge_sweep(ring: Ring) -> Ring:
    for n in range(3):
        a, b, c = (ring[(n + i) % 3] for i in range(3))
        # The terms of the sensitivity that a basis P on the bond a-b changes: tr(Pᵀ after P) of the open chain c, a
        # and tr(P⁻¹ before P⁻ᵀ) of b, c, each times the size of the missing core's mode.
        through = einsum("lm,ilx->imx", _right(c), a)
        after = b.shape[0] * einsum("imx,imy->xy", through, a)
        through = einsum("lm,jxl->jxm", _left(c), b)
        before = a.shape[0] * einsum("jxm,jym->xy", through, b)
        basis = _best_basis(after, before)
        if basis is not None:
            ring = _replaced(_replaced(ring, n, a @ basis[0]), (n + 1) % 3, einsum("xy,jym->jxm", basis[1], b))
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
    lower, failed = torch.linalg.cholesky_ex(after + 1e-9 * sizes[0] * eye)
    if int(failed):
        return None
    values, vectors = torch.linalg.eigh(lower.T @ (before + 1e-9 * sizes[1] * eye) @ lower)
    root = vectors * values.clamp_min(torch.finfo(values.dtype).tiny).pow(0.25)
    left, stretch, _ = torch.linalg.svd(torch.linalg.solve_triangular(lower.T, root, upper=True))
    basis, inverse = (left * stretch) @ left.T, (left / stretch) @ left.T
    gained = (basis @ after * basis).sum() + (inverse @ before * inverse).sum() < sizes.sum()
    return (basis, inverse) if bool(gained) else None


# -- one core, the others fixed -------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, eq=False)
class _System:
    """Squared error ``1 - 2 <target, y> + <y gamma, y>`` of a tensor of norm 1 as a function of one core.

    ``y`` (rows, k) are coordinates in which the sensitivity is ``‖y‖²`` and a constant, where weights are given.
    """

    gamma: Tensor
    target: Tensor
    old: Tensor
    lift: Callable[[Tensor], Tensor]
    """From coordinates to the core."""

    def error(self, y: Tensor) -> float:
        return float(1 - 2 * (self.target * y).sum() + (y @ self.gamma * y).sum())


Weights = tuple[Tensor, Tensor, Tensor]
"""Orthogonal bases of the left and the right bond, and the weight (left, right) of each pair of their vectors."""


def _weights(ring: Ring, n: int, *, product: bool = False) -> Weights:
    """The quadratic form of core n in the sensitivity, diagonal in the eigenvectors of its two neighbours' Grams.

    With ``product``, the product of the two spectra instead of their sum: a preconditioner for the least squares.
    """
    b, c = ring[(n + 1) % 3], ring[(n + 2) % 3]
    left, left_basis = descending_eigh(_right(c))
    right, right_basis = descending_eigh(_left(b))
    floor = torch.finfo(left.dtype).tiny
    left, right = left + 1e-12 * left[0] + floor, right + 1e-12 * right[0] + floor
    form = left[:, None] * right if product else b.shape[0] * left[:, None] + c.shape[0] * right
    return left_basis, right_basis, form


def _target(unit: Tensor, ring: Ring, n: int) -> Tensor:
    """The tensor contracted with the other two cores: (rows, left, right) of core n."""
    core, first, last = ring
    if n == 1:
        return einsum("dsrq,dqp->spr", einsum("dst,trq->dsrq", unit, last), core)
    half = einsum("dst,spr->dtpr", unit, first)
    return einsum("dtpr,dqp->trq", half, core) if n == 2 else einsum("dtpr,trq->dqp", half, last)


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


def _system(unit: Tensor, ring: Ring, n: int, weights: Weights | None) -> _System:
    """The least squares of core n in full, or in a Krylov space where it is large."""
    x, target = ring[n], _target(unit, ring, n)
    large = x[0].numel() > _DIRECT
    if weights is None and not large:
        gamma = _normal(ring, n)
        return _System(
            gamma=gamma, target=target.flatten(1), old=x.flatten(1), lift=lambda y: y.reshape(len(y), *x.shape[1:])
        )
    left, right, form = weights if weights is not None else _weights(ring, n, product=True)
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
    return _System(gamma=gamma, target=pull(target).flatten(1), old=old.flatten(1), lift=lift)


def _krylov(
    product: Callable[[Tensor], Tensor], target: Tensor, old: Tensor, lift: Callable[[Tensor], Tensor]
) -> _System:
    """The system on the span of the old value and the Krylov space of its residual, orthonormalised."""
    basis, images = old.new_zeros(0, old.numel()), old.new_zeros(0, old.numel())
    candidates = [old.flatten(), (target - product(old)).flatten()]
    for k in range(_KRYLOV):
        vector = candidates[k] if k < 2 else images[-1]
        size = float(torch.linalg.vector_norm(vector))
        for _ in range(2):
            vector = vector - (basis @ vector) @ basis
        norm = float(torch.linalg.vector_norm(vector))
        if norm > 1e-10 * size:
            basis = torch.cat([basis, vector[None] / norm])
            images = torch.cat([images, product(basis[-1].reshape(old.shape)).flatten()[None]])
        elif k >= 1:
            break
    gamma = basis @ images.T
    return _System(
        gamma=(gamma + gamma.T) / 2,
        target=(basis @ target.flatten())[None],
        old=(basis @ old.flatten())[None],
        lift=lambda y: lift((y @ basis).reshape(old.shape)),
    )


def _least_squares(system: _System) -> Tensor:
    """The best coordinates, damped towards the old ones by as little as makes the equations positive definite."""
    residual = system.target - system.old @ system.gamma
    eye = torch.eye(len(system.gamma), dtype=residual.dtype, device=residual.device)
    for damping in (1e-13, 1e-11, 1e-9, 1e-7, 1e-5):
        lower, failed = torch.linalg.cholesky_ex(system.gamma + damping * system.gamma.diagonal().mean() * eye)
        if not int(failed):
            return system.old + torch.cholesky_solve(residual.T, lower).T
    return system.old


def _bounded_ridge(system: _System, bound: float) -> Tensor:
    """The shortest coordinates whose squared error is at most ``bound``: ``target (gamma + mu)⁻¹`` for the right mu.

    In the eigenvectors of gamma (values e, target F) the error is ``1 - sum f²/e + sum f² mu² / (e (e + mu)²)``, which
    rises with mu; the largest that keeps the bound is found by zooming into a grid.
    """
    values, vectors = torch.linalg.eigh(system.gamma)
    values = values.clamp_min(1e-14 * float(values[-1]) + torch.finfo(values.dtype).tiny)
    target = system.target @ vectors
    shares = target.square().sum(0) / values
    room = bound - 1 + shares.sum()
    if not float(room) > 0.0:
        return system.old
    grid = torch.linspace(0, 1, 33, dtype=values.dtype, device=values.device)
    low, width = values[-1].log() - 55.0, torch.full_like(room, 62.0)
    for _ in range(10):
        mu = (low + width * grid).exp()[:, None]
        spent = (shares * (mu / (values + mu)).square()).sum(1)
        low = low + width * grid[(spent <= room).sum() - 1].clamp_min(0)
        width = width / 32
    best: Tensor = target / (values + low.exp()) @ vectors.T
    return best


# -- fitting --------------------------------------------------------------------------------------------------------


def _updated(unit: Tensor, ring: Ring, n: int) -> tuple[Ring, float]:
    system = _system(unit, ring, n, None)
    y = _least_squares(system)
    return _replaced(ring, n, system.lift(y)), max(system.error(y), 0.0)


def _descend(unit: Tensor, ring: Ring, sweeps: int, tolerance: float) -> tuple[Ring, float, int]:
    """Sweeps over the cores, each from a point a step beyond the last; a step that does not pay is undone."""
    at, error, step, longest = ring, float("inf"), 0.3, 1.0
    for sweep in range(sweeps):
        new, reached = at, error
        for n in (1, 2, 0):
            new, reached = _updated(unit, new, n)
        if not reached <= error:
            at, longest, step = ring, step, step / 2
            continue
        settled = error - reached <= tolerance * reached or reached <= _EXACT
        ahead = step if sweep > 0 else 0.0
        at = _triple([x + ahead * (x - before) for x, before in zip(new, ring, strict=True)])
        ring, error, step, longest = new, reached, min(longest, 1.1 * step), min(1.5, 1.05 * longest)
        if settled:
            return ring, error, sweep + 1
    return ring, error, sweeps


def _best_descent(unit: Tensor, rings: list[Ring], sweeps: int, tolerance: float) -> tuple[Ring, int]:
    """A few sweeps from every start, then the rest from the best."""
    trial = min(_TRIAL_SWEEPS, sweeps) if len(rings) > 1 else 0
    tried = [_descend(unit, ring, trial, tolerance) for ring in rings]
    ring, error, used = min(tried, key=lambda fit: fit[1])
    if error <= _EXACT:
        return ring, used
    ring, _, more = _descend(unit, ring, sweeps - trial, tolerance)
    return ring, used + more


def _starts(unit: Tensor, ranks: tuple[int, int, int], restarts: int, seed: int) -> Iterator[Ring]:
    """Blocks one after the other, each from the residual; blocks that share out the leading subspaces; random ones."""
    blocks, p, q = ranks
    generator = torch.Generator().manual_seed(seed)
    yield _deflated(unit, blocks, p, q)
    d = unit.shape[0]
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
        yield _updated(unit, (unit.new_zeros(d, q, p), first, last.contiguous()), 0)[0]


def _deflated(unit: Tensor, blocks: int, p: int, q: int) -> Ring:
    """Tucker-2 for the first block and its core for all; every other block is fitted to what is left."""
    (core, first, last), _ = _hooi(unit, p, q, None, 5, 0.0)
    firsts, lasts = [first], [last]
    residual = unit
    for _ in range(blocks - 1):
        residual = residual - chain_tensor(_cores((core, firsts[-1], lasts[-1]), torch.float64))
        ring = (core, *_leading(residual, p, q))
        for n in (1, 2, 1, 2):
            ring = _updated(residual, ring, n)[0]
        firsts.append(ring[1])
        lasts.append(ring[2])
    return core, torch.cat(firsts, dim=2), torch.cat(lasts, dim=1)


def _leading(unit: Tensor, p: int, q: int) -> tuple[Tensor, Tensor]:
    """The leading eigenvectors of the two channel modes, as one block: (S, p, 1) and (T, 1, q)."""
    first = descending_eigh(_left(unit))[1][:, :p, None]
    last = descending_eigh(_right(unit))[1][:, None, :q]
    return first, last


def _hooi(unit: Tensor, p: int, q: int, start: Cores | None, sweeps: int, tolerance: float) -> tuple[Ring, int]:
    """Tucker-2 by higher-order orthogonal iteration (De Lathauwer et al. 2000): each basis the best for the other."""
    last = _leading(unit, p, q)[1] if start is None else torch.linalg.qr(_ring(start)[2].flatten(1))[0][:, None]
    error, used = float("inf"), 0
    for _ in range(max(sweeps, 1)):
        used += 1
        half = einsum("dst,trq->sdq", unit, last).flatten(1)
        first = descending_eigh(half @ half.T)[1][:, :p]
        half = einsum("dst,sp->tdp", unit, first)
        last = descending_eigh(half.flatten(1) @ half.flatten(1).T)[1][:, None, :q]
        core = einsum("tdp,trq->dqp", half, last)
        before, error = error, float(1 - core.square().sum())
        if before - error <= tolerance * error:
            break
    return (core, first[..., None].contiguous(), last.contiguous()), used
