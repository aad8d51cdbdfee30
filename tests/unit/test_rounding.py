"""Weights and activations of few bits: on their grids, with the least error, and trained through."""

from __future__ import annotations

import copy
import itertools
from typing import cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ranksearch.calibration import sample_outputs
from ranksearch.decompositions import FORMATS, max_rank, prepare
from ranksearch.refit import sequential_regression
from ranksearch.rounding import (
    Clip,
    range_of,
    ranges,
    round_for_good,
    round_weights,
    round_while_training,
    rounded,
    rounded_to_outputs,
    rounding_activations,
    scales,
    weight_bytes,
    widths_of,
)
from ranksearch.stages import kernel_of, set_kernel
from ranksearch.surgery import build_layer, find_layers
from tests.cases import PAIRS, LayerCase
from tests.networks import SmallNet, small_images, small_net
from tests.unit.test_surgery import RANKS, rank_map

BITS = [4, 8]


def kernels() -> Tensor:
    return (
        torch.randn(6, 5, 3, 3, generator=torch.Generator().manual_seed(0))
        * torch.logspace(-3, 2, 6)[:, None, None, None]
    )


def on_grid(kernel: Tensor, bits: int) -> bool:
    """Whether every output channel is whole multiples of one step, none of more than the largest whole number."""
    largest = 2 ** (bits - 1) - 1
    for row in kernel.flatten(1).double():
        top = float(row.abs().max())
        # The step is not known: the largest value is one of the multiples of it.
        fits = [n for n in range(1, largest + 1) if bool(((row * n / top).round() - row * n / top).abs().max() < 1e-3)]
        if top > 0 and not fits:
            return False
    return True


@pytest.mark.parametrize("bits", BITS)
def test_rounded_kernels_are_on_the_grid_and_stay(bits: int) -> None:
    kernel = kernels()
    found = rounded(kernel, bits)
    assert found.shape == kernel.shape
    assert on_grid(found, bits)
    assert not on_grid(kernel, bits)
    torch.testing.assert_close(rounded(found, bits), found, rtol=1e-5, atol=0)
    assert rounded(kernel, 32) is kernel


@pytest.mark.parametrize("bits", BITS)
def test_the_step_is_the_best_of_a_fine_search(bits: int) -> None:
    """NumPy tries five hundred steps for every channel: none is better by more than the few tried here allow."""
    kernel, largest = kernels(), 2 ** (bits - 1) - 1
    found = (rounded(kernel, bits) - kernel).flatten(1).square().sum(1).numpy()
    for row, error in zip(kernel.flatten(1).numpy().astype(np.float64), found, strict=True):
        steps = np.abs(row).max() / largest * np.linspace(0.4, 1.1, 500)[:, None]
        tried = np.clip(np.round(row / steps), -largest, largest) * steps - row
        assert error <= 1.6 * (tried**2).sum(1).min()
    plain = scales(kernel, bits) <= kernel.flatten(1).abs().amax(1) / largest * (1 + 1e-6)
    assert bool(plain.all())


def moments(inputs: int) -> Tensor:
    mixed = torch.randn(500, inputs, generator=torch.Generator().manual_seed(1)).double()
    mixed = mixed @ torch.randn(inputs, inputs, generator=torch.Generator().manual_seed(2)).double()
    return mixed.T @ mixed / 500


def lost(apart: Tensor, known: Tensor) -> float:
    return float((apart.double() @ known * apart.double()).sum())


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("inputs", [9, 40])
def test_rounding_to_outputs_loses_less(inputs: int, bits: int) -> None:
    kernel, known = torch.randn(12, inputs, generator=torch.Generator().manual_seed(3)), moments(inputs)
    found = rounded_to_outputs(kernel, known, bits)
    assert on_grid(found, bits)
    assert lost(found - kernel, known) < 0.8 * lost(rounded(kernel, bits) - kernel, known)


def test_rounding_to_outputs_is_near_the_best_there_is() -> None:
    """Brute force over every whole multiple next to a few weights."""
    kernel, known = torch.randn(5, 6, generator=torch.Generator().manual_seed(3)), moments(6)
    found, step = rounded_to_outputs(kernel, known, 4), scales(kernel, 4)
    for row, ours, each in zip(kernel, found, step, strict=True):
        nearest = (row / each).round()
        tried = [
            ((nearest + torch.tensor(move)).clamp(-7, 7) * each - row)[None]
            for move in itertools.product((-1.0, 0.0, 1.0), repeat=6)
        ]
        best, plain = min(lost(one, known) for one in tried), lost((nearest.clamp(-7, 7) * each - row)[None], known)
        assert lost((ours - row)[None], known) <= best + 0.5 * (plain - best) + 1e-9


