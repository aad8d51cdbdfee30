"""The shared-core chain against tensorly, SciPy, Monte-Carlo and planted chains."""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import tensorly
import torch
from scipy.optimize import minimize
from tensorly.decomposition import partial_tucker
from tensorly.tenalg import multi_mode_dot
from torch import Tensor

from ranksearch.decompositions.loop import (
    Cores,
    chain_als,
    chain_sensitivity,
    chain_tensor,
    correct_chain,
    regauge,
)
from ranksearch.decompositions.loop_core import bounded_ridge, sweep
from ranksearch.errors import DecompositionError, RankError


def random_cores(d: int, s: int, t: int, ranks: tuple[int, int, int], seed: int = 0) -> Cores:
    blocks, p, q = ranks
    generator = torch.Generator().manual_seed(seed)
    shapes = ((d, p, q), (s, blocks, p), (t, blocks, q))
    core, first, last = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return core, first, last


def blocks_sum(cores: Cores) -> np.ndarray:
    """The block-term decomposition by tensorly: one Tucker-2 after the other, all of the same core."""
    core, first, last = (value.double().numpy() for value in cores)
    return sum(multi_mode_dot(core, [first[:, r], last[:, r]], modes=[1, 2]) for r in range(first.shape[1]))


def kernel(d: int, s: int, t: int, seed: int = 0, decay: float = 0.6) -> Tensor:
    """A kernel with decaying spectra, as trained ones have."""
    generator = torch.Generator().manual_seed(seed)
    tensor = torch.randn(d, s, t, generator=generator, dtype=torch.float64)
    for axis in range(3):
        n = tensor.shape[axis]
        basis, _ = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))
        mix = basis * torch.arange(1, n + 1, dtype=torch.float64).pow(-decay)
        tensor = torch.tensordot(tensor.movedim(axis, -1), mix.T, dims=1).movedim(-1, axis)
    return tensor


def error(tensor: Tensor, cores: Cores) -> float:
    reference = tensor.double().numpy()
    return float(np.sum((reference - blocks_sum(cores)) ** 2) / np.sum(reference**2))


def distance(one: Cores, other: Cores) -> float:
    first, second = blocks_sum(one), blocks_sum(other)
    return float(np.linalg.norm(first - second) / np.linalg.norm(second))


SHAPES = [(9, 8, 7, (1, 3, 4)), (9, 6, 8, (3, 2, 4)), (4, 5, 9, (4, 1, 1)), (1, 7, 6, (2, 3, 2)), (9, 6, 6, (2, 6, 3))]


@pytest.mark.parametrize(("d", "s", "t", "ranks"), SHAPES)
def test_chain_tensor_is_the_sum_of_tucker_blocks_of_one_core(d, s, t, ranks):
    cores = random_cores(d, s, t, ranks)
    np.testing.assert_allclose(chain_tensor(cores).numpy(), blocks_sum(cores), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("d", "s", "t", "ranks"), SHAPES)
def test_sensitivity_is_the_expected_error_under_noise(d, s, t, ranks):
    cores = random_cores(d, s, t, ranks)
    generator = torch.Generator().manual_seed(1)
    sigma, draws = 1e-4, 4000
    noisy = [core + sigma * torch.randn(draws, *core.shape, generator=generator, dtype=core.dtype) for core in cores]
    tensors = torch.einsum("ndab,nsra,ntrb->ndst", *noisy)
    total = float((tensors - torch.from_numpy(blocks_sum(cores))).square().sum())
    assert total / draws / sigma**2 == pytest.approx(chain_sensitivity(cores), rel=0.02)


@pytest.mark.parametrize(("d", "s", "t", "ranks"), SHAPES)
def test_regauge_keeps_the_tensor_and_never_raises_the_sensitivity(d, s, t, ranks):
    core, first, last = random_cores(d, s, t, ranks)
    skewed = core * torch.linspace(0.1, 5, ranks[2]), first * torch.logspace(-1, 1, ranks[1]), last
    before = chain_sensitivity(skewed)
    for sweeps in (1, 2, 5, 30):
        balanced = regauge(skewed, sweeps=sweeps, tolerance=0.0)
        assert distance(balanced, skewed) < 1e-12
        after = chain_sensitivity(balanced)
        assert after <= before * (1 + 1e-12)
        before = after
    again = regauge(balanced)
    for one, other in zip(again, balanced, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-2 * float(other.abs().max()))


