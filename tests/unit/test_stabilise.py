"""Error Preserving Correction against Monte-Carlo, SciPy's SLSQP and the figures of its derivation."""

from __future__ import annotations

import itertools
import math
from functools import reduce

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from tensorly.cp_tensor import cp_to_tensor
from torch import Tensor

from ranksearch.decompositions.als import Factors, cp_als
from ranksearch.decompositions.stabilise import (
    _least_error,
    _least_sensitive,
    _root,
    bounded,
    correct,
    cp_sensitivity,
    degeneracy,
    rebalance,
)
from ranksearch.errors import DecompositionError
from tests.cases import border_rank, conv_like


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def dense(factors: Factors | list[Tensor]) -> np.ndarray:
    return np.asarray(cp_to_tensor((np.ones(factors[0].shape[1]), [f.numpy() for f in factors])))


def error(tensor: Tensor, factors: Factors | list[Tensor]) -> float:
    return float(((tensor.double().numpy() - dense(factors)) ** 2).sum())


@pytest.mark.parametrize("shape", [(4, 5), (9, 8, 6), (3, 2, 5, 4)])
def test_sensitivity_is_the_expected_squared_error(shape: tuple[int, ...]) -> None:
    rank, deviation, draws = 3, 1e-5, 8000
    factors = [normal(n, rank, seed=i) for i, n in enumerate(shape)]
    letters = "ijkl"[: len(shape)]
    noise = np.random.default_rng(0)
    noisy = [f.numpy() + deviation * noise.standard_normal((draws, *f.shape)) for f in factors]
    sampled = np.einsum(",".join(f"z{c}r" for c in letters) + f"->z{letters}", *noisy, optimize=True)
    measured = ((sampled - dense(factors)) ** 2).sum() / draws / deviation**2
    assert cp_sensitivity(factors) == pytest.approx(measured, rel=0.02)


@settings(max_examples=30)
@given(shape=st.lists(st.integers(1, 6), min_size=2, max_size=4), rank=st.integers(1, 5), seed=st.integers(0, 99))
def test_rebalancing_keeps_the_tensor_and_reaches_the_closed_form(shape: list[int], rank: int, seed: int) -> None:
    factors = [normal(n, rank, seed=seed + i) * 10**i for i, n in enumerate(shape)]
    better = rebalance(factors)
    whole = dense(factors)
    np.testing.assert_allclose(dense(better), whole, atol=1e-12 * np.abs(whole).max())
    assert cp_sensitivity(better) <= cp_sensitivity(factors) * (1 + 1e-12)
    order = len(shape)
    norms = reduce(torch.mul, [f.norm(dim=0) for f in factors])
    least = order * math.prod(shape) ** (1 / order) * float(norms.pow(2 - 2 / order).sum())
    assert cp_sensitivity(better) == pytest.approx(least, rel=1e-9)


def mode_problem(seed: int) -> tuple[Tensor, list[Tensor], Tensor, list[Tensor]]:
    """A tensor of norm 1, factors, and what an update of mode 0 sees of them."""
    tensor = normal(3, 4, 5, seed=seed)
    tensor = tensor / tensor.norm()
    factors = [normal(n, 2, seed=seed + n) for n in tensor.shape]
    product = torch.einsum("ijk,jr,kr->ir", tensor, factors[1], factors[2])
    return tensor, factors, product, [f.T @ f for f in factors]


def objective(factors: list[np.ndarray], name: str) -> float:
    """From the definitions: an expectation over noise for one, squared norms of outer products for the other."""
    if name == "norms":
        return sum(float((np.einsum("i,j,k->ijk", *(f[:, r] for f in factors)) ** 2).sum()) for r in range(2))
    total = 0.0
    for mode, factor in enumerate(factors):
        for r in range(2):
            a, b = (f[:, r] for n, f in enumerate(factors) if n != mode)
            total += len(factor) * float((np.outer(a, b) ** 2).sum())
    return total


@pytest.mark.parametrize("name", ["sensitivity", "norms"])
@pytest.mark.parametrize("seed", range(3))
def test_an_update_is_the_optimum_that_slsqp_finds(name: str, seed: int) -> None:
    tensor, factors, product, grams = mode_problem(seed)
    matrix = np.einsum("jr,kr->jkr", factors[1].numpy(), factors[2].numpy()).reshape(20, 2)
    least = np.linalg.lstsq(matrix, tensor.numpy().reshape(3, 20).T, rcond=None)[0].T
    others = [f.numpy() for f in factors[1:]]

    def misfit(a: np.ndarray) -> float:
        return float(((tensor.numpy() - np.einsum("ir,jr,kr->ijk", a.reshape(3, 2), *others)) ** 2).sum())

    bound = 0.5 * misfit(least) + 0.5
    new = _least_sensitive(0, product, grams, factors[0], total=1.0, bound=bound, sizes=tensor.shape, objective=name)
    found = minimize(
        lambda a: objective([a.reshape(3, 2), *others], name),
        least.ravel(),
        constraints={"type": "ineq", "fun": lambda a: bound - misfit(a)},
        method="SLSQP",
        options={"ftol": 1e-15, "maxiter": 200},
    )
    assert misfit(new.numpy()) == pytest.approx(bound, rel=1e-8)
    assert objective([new.numpy(), *others], name) == pytest.approx(found.fun, rel=1e-8)
    np.testing.assert_allclose(new.numpy().ravel(), found.x, atol=1e-5)