@pytest.mark.parametrize("bits", BITS)
def test_without_correlation_outputs_ask_for_the_nearest_multiples(bits: int) -> None:
    kernel = torch.randn(7, 9, generator=torch.Generator().manual_seed(3))
    known = torch.diag(torch.linspace(0.1, 3, 9).double())
    torch.testing.assert_close(rounded_to_outputs(kernel, known, bits), rounded(kernel, bits), rtol=1e-5, atol=1e-7)


def test_moments_that_cannot_be_factorised_leave_the_nearest() -> None:
    kernel = torch.randn(3, 4, generator=torch.Generator().manual_seed(3))
    assert torch.equal(rounded_to_outputs(kernel, torch.full((4, 4), torch.nan).double(), 4), rounded(kernel, 4))


@pytest.mark.parametrize("clip", ["mse", "percentile"])
@pytest.mark.parametrize(("signed", "symmetric"), [(False, False), (True, False), (True, True)])
def test_activations_take_256_values_and_zero(clip: Clip, signed: bool, symmetric: bool) -> None:
    x = torch.randn(20_000, generator=torch.Generator().manual_seed(0))
    x = x if signed else x.relu()
    each = range_of(x, clip, symmetric=symmetric)
    found = each(x)
    assert len(found.unique()) <= 256
    if symmetric:
        inside = x.abs() <= 127 * each.scale
        assert torch.equal(each(-x)[inside], -found[inside])
    assert bool((found[x == 0] == 0).all()), "zero, which padding brings, is exact"
    assert torch.equal(each(found), found)
    assert float((found - x).square().mean()) < 1e-4 * float(x.square().mean())


def test_outliers_are_clipped() -> None:
    x = torch.cat([torch.randn(100_000, generator=torch.Generator().manual_seed(0)), torch.tensor([50.0])])
    assert range_of(x, "percentile").scale * 255 < 0.3 * 50
    errors = [float((range_of(x, clip)(x) - x).square().sum()) for clip in ("mse", "percentile")]
    step = (50 - float(x.min())) / 255
    unclipped = float(((x / step).round() * step - x).square().sum())
    assert errors[0] <= 1.05 * min(errors[1], unclipped)
    assert range_of(torch.zeros(5), "mse")(torch.zeros(5)).tolist() == [0.0] * 5


def test_ranges_between_factors_are_symmetric() -> None:
    """As many multiples below zero as above it, and none lost: what comes from a ReLU begins at zero."""
    torch.manual_seed(0)
    chain = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 8, 1))
    relu = nn.ReLU()  # one for all places, as many networks have it
    net = nn.Sequential(chain, relu, nn.Conv2d(8, 5, 1), relu, nn.Conv2d(5, 4, 1), nn.Flatten(), nn.Linear(4 * 36, 3))
    nn.init.constant_(cast(Tensor, cast(nn.Conv2d, net[4]).bias), 3.0)
    known = ranges(net, widths_of(net, {}, 8), torch.randn(16, 3, 8, 8), "mse")
    zeros = {name: each.zero_point for name, each in known.items()}
    assert zeros["0.1"] == zeros["0.2"] == 128
    assert zeros["2"] == zeros["4"] == 0, "after a ReLU"
    assert zeros["6"] != 128, "what stands between is not looked at"


def test_activations_are_rounded_for_a_while() -> None:
    net, images = small_net(), small_images(16)
    names = widths_of(net, {}, 8)
    assert set(names) == {layer.name for layer in find_layers(net, SmallNet.shape)}
    known = ranges(net, names, images, "mse")
    seen: dict[str, Tensor] = {}

    def look(name: str) -> None:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            seen[name] = inputs[0]

        net.get_submodule(name).register_forward_pre_hook(hook)

    plain = net(images)
    with rounding_activations(net, known):
        for name in names:
            look(name)  # after the rounding's own
        coarse = net(images)
    assert set(seen) == set(known)
    assert all(len(x.unique()) <= 256 for x in seen.values())
    assert not torch.equal(coarse, plain)
    assert torch.equal(net(images), plain)