def test_regauge_is_the_best_over_all_basis_changes():
    """BFGS over all three bases, on the noise itself, finds nothing better."""
    cores = random_cores(5, 4, 6, (2, 2, 3), seed=3)
    best = chain_sensitivity(regauge(cores, sweeps=500, tolerance=0.0))

    def sensitivity(flat: np.ndarray) -> float:
        on_r, on_p, on_q = (m.reshape(n, n) for m, n in zip(np.split(flat, [4, 8]), (2, 2, 3), strict=True))
        core = np.einsum("dab,ax,by->dxy", cores[0].numpy(), on_p, on_q)
        first = np.einsum("sra,rx,ya->sxy", cores[1].numpy(), on_r, np.linalg.inv(on_p))
        last = np.einsum("trb,xr,yb->txy", cores[2].numpy(), np.linalg.inv(on_r), np.linalg.inv(on_q))
        # Without any formula: the noise of one core passes through the chain of the other two.
        through_u_v = np.einsum("sra,trb->satb", first, last)
        through_g_v = np.einsum("dab,trb->datr", core, last)
        through_g_u = np.einsum("dab,sra->dbsr", core, first)
        return 5 * (through_u_v**2).sum() + 4 * (through_g_v**2).sum() + 6 * (through_g_u**2).sum()

    eye = np.concatenate([np.eye(n).ravel() for n in (2, 2, 3)])
    assert sensitivity(eye) == pytest.approx(chain_sensitivity(cores), rel=1e-10)
    found = minimize(sensitivity, eye, method="BFGS", options={"gtol": 1e-9, "maxiter": 5000})
    assert best == pytest.approx(found.fun, rel=1e-6)
    assert best < 0.99 * sensitivity(eye)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_regauge_returns_the_dtype_given(dtype):
    core, first, last = (value.to(dtype) for value in random_cores(9, 16, 16, (2, 4, 4)))
    first.requires_grad_()
    balanced = regauge((core, first, last), sweeps=2)
    assert all(value.dtype == dtype and not value.requires_grad for value in balanced)
    assert distance(balanced, (core, first.detach(), last)) < (1e-5 if dtype == torch.float32 else 1e-12)


def test_regauge_bears_bonds_that_the_chain_does_not_fill():
    core, first, last = random_cores(3, 5, 5, (2, 3, 3))
    core[:, 2] = 0.0
    last[:, 1] = 0.0
    balanced = regauge((core, first, last))
    assert distance(balanced, (core, first, last)) < 1e-10
    assert chain_sensitivity(balanced) <= chain_sensitivity((core, first, last))
    nothing = regauge((torch.zeros_like(core), first, last))
    assert float(chain_tensor(nothing).abs().max()) == 0.0


def test_one_block_is_the_tucker_2_of_tensorly():
    tensor = kernel(9, 20, 24)
    fit = chain_als(tensor, (1, 6, 5))
    with tensorly.backend_context("numpy"):
        (core, factors), _ = partial_tucker(tensor.numpy(), rank=[6, 5], modes=[1, 2], n_iter_max=500, tol=1e-10)
    reference = multi_mode_dot(core, factors, modes=[1, 2])
    theirs = float(np.sum((tensor.numpy() - reference) ** 2) / np.sum(tensor.numpy() ** 2))
    assert fit.error == pytest.approx(error(tensor, fit.cores), rel=1e-8)
    assert theirs * 0.999 <= fit.error <= 1.01 * theirs


@pytest.mark.parametrize("ranks", [(2, 6, 5), (4, 4, 4), (6, 2, 2)])
def test_more_blocks_are_never_worse_than_one(ranks):
    tensor = kernel(9, 20, 24)
    assert chain_als(tensor, ranks).error <= chain_als(tensor, (1, *ranks[1:])).error


