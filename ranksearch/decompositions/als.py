"""CP decomposition (a sum of ``rank`` outer products) of a tensor of any order, by alternating least squares.

One sweep solves the normal equations of each mode in turn (Kolda & Bader, SIAM Review 2009, section 3.4). Its two big
products are shared by all modes: the tensor times the last factor serves every other mode (a dimension tree: Phan,
Tichavsky & Cichocki 2013), and the last mode has its own. Around it:

- start: slices of the tensor along the small modes, rotated to their principal axes, give their leading singular
  triples (`peel`); the columns are orthogonal, any rank up to the exact one has them, and the same on the residual
  extends a start of a smaller rank without raising its error;
- where the rank is well under a mode's size, most sweeps run on the tensor compressed to that mode's leading
  eigenvectors, and few on the tensor itself;
- momentum between sweeps, dropped whenever the error rises (Mitchell, Ye & De Sterck 2020), halves the sweeps;
- each system has a proximal term, ``rho |A - A_old|^2``: it moves no fixed point, the error still never rises, and no
  system is singular, however degenerate the fit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from typing import Any

import torch
from torch import Tensor

from ranksearch.decompositions.peel import compressed, peel
from ranksearch.errors import DecompositionError, RankError

Factors = tuple[Tensor, ...]
"""One ``(I_n, R)`` matrix a mode."""
Update = Callable[[int, Tensor, list[Tensor], Tensor], Tensor]
"""New factor of a mode from (mode, product ``(I_n, R)`` of the tensor with the other factors, Gram matrices of all
factors, old factor)."""
Step = Callable[[Factors, float], tuple[Factors, float]]

SWEEPS = 100
TOLERANCE = 1e-4
_EXACT = 1e-28
_SINGLE = 1e-4
"""Relative squared error under which single precision no longer tells one fit from another."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Fit:
    """A CP decomposition."""

    factors: Factors
    """One ``(I_n, R)`` matrix a mode, float64; columns of a component have equal norms."""
    error: float
    """Squared norm of the residual over that of the tensor, 0 to 1."""
    sweeps: int
    """Sweeps taken, over all restarts, on the compressed tensor and on the whole one."""


def cp_als(
    tensor: Tensor,
    rank: int,
    *,
    start: Sequence[Tensor] | None = None,
    sweeps: int = SWEEPS,
    tolerance: float = TOLERANCE,
    restarts: int = 1,
    seed: int = 0,
) -> Fit:
    """The CP decomposition of ``tensor``; same input and seed, same bits.

    Args:
        tensor: of any order from 2. The big products are in its precision until the error asks for float64.
        rank: number of components; any, also above every size.
        start: factors of this or a smaller rank; the error does not exceed theirs. Columns are added from the residual.
        sweeps: the most sweeps over the whole tensor, and over the compressed one; of each start.
        tolerance: a fit ends when a sweep lowers the error by less than this share of it, on average over ten.
        restarts: starts to try, the best of which is kept: `peel` (or ``start``), then random ones.
        seed: of the random starts.

    Raises:
        DecompositionError: the tensor or the start is not finite.
        RankError: the rank is below 1 or the order below 2, or the start does not fit the tensor.
    """
    whole, scale = _normalised(tensor)
    given = None if start is None else _checked_start(whole, rank, start)
    if rank < 1:
        raise RankError(f"the rank of a CP decomposition must be at least 1; found {rank}.")
    if scale == 0.0:
        zeros = tuple(whole.new_zeros(n, rank, dtype=torch.float64) for n in whole.shape)
        return Fit(factors=zeros, error=0.0, sweeps=0)
    if given is not None:
        given = rebalanced([*(f.double() for f in given[:-1]), given[-1].double() / scale])
    fits = [
        _attempt(whole, rank, given if attempt == 0 else None, sweeps, tolerance, (seed, attempt))
        for attempt in range(max(restarts, 1))
    ]
    best = min(fits, key=lambda fit: fit.error)
    factors = rebalanced([*best.factors[:-1], best.factors[-1] * scale])
    error = min(1.0, best.error / float(whole.double().square().sum()))
    return Fit(factors=factors, error=error, sweeps=sum(fit.sweeps for fit in fits))