@pytest.mark.parametrize("seed", range(3))
def test_an_update_of_the_dual_is_the_optimum_that_slsqp_finds(seed: int) -> None:
    tensor, factors, product, grams = mode_problem(seed)
    others = [f.numpy() for f in factors[1:]]

    def misfit(a: np.ndarray) -> float:
        return float(((tensor.numpy() - np.einsum("ir,jr,kr->ijk", a.reshape(3, 2), *others)) ** 2).sum())

    limit = objective([np.zeros((3, 2)), *others], "sensitivity") + 0.05
    new = _least_error(0, product, grams, factors[0], limit=limit, sizes=tensor.shape)
    found = minimize(
        misfit,
        np.zeros(6) + 0.01,
        constraints={"type": "ineq", "fun": lambda a: limit - objective([a.reshape(3, 2), *others], "sensitivity")},
        method="SLSQP",
        options={"ftol": 1e-15, "maxiter": 200},
    )
    assert objective([new.numpy(), *others], "sensitivity") == pytest.approx(limit, rel=1e-7)
    assert misfit(new.numpy()) == pytest.approx(found.fun, rel=1e-8)


@given(
    values=st.lists(st.tuples(st.floats(-6, 3), st.floats(-12, 0)), min_size=1, max_size=8),
    share=st.floats(1e-6, 0.999),
)
def test_the_root_of_the_path_over_many_magnitudes(values: list[tuple[float, float]], share: float) -> None:
    numerators, poles = (torch.tensor([10.0 ** v[i] for v in values], dtype=torch.float64) for i in (0, 1))
    target = share * float((numerators / poles**2).sum())
    x = _root(numerators, poles, target)
    reached = sum(n / (p + x) ** 2 for n, p in zip(numerators.tolist(), poles.tolist(), strict=True))
    assert reached == pytest.approx(target, rel=1e-9)


CASES = [
    pytest.param(conv_like(9, 12, 10), 16, id="over-complete"),
    pytest.param(conv_like(9, 40, 48).float(), 8, id="wide, corrected inside first"),
    pytest.param(conv_like(3, 3, 10, 12), 18, id="order 4"),
    pytest.param(conv_like(20, 16), 5, id="matrix"),
    pytest.param(conv_like(9, 10, 8) * 1e-4, 12, id="small"),
]


@pytest.mark.parametrize(("tensor", "rank"), CASES)
@pytest.mark.parametrize("slack", [1.0, 1.01, 1.05])
@pytest.mark.parametrize("name", ["sensitivity", "norms"])
def test_the_correction_keeps_the_bound_and_never_raises_the_objective(
    tensor: Tensor, rank: int, slack: float, name: str
) -> None:
    factors = rebalance(cp_als(tensor, rank, sweeps=60).factors)
    bound = slack**2 * error(tensor, factors)

    def value(f: Factors) -> float:
        norms = reduce(torch.mul, [x.square().sum(0) for x in f])
        return cp_sensitivity(f) if name == "sensitivity" else float(norms.sum())

    values = [value(factors)]
    for sweeps in (1, 2, 5, 20, 60):
        better = correct(tensor, factors, slack=slack, objective=name, sweeps=sweeps, tolerance=0)
        assert error(tensor, better) <= bound * (1 + 1e-9)
        values.append(value(better))
    # Runs of another length begin inside the factors' span for longer; in one run every sweep lowers the objective.
    assert all(b <= a * (1 + 1e-9) for a, b in itertools.pairwise(values)) or tensor.numel() > 15_000
    assert values[-1] <= values[0] * (1 + 1e-9)
    assert values[-1] < 0.999 * values[0] or slack == 1.0
    if slack > 1:
        assert error(tensor, better) == pytest.approx(bound, rel=1e-6)


@pytest.mark.parametrize(("tensor", "rank"), CASES)
def test_the_dual_keeps_its_limit_and_lowers_the_error(tensor: Tensor, rank: int) -> None:
    factors = rebalance(cp_als(tensor, rank, sweeps=60).factors)
    best = cp_sensitivity(factors)
    for share in (2.0, 1.0, 0.3, 0.1):
        better = bounded(tensor, factors, limit=share * best, sweeps=40)
        assert cp_sensitivity(better) <= share * best * (1 + 1e-9)
        shrunk = [f * min(share, 1.0) ** (0.5 / (tensor.ndim - 1)) for f in factors]
        assert error(tensor, better) <= error(tensor, shrunk) * (1 + 1e-9)


def test_the_dual_at_the_sensitivity_of_the_correction_is_no_worse_than_it() -> None:
    tensor = conv_like(9, 12, 10)
    factors = cp_als(tensor, 16).factors
    better = correct(tensor, factors, sweeps=200, tolerance=1e-5)
    dual = bounded(tensor, better, limit=cp_sensitivity(better))
    assert error(tensor, dual) <= error(tensor, better) * (1 + 1e-9)