# Least squares of chains has local minima, so it takes a few random starts to find what was planted.
@pytest.mark.parametrize(
    ("d", "s", "t", "ranks"),
    [(9, 12, 14, (2, 3, 3)), (9, 20, 16, (4, 2, 3)), (9, 10, 10, (4, 1, 1)), (5, 8, 9, (2, 3, 3))],
)
def test_planted_chains_are_recovered(d, s, t, ranks):
    tensor = chain_tensor(random_cores(d, s, t, ranks, seed=5))
    fit = chain_als(tensor, ranks, sweeps=1000, tolerance=1e-6, restarts=9)
    assert fit.error < 1e-6
    assert error(tensor, fit.cores) == pytest.approx(fit.error, abs=1e-12)


@pytest.mark.parametrize("blocks", [1, 2, 5])
def test_full_bonds_are_exact(blocks):
    tensor = kernel(9, 6, 8)
    fit = chain_als(tensor, (blocks, 6, 8))
    assert (fit.sweeps, fit.cores[1].shape[1]) == (0, blocks)
    assert error(tensor, fit.cores) < 1e-20
    assert error(tensor, correct_chain(tensor, fit.cores)) < 1e-20


def test_large_cores_in_a_krylov_space_fit_as_well_as_in_full(monkeypatch):
    tensor = kernel(9, 24, 24, decay=0.8)
    full = chain_als(tensor, (2, 8, 8))
    monkeypatch.setattr("ranksearch.decompositions.loop_core._DIRECT", 10)
    assert chain_als(tensor, (2, 8, 8)).error == pytest.approx(full.error, rel=0.05)
    corrected = correct_chain(tensor, full.cores)
    assert error(tensor, corrected) <= full.error * 1.05**2 * (1 + 1e-5)
    assert chain_sensitivity(corrected) < chain_sensitivity(full.cores) / 2


def test_a_fit_is_deterministic_and_a_warm_start_goes_on():
    tensor = kernel(9, 12, 12)
    state = torch.random.get_rng_state()
    one, two = (chain_als(tensor, (3, 4, 4), sweeps=12, restarts=2, seed=7) for _ in range(2))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(one.cores, two.cores, strict=True))
    further = chain_als(tensor, (3, 4, 4), start=one.cores, sweeps=20)
    assert further.error < one.error
    assert further.sweeps <= 20
    tucker = chain_als(tensor, (1, 4, 4))
    assert chain_als(tensor, (1, 4, 4), start=tucker.cores).sweeps <= 3


def test_float32_kernels_fit_as_float64_ones():
    tensor = kernel(9, 12, 12)
    single, double = (chain_als(tensor.to(dtype), (2, 4, 4)) for dtype in (torch.float32, torch.float64))
    assert all(core.dtype == torch.float32 for core in single.cores)
    assert error(tensor, single.cores) == pytest.approx(double.error, rel=1e-3)
    corrected = correct_chain(tensor.float(), single.cores)
    assert all(core.dtype == torch.float32 for core in corrected)
    assert error(tensor, corrected) <= 1.05**2 * single.error * (1 + 1e-4)


@pytest.mark.parametrize("size", [1e-20, 1e20])
def test_the_size_of_the_kernel_does_not_matter(size):
    tensor = kernel(9, 8, 8)
    fit, plain = chain_als(tensor * size, (2, 3, 3)), chain_als(tensor, (2, 3, 3))
    assert fit.error == pytest.approx(plain.error, rel=1e-6)
    corrected = correct_chain(tensor * size, fit.cores)
    assert error(tensor * size, corrected) == pytest.approx(1.05**2 * fit.error, rel=1e-4)


@pytest.mark.parametrize("ranks", [(1, 1, 1), (5, 1, 1), (1, 1, 4), (9, 3, 3), (3, 6, 2)])
def test_any_ranks_within_the_bounds_give_finite_cores(ranks):
    tensor = kernel(9, 6, 7)
    fit = chain_als(tensor, ranks, sweeps=30)
    shapes = [tuple(core.shape) for core in fit.cores]
    assert shapes == [(9, *ranks[1:]), (6, ranks[0], ranks[1]), (7, ranks[0], ranks[2])]
    assert error(tensor, fit.cores) == pytest.approx(fit.error, abs=1e-10)
    corrected = correct_chain(tensor, fit.cores)
    assert error(tensor, corrected) <= 1.05**2 * fit.error * (1 + 1e-6) + 1e-12
    assert chain_sensitivity(corrected) <= chain_sensitivity(fit.cores) * (1 + 1e-9)