def cp_als_all(
    tensors: Sequence[Tensor],
    ranks: Sequence[int],
    *,
    starts: Sequence[Sequence[Tensor] | None] | None = None,
    map: Callable[..., Iterable[Fit]] = map,
    **options: Any,
) -> list[Fit]:
    """`cp_als` of every layer, in order.

    One layer after the other under the ``map`` of Python, side by side under that of an executor. Layers of equal shape
    are not stacked: they would need equal ranks too, which a search seldom gives them.

    Args:
        tensors: one a layer.
        ranks: one a layer.
        starts: one or None a layer.
        map: called as ``map(function, tensors, ranks, starts)``; the function can be pickled.
        options: as of `cp_als`.

    Raises:
        RankError: unequal numbers of tensors, ranks and starts.
    """
    starts = [None] * len(tensors) if starts is None else starts
    if not len(tensors) == len(ranks) == len(starts):
        raise RankError(f"{len(tensors)} tensors, {len(ranks)} ranks and {len(starts)} starts: give one each a layer.")
    return list(map(_Layer(options), tensors, ranks, starts))


@dataclass(frozen=True)
class _Layer:
    """`cp_als` with its options: a closure that can be pickled."""

    options: dict[str, Any]

    def __call__(self, tensor: Tensor, rank: int, start: Sequence[Tensor] | None) -> Fit:
        return cp_als(tensor, rank, start=start, **self.options)


def cp_tensor(factors: Sequence[Tensor]) -> Tensor:
    """The tensor ``(I_1, ..., I_N)`` of the factors."""
    return (khatri_rao(factors[:-1]) @ factors[-1].T).reshape([f.shape[0] for f in factors])


def khatri_rao(factors: Sequence[Tensor]) -> Tensor:
    """``(product of sizes, R)``: outer products of equal columns, the last factor's rows running fastest."""
    out = factors[0]
    for factor in factors[1:]:
        out = (out[:, None] * factor).flatten(0, 1)
    return out


def rebalanced(factors: Sequence[Tensor]) -> Factors:
    """The same tensor with equal column norms over the modes; a component of norm 0 becomes 0 throughout."""
    norms = torch.stack([f.norm(dim=0) for f in factors])
    alive = (norms > 0).all(0)
    logs = norms.clamp_min(1e-300).log()
    scales = torch.where(alive, (logs.mean(0) - logs).exp(), 0.0)
    return tuple(f * s for f, s in zip(factors, scales, strict=True))


