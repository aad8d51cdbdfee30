"""CP-ALS against tensorly, NumPy's SVD and planted ranks."""

from __future__ import annotations

import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import tensorly
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorly.cp_tensor import cp_to_tensor
from tensorly.decomposition import parafac
from torch import Tensor

from ranksearch.decompositions.als import Fit, cp_als, cp_als_all, cp_tensor
from ranksearch.decompositions.peel import peel
from ranksearch.errors import DecompositionError, RankError
from tests.cases import border_rank, conv_like


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def planted(*shape: int, rank: int, seed: int = 0) -> Tensor:
    factors = [normal(n, rank, seed=seed + i).numpy() for i, n in enumerate(shape)]
    return torch.from_numpy(cp_to_tensor((np.ones(rank), factors)))


def error_of(tensor: Tensor, fit: Fit) -> float:
    whole = cp_to_tensor((np.ones(fit.factors[0].shape[1]), [f.numpy() for f in fit.factors]))
    x = tensor.double().numpy()
    return float(((x - whole) ** 2).sum() / (x**2).sum())


def tensorly_error(tensor: Tensor, rank: int) -> float:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = parafac(tensor.numpy(), rank, n_iter_max=100, random_state=0)
    x = tensor.double().numpy()
    return float(((x - tensorly.cp_to_tensor(found)) ** 2).sum() / (x**2).sum())


@settings(max_examples=40)
@given(shape=st.lists(st.integers(1, 6), min_size=2, max_size=4), rank=st.integers(1, 12), seed=st.integers(0, 99))
def test_every_shape_and_rank_has_a_fit_of_the_error_it_says(shape: list[int], rank: int, seed: int) -> None:
    tensor = normal(*shape, seed=seed)
    fit = cp_als(tensor, rank, sweeps=20)
    assert [tuple(f.shape) for f in fit.factors] == [(n, rank) for n in shape]
    assert 0 <= fit.error <= 1
    assert fit.error == pytest.approx(error_of(tensor, fit), rel=1e-6, abs=1e-20)
    np.testing.assert_allclose(
        cp_tensor(fit.factors).numpy(), cp_to_tensor((np.ones(rank), [f.numpy() for f in fit.factors])), atol=1e-12
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("tensor", "rank"),
    [
        (conv_like(9, 16, 16), 8),
        (conv_like(9, 16, 16), 24),
        (conv_like(9, 32, 24, seed=1), 10),
        (conv_like(9, 40, 3, seed=2), 12),
        (conv_like(9, 64, 64, seed=3), 12),
        (conv_like(3, 3, 12, 16, seed=4), 20),
        (normal(9, 16, 16), 20),
        (normal(5, 6, 7, seed=1), 4),
        (normal(3, 3, 8, 8, seed=2), 10),
    ],
    ids=lambda value: str(tuple(value.shape)) if isinstance(value, Tensor) else str(value),
)
def test_no_worse_than_tensorly(tensor: Tensor, rank: int, dtype: torch.dtype) -> None:
    fit = cp_als(tensor.to(dtype), rank)
    assert fit.error <= 1.02 * tensorly_error(tensor, rank)
    assert fit.error == pytest.approx(error_of(tensor.to(dtype), fit), rel=1e-6)


@pytest.mark.parametrize("shape", [(9, 12, 10), (30, 40, 50), (3, 3, 8, 9)])
def test_a_planted_rank_is_recovered(shape: tuple[int, ...]) -> None:
    fit = cp_als(planted(*shape, rank=4), 4, sweeps=2000, tolerance=1e-6, restarts=3)
    assert fit.error < 1e-16


def test_a_planted_rank_is_recovered_from_single_precision() -> None:
    """To the rounding of the tensor itself, far under that of a product in single precision."""
    fit = cp_als(planted(9, 40, 30, rank=4).float(), 4, sweeps=2000, tolerance=1e-6, restarts=3)
    assert fit.error < 1e-13


@pytest.mark.parametrize("shape", [(7, 5), (20, 60), (1, 12, 9), (6, 1, 1, 8)])
def test_a_matrix_has_its_truncated_svd(shape: tuple[int, ...]) -> None:
    tensor = normal(*shape)
    values = np.linalg.svd(tensor.squeeze().numpy(), compute_uv=False) ** 2
    for rank in (1, 3, 5):
        assert cp_als(tensor, rank).error == pytest.approx(values[rank:].sum() / values.sum(), rel=1e-8, abs=1e-20)


@pytest.mark.parametrize("shape", [(4, 5, 6), (9, 7, 3), (3, 2, 4, 5)])
def test_exact_at_the_product_of_all_sizes_but_the_largest_and_beyond(shape: tuple[int, ...]) -> None:
    exact = int(np.prod(sorted(shape)[:-1]))
    for rank in (exact, exact + 3):
        assert cp_als(normal(*shape), rank).error < 1e-25
        assert cp_als(normal(*shape).float(), rank).error < 1e-25


def test_rank_1_of_an_outer_product() -> None:
    fit = cp_als(planted(4, 5, 6, rank=1), 1)
    assert fit.error < 1e-25


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_the_magnitude_of_the_kernel_does_not_matter(scale: float) -> None:
    tensor = conv_like(9, 12, 10)
    assert cp_als(tensor * scale, 6).error == pytest.approx(cp_als(tensor, 6).error, rel=1e-6)
    single = cp_als((tensor * scale).float(), 6)
    assert single.error == pytest.approx(error_of((tensor * scale).float(), single), rel=1e-6)