@pytest.fixture(scope="module")
def long_fit() -> Factors:
    return rebalance(cp_als(conv_like(9, 32, 32), 48, sweeps=3000, tolerance=0).factors)


@pytest.mark.slow
def test_the_over_complete_kernel_loses_nine_tenths_of_its_sensitivity(long_fit: Factors) -> None:
    tensor = conv_like(9, 32, 32)
    left = [cp_sensitivity(correct(tensor, long_fit, slack=s)) / cp_sensitivity(long_fit) for s in (1.0, 1.01, 1.05)]
    assert left[0] > left[1] > left[2]
    assert left[2] <= 0.1


def test_plain_als_drifts_into_degeneracy_on_an_over_complete_kernel_and_the_correction_undoes_it() -> None:
    tensor = conv_like(9, 32, 32)
    fits = [cp_als(tensor, 48, sweeps=n, tolerance=0).factors for n in (10, 50, 200)]
    plain = [cp_sensitivity(rebalance(f)) for f in fits]
    assert plain[0] < plain[1] < plain[2]
    assert degeneracy(fits[0]) < degeneracy(fits[2])
    kept = [cp_sensitivity(correct(tensor, fits[2], sweeps=n, tolerance=0)) for n in (1, 5, 30, 100)]
    assert kept == sorted(kept, reverse=True)
    assert kept[-1] < plain[1] < 0.5 * plain[2]
    assert degeneracy(correct(tensor, fits[2])) < 0.2 * degeneracy(fits[2])


def test_on_the_border_rank_tensor_als_diverges_and_the_correction_holds_the_bound() -> None:
    tensor = border_rank()
    fits = [cp_als(tensor, 2, sweeps=n, tolerance=0) for n in (8, 12, 20)]
    plain = [cp_sensitivity(rebalance(f.factors)) for f in fits]
    assert plain[2] > 1.5 * plain[1] > 2 * plain[0]
    assert fits[2].error < fits[1].error < fits[0].error
    for fit, before in zip(fits[1:], plain[1:], strict=True):
        better = correct(tensor, fit.factors, slack=2.0, sweeps=200, tolerance=1e-6)
        assert error(tensor, better) == pytest.approx(4 * error(tensor, fit.factors), rel=1e-3)
        assert cp_sensitivity(better) < 0.75 * before


def test_degeneracy_of_known_tensors() -> None:
    eye = torch.eye(3, dtype=torch.float64)
    assert degeneracy([eye, eye, eye]) == pytest.approx(1 / math.sqrt(3))
    assert degeneracy([torch.ones(2, 1), torch.ones(3, 1)]) == pytest.approx(1)
    cancelling = torch.tensor([[1.0, -1.0], [0.0, 1e-3]], dtype=torch.float64)
    assert degeneracy([cancelling, torch.ones(2, 2), torch.ones(2, 2)]) > 900
    assert degeneracy([torch.zeros(2, 1), torch.zeros(3, 1)]) == 0


def test_an_exact_fit_is_only_rebalanced() -> None:
    factors = [normal(n, 3, seed=n) * n for n in (4, 5, 6)]
    tensor = torch.from_numpy(dense(factors))
    better = correct(tensor, factors)
    np.testing.assert_allclose(dense(better), tensor.numpy(), atol=1e-12)
    for one, other in zip(better, rebalance(factors), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)


def test_columns_of_zeros_and_the_zero_tensor() -> None:
    tensor = conv_like(5, 6, 7)
    factors = [torch.nn.functional.pad(f, (0, 2)) for f in cp_als(tensor, 3).factors]
    better = correct(tensor, factors)
    assert all(bool(torch.isfinite(f).all()) for f in better)
    assert error(tensor, better) <= 1.05**2 * error(tensor, factors) * (1 + 1e-9)
    zeros = [torch.zeros(n, 2) for n in (3, 4, 5)]
    assert all(not f.any() for f in correct(torch.zeros(3, 4, 5), zeros))
    assert all(not f.any() for f in bounded(torch.zeros(3, 4, 5), zeros, limit=1.0))


def test_the_same_bits_twice() -> None:
    tensor = conv_like(9, 12, 10).float()
    factors = cp_als(tensor, 14).factors
    for one, other in zip(correct(tensor, factors), correct(tensor, factors), strict=True):
        assert torch.equal(one, other)


def test_values_out_of_bounds_are_refused() -> None:
    tensor = conv_like(3, 4, 5)
    factors = cp_als(tensor, 2).factors
    with pytest.raises(DecompositionError, match="slack"):
        correct(tensor, factors, slack=0.9)
    with pytest.raises(DecompositionError, match="limit"):
        bounded(tensor, factors, limit=0)
    for run in (lambda t, f: correct(t, f), lambda t, f: bounded(t, f, limit=1.0)):
        with pytest.raises(DecompositionError, match="NaN"):
            run(tensor * math.nan, factors)
        with pytest.raises(DecompositionError, match="NaN"):
            run(tensor, [f * math.inf for f in factors])