def squared_error(tensor: Tensor, factors: Sequence[Tensor]) -> float:
    """Squared norm of the residual, from the residual itself in float64, a piece of the tensor at a time."""
    rows = tensor.flatten(0, -2)
    left, last = khatri_rao(factors[:-1]).double(), factors[-1].double().T
    total = torch.zeros((), dtype=torch.float64, device=tensor.device)
    for i in range(0, rows.shape[0], size := max(1, 2**20 // rows.shape[1])):
        total = total + (rows[i : i + size].double() - left[i : i + size] @ last).square().sum()
    return float(total)


def sweep(tensor: Tensor, factors: Sequence[Tensor], update: Update) -> tuple[Factors, Tensor, list[Tensor]]:
    """Every factor replaced in turn by ``update``; also the last mode's product and all Gram matrices."""
    factors = list(factors)
    grams = [f.T @ f for f in factors]
    last = len(factors) - 1
    shared = tensor @ factors[last].to(tensor.dtype)
    for mode in range(last + 1):
        if mode < last:
            product = _contracted(shared, factors, mode)
        else:
            product = tensor.flatten(0, -2).T @ khatri_rao([f.to(tensor.dtype) for f in factors[:-1]])
        product = product.double()
        factors[mode] = update(mode, product, grams, factors[mode])
        grams[mode] = factors[mode].T @ factors[mode]
    return tuple(factors), product, grams


def _contracted(shared: Tensor, factors: Sequence[Tensor], mode: int) -> Tensor:
    """``shared`` (I_1, ..., I_(N-1), R) times the other factors: ``(I_mode, R)``."""
    for axis in range(shared.ndim - 2, -1, -1):
        if axis != mode:
            shape = [1] * shared.ndim
            shape[axis], shape[-1] = factors[axis].shape
            shared = (shared * factors[axis].to(shared.dtype).reshape(shape)).sum(axis, keepdim=True)
    return shared.reshape(-1, shared.shape[-1])


def others(grams: Sequence[Tensor], mode: int) -> Tensor:
    """The matrix of a mode's normal equations: the entrywise product of the other modes' Gram matrices."""
    return reduce(torch.mul, (g for n, g in enumerate(grams) if n != mode))


def _solved(mode: int, product: Tensor, grams: list[Tensor], old: Tensor, rho: float) -> Tensor:
    """The factor that minimises the error plus the proximal term, in columns scaled to a unit diagonal."""
    gram = others(grams, mode)
    diagonal = gram.diagonal()
    scale = torch.where(diagonal > 0, diagonal, 1.0).sqrt()
    matrix = gram / (scale * scale[:, None])
    while True:
        matrix.diagonal().add_(rho)
        root, failed = torch.linalg.cholesky_ex(matrix)
        if not int(failed):
            break
        rho *= 100
        if not rho < 1e6:
            raise DecompositionError("CP-ALS met a system that is not finite. Check the kernel's magnitudes.")
    return torch.cholesky_solve((product / scale + rho * old * scale).T, root).T / scale


def _normalised(tensor: Tensor) -> tuple[Tensor, float]:
    """The tensor at a norm from 1 to 2, and the power of two that it was divided by, exactly; 0 for a zero tensor."""
    if tensor.ndim < 2:
        raise RankError(f"a CP decomposition needs a tensor of order 2 or more; found shape {tuple(tensor.shape)}.")
    tensor = tensor.detach()
    if tensor.dtype not in (torch.float32, torch.float64):
        tensor = tensor.float()
    norm = float(torch.linalg.vector_norm(tensor, dtype=torch.float64))
    if not math.isfinite(norm):
        raise DecompositionError("the kernel holds NaN or infinite values. Check the pretrained weights.")
    scale = 2.0 ** math.floor(math.log2(norm)) if norm > 0 else 0.0
    return (tensor / scale if norm > 0 else tensor).contiguous(), scale


def _checked_start(tensor: Tensor, rank: int, start: Sequence[Tensor]) -> Sequence[Tensor]:
    shapes = [tuple(f.shape) for f in start]
    columns = start[0].shape[-1]
    if shapes != [(n, columns) for n in tensor.shape] or columns > rank:
        raise RankError(
            f"a start of rank {rank} needs factors of equal rank up to it, one a mode of {tuple(tensor.shape)}; "
            f"found shapes {shapes}. Start from a fit of this tensor at a rank not above."
        )
    if not all(bool(torch.isfinite(f).all()) for f in start):
        raise DecompositionError("the start holds NaN or infinite values. Leave it out.")
    return start


def _attempt(
    tensor: Tensor, rank: int, given: Factors | None, sweeps: int, tolerance: float, seed: tuple[int, int]
) -> Fit:
    """One start: sweeps on the compressed tensor where that pays, then on the tensor itself."""
    if given is not None:
        more = rebalanced(peel(tensor.double() - cp_tensor(given), rank - given[0].shape[1]))
        start = tuple(torch.cat(pair, 1) for pair in zip(given, more, strict=True))
        return _descended(tensor, start, sweeps, tolerance, fresh=more[0].shape[1])
    core, bases = compressed(tensor, rank)
    smaller = core.numel() <= tensor.numel() // 2
    small = core if smaller else tensor
    start = rebalanced(peel(small, rank)) if seed[1] == 0 else _random(small.shape, rank, seed, small.device)
    fit = _descended(small, start, sweeps, tolerance, fresh=rank if seed[1] == 0 else 0)
    if not smaller:
        return fit
    expanded = tuple(basis @ factor for basis, factor in zip(bases, fit.factors, strict=True))
    polished = _descended(tensor, expanded, sweeps, tolerance)
    return Fit(factors=polished.factors, error=polished.error, sweeps=fit.sweeps + polished.sweeps)


def _shaken(factors: Factors, fresh: int) -> Factors:
    """The last ``fresh`` columns with a thousandth of noise: `peel` may sit on a saddle, where sweeps stay for ever."""
    old = factors[0].shape[1] - fresh
    noise = _random([f.shape[0] for f in factors], fresh, (0, 0), factors[0].device)
    pairs = [(f[:, :old], f[:, old:], n * (1e-3 / f.shape[0] ** 0.5)) for f, n in zip(factors, noise, strict=True)]
    return tuple(torch.cat([kept, new + new.norm(dim=0) * n], 1) for kept, new, n in pairs)


def _random(sizes: Sequence[int], rank: int, seed: tuple[int, int], device: torch.device) -> Factors:
    """Normal columns; drawn on the CPU, so that every device has the same."""
    generator = torch.Generator().manual_seed(seed[0] * 1_000_003 + seed[1])
    return tuple(torch.randn(n, rank, generator=generator, dtype=torch.float64).to(device) for n in sizes)


def _descended(tensor: Tensor, start: Factors, sweeps: int, tolerance: float, *, fresh: int = 0) -> Fit:
    """Sweeps from ``start`` over a tensor of norm about 1; the best factors met, and their squared error.

    The last ``fresh`` columns are those of `peel`.
    """
    total = float(tensor.double().square().sum())
    before = squared_error(tensor, start)
    if before <= _EXACT or sweeps == 0:
        return Fit(factors=start, error=before, sweeps=0)
    shaken = _shaken(start, fresh)
    work = tensor

    def step(factors: Factors, least: float) -> tuple[Factors, float]:
        nonlocal work
        if least < _SINGLE and work.dtype != torch.float64:
            work = tensor.double()
        rho = torch.finfo(work.dtype).eps * factors[0].shape[1]
        new, product, grams = sweep(work, factors, partial(_solved, rho=rho))
        found = float(total - 2.0 * (product * new[-1]).sum() + (others(grams, len(grams) - 1) * grams[-1]).sum())
        return rebalanced(new), found if found > 1e-6 else squared_error(work, new)

    error = squared_error(tensor, shaken)
    factors, _, taken = accelerated(shaken, error, step, sweeps=sweeps, tolerance=tolerance, enough=_EXACT)
    error = squared_error(tensor, factors)
    return Fit(factors=factors if error < before else start, error=min(error, before), sweeps=taken)


def accelerated(
    start: Factors,
    value: float,
    step: Step,
    *,
    sweeps: int,
    tolerance: float,
    enough: float = 0.0,
) -> tuple[Factors, float, int]:
    """The best factors, their value and the number of steps, where every step restarts ahead of the best so far.

    Momentum grows while the value falls. A step that raises the value is undone and the next starts from the best
    itself; steps that do not rise from there make the whole monotone, and a rise from there ends it.

    Args:
        start: factors to begin with.
        value: their value.
        step: from factors and the least value so far to new factors and their value, infinite where they break a bound.
        sweeps: the most steps.
        tolerance: stop when a step lowers the value by less than this share of it, on average over ten.
        enough: a value at which to stop.
    """
    best = here = start
    values, momentum, taken = [value], 0.5, 0
    while taken < sweeps and value > enough:
        new, found = step(here, value)
        taken += 1
        if found <= value:
            here = tuple(n + momentum * (n - b) for n, b in zip(new, best, strict=True))
            best, value, momentum = new, found, min(1.15 * momentum, 0.98)
        elif here is best:
            break
        else:
            here, momentum = best, 0.4
        values.append(value)
        if len(values) > 10 and values[-11] - value < 10 * tolerance * values[-11]:
            break
    return best, value, taken
