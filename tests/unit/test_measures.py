"""Sensitivity, degeneracy and error of any chain, against noise on its factors and the formulas of single formats."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from ranksearch.conv import Conv
from ranksearch.decompositions import FORMATS, compressed_stages, max_rank, report
from ranksearch.decompositions.loop import chain_sensitivity
from ranksearch.decompositions.measures import sensitivity
from ranksearch.decompositions.stabilise import cp_sensitivity, degeneracy
from tests import oracles

SPATIAL = Conv(in_channels=6, out_channels=8, kernel=(3, 2), size=(5, 5))
GROUPED = SPATIAL.resized(groups=2)
POINTWISE = Conv(in_channels=6, out_channels=8, size=(5, 5))
RANKS = {
    "tucker2": (2, 3),
    "svd": (3,),
    "spatial-svd": (3,),
    "channel-svd": (3,),
    "cp": (4,),
    "cp4": (4,),
    "tkd-cp": (2, 2, 3),
    "tensor-chain": (2, 2, 3),
    "tensor-train": (2, 3, 2),
}


def conv_of(name: str, grouped: bool) -> Conv:
    plain = POINTWISE if name == "svd" else SPATIAL
    return plain.resized(groups=2) if grouped else plain


def random_kernels(name: str, conv: Conv, ranks: tuple[int, ...], generator: torch.Generator) -> list[Tensor]:
    shapes = [stage.weight_shape for stage in compressed_stages(FORMATS[name], conv, ranks)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def ranks_of(name: str, conv: Conv) -> tuple[int, ...]:
    return tuple(min(pair) for pair in zip(RANKS[name], max_rank(FORMATS[name], conv), strict=True))


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("grouped", [False, True])
def test_the_sensitivity_is_the_error_per_variance_of_noise(name: str, grouped: bool) -> None:
    conv = conv_of(name, grouped)
    ranks = ranks_of(name, conv)
    generator = torch.Generator().manual_seed(0)
    kernels = random_kernels(name, conv, ranks, generator)
    stages = compressed_stages(FORMATS[name], conv, ranks)
    exact = oracles.kernel(name, [kernel.numpy() for kernel in kernels], conv.groups)
    size, errors = 1e-4, []
    for _ in range(3000):
        noisy = [k + size * torch.randn(k.shape, generator=generator, dtype=torch.float64) for k in kernels]
        found = oracles.kernel(name, [kernel.numpy() for kernel in noisy], conv.groups)
        errors.append(((found - exact) ** 2).sum() / size**2)
    spread = np.std(errors) / np.sqrt(len(errors))
    assert spread < 0.01 * np.mean(errors), "enough draws to tell 2 %"
    assert sensitivity(conv, stages, kernels) == pytest.approx(np.mean(errors), rel=0.02)


def test_it_agrees_with_the_formulas_of_cp_and_of_the_chain() -> None:
    generator = torch.Generator().manual_seed(1)
    first, filters, last = random_kernels("cp", SPATIAL, (4,), generator)
    stages = compressed_stages(FORMATS["cp"], SPATIAL, (4,))
    factors = [filters.flatten(1).T, first.flatten(1).T, last.flatten(1)]
    found = report(FORMATS["cp"], SPATIAL, (4,), torch.zeros(8, 6, 3, 2), [first, filters, last])
    assert sensitivity(SPATIAL, stages, [first, filters, last]) == pytest.approx(cp_sensitivity(factors), rel=1e-12)
    assert found.degeneracy == pytest.approx(degeneracy(factors), rel=1e-12)
    wide, shared, deep = random_kernels("tensor-chain", SPATIAL, (2, 2, 3), generator)
    stages = compressed_stages(FORMATS["tensor-chain"], SPATIAL, (2, 2, 3))
    cores = (
        shared.flatten(2).permute(2, 1, 0),
        wide.flatten(1).reshape(2, 2, 6).permute(2, 0, 1),
        deep.flatten(1).reshape(8, 2, 3),
    )
    assert sensitivity(SPATIAL, stages, [wide, shared, deep]) == pytest.approx(chain_sensitivity(cores), rel=1e-12)


@pytest.mark.parametrize(("name", "grouped"), list(itertools.product(FORMATS, [False, True])))
def test_the_error_is_that_of_the_composed_kernel_in_the_metric(name: str, grouped: bool) -> None:
    conv = conv_of(name, grouped)
    ranks = ranks_of(name, conv)
    generator = torch.Generator().manual_seed(2)
    kernels = random_kernels(name, conv, ranks, generator)
    weight = torch.randn(conv.weight_shape, generator=generator, dtype=torch.float64)
    roots = torch.randn((conv.groups, *2 * [conv.in_channels // conv.groups]), generator=generator, dtype=torch.float64)
    difference = oracles.kernel(name, [kernel.numpy() for kernel in kernels], conv.groups) - weight.numpy()
    plain = report(FORMATS[name], conv, ranks, weight, kernels)
    assert plain.relative_error == pytest.approx((difference**2).sum() / (weight.numpy() ** 2).sum())
    metric = report(FORMATS[name], conv, ranks, weight, kernels, roots if grouped else roots[0])

    def squared(kernel: np.ndarray) -> float:
        parts = zip(np.split(kernel, conv.groups), roots.numpy(), strict=True)
        return sum(float((np.einsum("ts...,sr->tr...", part, root) ** 2).sum()) for part, root in parts)

    assert metric.relative_error == pytest.approx(squared(difference) / squared(weight.numpy()))


def test_only_sums_that_can_cancel_have_a_degeneracy() -> None:
    generator = torch.Generator().manual_seed(3)
    for name, grouped in itertools.product(FORMATS, [False, True]):
        conv = conv_of(name, grouped)
        ranks = ranks_of(name, conv)
        kernels = random_kernels(name, conv, ranks, generator)
        weight = torch.zeros(conv.weight_shape)
        found = report(FORMATS[name], conv, ranks, weight, kernels).degeneracy
        assert (found is not None) == (name in ("cp", "cp4", "tkd-cp", "tensor-chain"))


def test_cancelling_terms_are_told() -> None:
    first = torch.tensor([[1.0, 0.0], [1.0, 1e-3]], dtype=torch.float64)[..., None, None]
    filters = torch.ones((2, 1, 3, 2), dtype=torch.float64)
    last = torch.tensor([[1e3, -1e3]], dtype=torch.float64)[..., None, None]
    conv = Conv(in_channels=2, out_channels=1, kernel=(3, 2), size=(5, 5))
    found = report(FORMATS["cp"], conv, (2,), torch.ones(1, 2, 3, 2), [first, filters, last])
    assert found.degeneracy == pytest.approx(1e3, rel=1e-3)