@pytest.mark.parametrize("ranks", [(1, 3, 3), (3, 3, 3), (12, 2, 2), (4, 8, 2)])
def test_kernels_of_less_rank_than_asked_for_are_exact(ranks):
    generator = torch.Generator().manual_seed(0)
    core, first, last = (torch.randn(shape, generator=generator).double() for shape in ((9, 2, 2), (8, 2), (9, 2)))
    tensor = torch.einsum("dab,sa,tb->dst", core, first, last)
    tensor[:, :2] = 0.0
    fit = chain_als(tensor, ranks)
    corrected = correct_chain(tensor, fit.cores)
    assert max(error(tensor, fit.cores), error(tensor, corrected)) < 1e-12
    assert chain_sensitivity(corrected) < 1e3 * float(tensor.square().sum())


def test_starts_of_zeros_or_of_any_size_are_borne_and_other_shapes_refused():
    tensor = kernel(9, 8, 9)
    good = random_cores(9, 8, 9, (2, 2, 3))
    assert chain_als(tensor, (2, 2, 3), start=(good[0] * 1e12, good[1] * 1e-9, good[2])).error < 0.9
    zeros = chain_als(tensor, (2, 2, 3), start=(good[0] * 0, good[1] * 0, good[2] * 0))
    assert zeros.error == pytest.approx(1.0)
    with pytest.raises(DecompositionError, match="start"):
        chain_als(tensor, (2, 3, 2), start=good)


def test_a_zero_kernel_gives_zero_cores():
    fit = chain_als(torch.zeros(9, 4, 5), (2, 2, 3))
    assert [tuple(core.shape) for core in fit.cores] == [(9, 2, 3), (4, 2, 2), (5, 2, 3)]
    assert (fit.error, fit.sweeps) == (0.0, 0)
    corrected = correct_chain(torch.zeros(9, 4, 5), fit.cores)
    assert all(not bool(core.any()) for core in (*fit.cores, *corrected))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_values_that_are_not_finite_are_refused(value):
    tensor = kernel(9, 4, 5)
    fit = chain_als(tensor, (2, 2, 2), sweeps=3)
    tensor[0, 1, 2] = value
    with pytest.raises(DecompositionError, match="finite"):
        chain_als(tensor, (2, 2, 2))
    with pytest.raises(DecompositionError, match="finite"):
        correct_chain(tensor, fit.cores)
    with pytest.raises(DecompositionError, match="finite"):
        regauge((fit.cores[0] * value, *fit.cores[1:]))


@pytest.mark.parametrize("ranks", [(0, 2, 2), (2, 5, 2), (2, 2, 6), (2, 0, 2)])
def test_ranks_out_of_bounds_are_refused(ranks):
    with pytest.raises(RankError, match="1 <= p <= 4"):
        chain_als(kernel(9, 4, 5), ranks)


def test_a_slack_below_one_is_refused():
    tensor = kernel(9, 4, 5)
    with pytest.raises(DecompositionError, match="slack"):
        correct_chain(tensor, chain_als(tensor, (2, 2, 2), sweeps=3).cores, slack=0.9)