@pytest.mark.parametrize(
    "layer", [nn.Linear(5, 4), nn.Conv2d(4, 6, 3, groups=2), nn.ConvTranspose2d(4, 6, 3, groups=2)], ids=str
)
def test_training_moves_what_is_rounded(layer: nn.Module) -> None:
    """The gradient is that at the rounded weights, none where they are clipped; afterwards the layer is plain."""
    torch.manual_seed(0)
    model = nn.Sequential(copy.deepcopy(layer))
    x = torch.randn(8, 5) if isinstance(layer, nn.Linear) else torch.randn(8, 4, 6, 6)
    start, plain = copy.deepcopy(model), copy.deepcopy(model)
    round_weights(plain, {"0": 4})
    round_while_training(model, {"0": 4})
    outputs = model(x)
    torch.testing.assert_close(outputs, plain(x))
    for net in (model, plain):
        net(x).square().sum().backward()
    moved = model[0].parametrizations.weight.original
    kernel, _ = kernel_of(start[0])
    clipped = kernel.abs() >= 7.5 * scales(kernel, 4).reshape(-1, *[1] * (kernel.ndim - 1))
    set_kernel(start[0], clipped.float())
    assert int(clipped.sum()) < 0.1 * kernel.numel()
    expected = torch.where(start[0].weight.bool(), 0, plain[0].weight.grad)
    torch.testing.assert_close(moved.grad, expected)
    torch.optim.SGD([moved], lr=0.01).step()
    coarse = model(x)
    assert not torch.equal(coarse, outputs)
    round_for_good(model)
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert on_grid(kernel_of(model[0])[0], 4)
    assert torch.equal(model(x), coarse)


def test_bytes_are_counted() -> None:
    """Nine weights of 4 bits are five bytes; every output channel has a scale; the rest is float32."""
    model = nn.Sequential(nn.Conv2d(1, 1, 3, bias=False), nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(4, 2))
    assert weight_bytes(model, {"0": 4, "3": 8}) == (5 + 4) + 2 * 4 + (8 + 2 * 4 + 2 * 4)
    assert weight_bytes(model, {}) == 4 * (9 + 2 + 8 + 2)


@pytest.mark.parametrize(("name", "case"), [pytest.param(n, c, id=f"{n}, {c.name}") for n, c in PAIRS[::3]])
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
def test_layers_of_any_format_and_geometry_are_rounded(name: str, case: LayerCase) -> None:
    torch.manual_seed(2)
    dense = nn.Sequential(case.build()).requires_grad_(False)
    x = torch.randn(40, *case.shape)
    conv = find_layers(dense, case.shape)[0].conv
    weight, bias = kernel_of(dense[0])
    ranks = tuple((bound + 1) // 2 for bound in max_rank(FORMATS[name], conv))
    chain = build_layer(FORMATS[name], conv, prepare(FORMATS[name], conv, weight), ranks, bias, weight.dtype)
    net = nn.Sequential(chain).requires_grad_(False)
    samples = sample_outputs(dense, {"0": conv}, [x], pixels=10_000, seed=0)
    sequential_regression(net, ["0"], samples, x, bits={"0": 8})
    assert all(on_grid(kernel_of(stage)[0], 8) for stage in net[0])
    assert bool(torch.isfinite(net(x)).all())


def test_the_regression_makes_up_for_rounding() -> None:
    """Of four bits: rounding as the regression goes is nearer to the dense network than rounding in the end."""
    net, images = small_net().requires_grad_(False), small_images(256)
    convs = {layer.name: layer.conv for layer in find_layers(net, SmallNet.shape) if layer.name in RANKS}
    samples = sample_outputs(net, convs, images.split(64), pixels=10_000, seed=0)
    made = rank_map(net, RANKS, SmallNet.shape)
    late, early = (made.apply(net).requires_grad_(False) for _ in range(2))
    bits = dict.fromkeys(RANKS, 4)
    sequential_regression(late, RANKS, samples, images)
    round_weights(late, {n: b for n, b in widths_of(late, bits, 32).items() if b < 32})
    sequential_regression(early, RANKS, samples, images, bits=bits)
    errors = [float(F.mse_loss(one(images), net(images))) for one in (late, early)]
    assert errors[1] < 0.8 * errors[0]
