"""Higher-order orthogonal iteration against tensorly's."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from tensorly.decomposition import partial_tucker
from tensorly.tenalg import multi_mode_dot
from torch import Tensor

from ranksearch.decompositions.hooi import hooi
from ranksearch.errors import DecompositionError, RankError
from tests.cases import conv_like

CASES = [
    (conv_like(9, 20, 24), {1: 6, 2: 8}),
    (conv_like(3, 3, 16, 12, seed=1), {2: 5, 3: 4}),
    (torch.randn(9, 14, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64), {1: 7, 2: 5}),
    (conv_like(9, 20, 24, seed=2).float(), {1: 20, 2: 3}),
]


def error(tensor: Tensor, core: np.ndarray, bases: list[np.ndarray], modes: list[int]) -> float:
    return float(((tensor.numpy() - multi_mode_dot(core, bases, modes=modes)) ** 2).sum())


@pytest.mark.parametrize(("tensor", "ranks"), CASES)
def test_no_worse_than_tensorly(tensor: Tensor, ranks: dict[int, int]) -> None:
    core, bases = hooi(tensor, ranks, sweeps=100)
    (other, factors), _ = partial_tucker(tensor.numpy(), rank=list(ranks.values()), modes=list(ranks))
    ours = error(tensor, core.numpy(), [bases[m].numpy() for m in ranks], list(ranks))
    assert ours <= 1.001 * error(tensor, other, factors, list(ranks))
    assert ours == pytest.approx(float(tensor.square().sum() - core.square().sum()), rel=1e-4)
    for mode, basis in bases.items():
        assert basis.shape == (tensor.shape[mode], ranks[mode])
        np.testing.assert_allclose((basis.T @ basis).numpy(), np.eye(ranks[mode]), atol=1e-5)


@pytest.mark.parametrize(("tensor", "ranks"), CASES[:3])
def test_sweeps_never_lose_norm(tensor: Tensor, ranks: dict[int, int]) -> None:
    norms = [float(hooi(tensor, ranks, sweeps=n)[0].norm()) for n in (0, 1, 2, 5)]
    assert all(a <= b * (1 + 1e-12) for a, b in itertools.pairwise(norms))


def test_exact_at_full_rank_and_zero_stays_zero() -> None:
    tensor = conv_like(4, 5, 6)
    core, bases = hooi(tensor, {1: 5, 2: 6})
    assert error(tensor, core.numpy(), [bases[1].numpy(), bases[2].numpy()], [1, 2]) < 1e-25
    core, bases = hooi(torch.zeros(4, 5, 6), {1: 2})
    assert not core.any()
    assert bool(torch.isfinite(bases[1]).all())


def test_refusals() -> None:
    with pytest.raises(RankError, match="mode 1 must be 1 to 5"):
        hooi(conv_like(4, 5, 6), {1: 6})
    with pytest.raises(DecompositionError, match="NaN"):
        hooi(conv_like(4, 5, 6) * math.nan, {1: 2})