@pytest.mark.parametrize("n", [0, 1, 2])
def test_the_bounded_update_of_a_core_is_that_of_slsqp(n):
    """SLSQP knows neither Grams nor the ridge path: it gets the noise through the open chains and the residual."""
    tensor = kernel(3, 4, 5, seed=2)
    tensor = tensor / tensor.norm()
    core, first, last = regauge(random_cores(3, 4, 5, (2, 2, 2), seed=4))
    ring = [core.transpose(1, 2), first.transpose(1, 2), last]
    bound = 0.0

    def update(system):
        nonlocal bound
        updates.append(system)
        if len(updates) != order + 1:
            return system.old
        values, _ = torch.linalg.eigh(system.gamma)
        assert float(values[0]) > 0
        least = system.error(torch.linalg.solve(system.gamma, system.target.T).T)
        bound = 1.2 * least + 0.05
        return bounded_ridge(system, bound)

    order, updates = {1: 0, 2: 1, 0: 2}[n], []
    new, _ = sweep(tensor, (ring[0], ring[1], ring[2]), update, weighted=True)
    cores = [core, first, last]
    found = [new[0].transpose(1, 2), new[1].transpose(1, 2), new[2]][n]

    def at(flat: Tensor) -> list[Tensor]:
        return [flat.reshape(value.shape) if i == n else value for i, value in enumerate(cores)]

    def sensitivity(flat: Tensor) -> Tensor:
        g, u, v = at(flat)
        open_chains = (
            torch.einsum("sra,trb->satb", u, v),
            torch.einsum("dab,trb->datr", g, v),
            torch.einsum("dab,sra->dbsr", g, u),
        )
        return sum(size * chain.square().sum() for size, chain in zip((3, 4, 5), open_chains, strict=True))

    def spare(flat: Tensor) -> Tensor:
        return bound - (tensor - torch.einsum("dab,sra,trb->dst", *at(flat))).square().sum()

    # SLSQP wants variables and a value of about 1.
    start = torch.from_numpy(least_core(cores, n, tensor))
    size, most = start.norm(), float(sensitivity(start))

    def for_scipy(function: Callable[[Tensor], Tensor]) -> dict[str, Callable[[np.ndarray], Any]]:
        slope = torch.func.grad(lambda z: function(z * size))
        return {
            "fun": lambda z: float(function(torch.from_numpy(z) * size)),
            "jac": lambda z: slope(torch.from_numpy(z)).numpy(),
        }

    theirs = minimize(
        **for_scipy(lambda flat: sensitivity(flat) / most),
        x0=(start / size).numpy(),
        method="SLSQP",
        constraints={"type": "ineq", **for_scipy(spare)},
        options={"ftol": 1e-13, "maxiter": 1000},
    )
    assert float(spare(torch.from_numpy(theirs.x) * size)) > -1e-9
    assert float(spare(found)) >= -1e-10
    assert float(sensitivity(found)) / most == pytest.approx(theirs.fun, rel=1e-8)


def least_core(cores: list[Tensor], n: int, tensor: Tensor) -> np.ndarray:
    """The linear least squares of core n by NumPy: the other two multiplied out, and the tensor unfolded."""
    g, u, v = (value.numpy() for value in cores)
    w = tensor.numpy()
    if n == 0:
        design, target = np.einsum("sra,trb->stab", u, v).reshape(20, 4), w.reshape(3, 20).T
    elif n == 1:
        design, target = np.einsum("dab,trb->dtra", g, v).reshape(15, 4), w.transpose(0, 2, 1).reshape(15, 4)
    else:
        design, target = np.einsum("dab,sra->dsrb", g, u).reshape(12, 4), w.reshape(12, 5)
    return np.linalg.lstsq(design, target, rcond=None)[0].T.ravel()


def test_correction_after_a_long_fit_from_a_bad_start_frees_much_sensitivity():
    tensor = kernel(9, 16, 16)
    fit = chain_als(tensor, (6, 4, 4), start=random_cores(9, 16, 16, (6, 4, 4)), sweeps=400, tolerance=0.0)
    before = chain_sensitivity(fit.cores)
    reached = []
    for sweeps in (1, 5, 20):
        corrected = correct_chain(tensor, fit.cores, sweeps=sweeps, tolerance=0.0)
        assert error(tensor, corrected) <= 1.05**2 * fit.error * (1 + 1e-6)
        reached.append(chain_sensitivity(corrected))
    assert all(later <= earlier for earlier, later in pairwise([before, *reached]))
    assert reached[-1] < before / 10
    assert chain_sensitivity(correct_chain(tensor, fit.cores, slack=1.0)) <= before