def test_a_start_grows_the_rank_and_never_the_error() -> None:
    tensor = conv_like(9, 24, 20)
    fit = cp_als(tensor, 4)
    for rank in (4, 5, 9, 16, 40):
        larger = cp_als(tensor * 3, rank, start=(*fit.factors[:-1], 3 * fit.factors[-1]), sweeps=15)
        assert larger.error <= fit.error * (1 + 1e-12)
        assert cp_als(tensor, rank, start=fit.factors, sweeps=0).error <= fit.error * (1 + 1e-12)
        fit = Fit(factors=(*larger.factors[:-1], larger.factors[-1] / 3), error=larger.error, sweeps=0)


def test_more_sweeps_and_restarts_never_raise_the_error() -> None:
    tensor = normal(6, 7, 8)
    errors = [cp_als(tensor, 5, sweeps=n, tolerance=0).error for n in (0, 1, 3, 10, 30)]
    assert errors == sorted(errors, reverse=True)
    tries = [cp_als(tensor, 5, restarts=n).error for n in (1, 3, 6)]
    assert tries == sorted(tries, reverse=True)


def test_the_same_bits_twice() -> None:
    tensor = conv_like(9, 40, 36).float()
    first, again = (cp_als(tensor, 12, restarts=2, seed=3) for _ in range(2))
    torch.rand(3)
    assert all(torch.equal(a, b) for a, b in zip(first.factors, again.factors, strict=True))
    assert first.error == again.error
    one, other = (cp_als(normal(5, 5, 5), 6, restarts=3, seed=n) for n in (0, 1))
    assert not torch.equal(one.factors[0], other.factors[0])


def test_the_tensor_and_the_start_are_untouched() -> None:
    tensor = normal(5, 6, 7)
    start = [normal(n, 2) for n in tensor.shape]
    copies = [tensor.clone(), *(s.clone() for s in start)]
    cp_als(tensor, 3, start=start)
    assert all(torch.equal(a, b) for a, b in zip([tensor, *start], copies, strict=True))


def test_dead_channels_stay_exactly_dead_or_nearly() -> None:
    tensor = conv_like(9, 12, 10)
    tensor[:, 3] = 0
    tensor[:, :, 7] = 0
    fit = cp_als(tensor, 16)
    assert all(bool(torch.isfinite(f).all()) for f in fit.factors)
    assert fit.factors[1][3].abs().max() < 1e-6 * fit.factors[1].abs().max()


def test_a_degenerate_fit_ends_and_is_finite() -> None:
    fit = cp_als(border_rank(), 2, sweeps=1000, tolerance=0)
    assert fit.error < 1e-4
    assert all(bool(torch.isfinite(f).all()) for f in fit.factors)
    assert fit.error == pytest.approx(error_of(border_rank(), fit), rel=1e-3)


def test_zero_has_zero_factors() -> None:
    fit = cp_als(torch.zeros(3, 4, 5), 2)
    assert fit.error == 0
    assert all(not f.any() for f in fit.factors)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_kernel_that_is_not_finite_is_refused(value: float) -> None:
    tensor = normal(3, 4, 5)
    tensor[1, 2, 3] = value
    with pytest.raises(DecompositionError, match="NaN or infinite"):
        cp_als(tensor, 2)
    with pytest.raises(DecompositionError, match="start"):
        cp_als(normal(3, 4, 5), 2, start=[tensor[0].T[:, :2].new_full((n, 2), value) for n in (3, 4, 5)])


def test_wrong_ranks_and_starts_are_refused() -> None:
    tensor = normal(3, 4, 5)
    with pytest.raises(RankError, match="at least 1"):
        cp_als(tensor, 0)
    with pytest.raises(RankError, match="order 2"):
        cp_als(tensor[0, 0], 1)
    with pytest.raises(RankError, match="start"):
        cp_als(tensor, 2, start=[normal(n, 3) for n in tensor.shape])
    with pytest.raises(RankError, match="start"):
        cp_als(tensor, 2, start=[normal(n, 2) for n in (3, 4)])
    with pytest.raises(RankError, match="one each"):
        cp_als_all([tensor], [1, 2])


def test_all_layers_are_as_one_by_one_under_any_map() -> None:
    tensors = [conv_like(9, 8, 8, seed=i) for i in range(3)]
    single = [cp_als(t, r, sweeps=10) for t, r in zip(tensors, (3, 5, 12), strict=True)]
    with ThreadPoolExecutor(2) as pool:
        for fits in (
            cp_als_all(tensors, (3, 5, 12), sweeps=10),
            cp_als_all(tensors, (3, 5, 12), sweeps=10, map=pool.map),
        ):
            for one, other in zip(single, fits, strict=True):
                assert all(torch.equal(a, b) for a, b in zip(one.factors, other.factors, strict=True))


def test_the_terms_of_the_start_are_orthogonal() -> None:
    factors = peel(conv_like(9, 12, 10), 20)
    gram = np.prod([(f.T @ f).numpy() for f in factors], axis=0)
    np.testing.assert_allclose(gram, np.diag(np.diag(gram)), atol=1e-12)
