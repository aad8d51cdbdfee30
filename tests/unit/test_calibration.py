"""Statistics of the dense network against NumPy on all images at once."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from ranksearch.calibration import collect, sample_outputs
from ranksearch.errors import DataError
from ranksearch.surgery import find_layers, geometry
from tests import oracles
from tests.cases import LAYERS, LayerCase
from tests.networks import SmallNet, small_images, small_net

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")


@pytest.mark.parametrize("case", LAYERS, ids=lambda case: case.name)
def test_statistics_are_those_of_all_images_at_once(case: LayerCase) -> None:
    torch.manual_seed(3)
    layer = case.build().double().requires_grad_(False)
    x = torch.randn(17, *case.shape, dtype=torch.float64) + 0.5
    conv = geometry(layer, (1, *case.shape))
    found = collect(nn.Sequential(layer), {"0": conv}, x.split(5))["0"]
    linear = isinstance(layer, nn.Linear)
    rows = (x.flatten(0, -2) if linear else x.movedim(1, -1).flatten(0, -2)).numpy()
    y = layer(x)
    outputs = (y.flatten(0, -2) if linear else y.movedim(1, -1).flatten(0, -2)).numpy()
    if conv.pointwise:
        assert found.input_moment.shape == (0, 0)
    else:
        np.testing.assert_allclose(found.input_moment, rows.T @ rows / len(rows), atol=1e-12)
    np.testing.assert_allclose(found.output_mean, outputs.mean(0), atol=1e-12)
    covariance = np.cov(outputs.T, bias=True).reshape(conv.out_channels, -1)
    np.testing.assert_allclose(found.output_covariance, covariance, atol=1e-12)
    mean = rows.mean(0)[:, None, None] if linear else oracles.patches(layer, x).mean(0).numpy()
    np.testing.assert_allclose(found.patch_mean, mean, atol=1e-12)


def test_a_large_mean_leaves_the_covariance_its_digits() -> None:
    layer = nn.Conv2d(4, 5, 1).requires_grad_(False)
    layer.bias += 3000.0
    x = torch.randn(64, 4, 6, 6)
    found = collect(nn.Sequential(layer), {"0": geometry(layer, (1, 4, 6, 6))}, x.split(16))["0"]
    layer.bias -= 3000.0
    outputs = layer.double()(x.double()).movedim(1, -1).flatten(0, -2).numpy()
    np.testing.assert_allclose(found.output_covariance, np.cov(outputs.T, bias=True), rtol=1e-2, atol=2e-3)


def test_collecting_leaves_the_network_as_it_was() -> None:
    net = small_net().train()
    convs = {layer.name: layer.conv for layer in find_layers(net, SmallNet.shape)}
    mean = net.norm.running_mean.clone()
    collect(net, convs, [small_images()])
    sample_outputs(net, convs, [small_images()], pixels=3, seed=0)
    assert all(module.training for module in net.modules())
    assert not any(module._forward_hooks for module in net.modules())
    assert torch.equal(net.norm.running_mean, mean)


def test_no_images_and_infinite_activations_are_errors() -> None:
    layer = nn.Conv2d(3, 4, 3)
    convs = {"0": geometry(layer, (1, 3, 6, 6))}
    with pytest.raises(DataError, match="at least one image"):
        collect(nn.Sequential(layer), convs, [])
    with pytest.raises(DataError, match="those of 0 are not"):
        collect(nn.Sequential(layer), convs, [torch.full((2, 3, 6, 6), float("nan"))])


@pytest.mark.parametrize("pixels", [1, 7, 1000])
def test_samples_are_the_outputs_at_the_pixels_they_name(pixels: int) -> None:
    net, images = small_net(), small_images(20)
    convs = {layer.name: layer.conv for layer in find_layers(net, SmallNet.shape)}
    found = sample_outputs(net, convs, images.split(8), pixels=pixels, seed=5)
    assert {name: len(sample.pixels) for name, sample in found.items()} == {
        name: min(pixels, conv.output_size[0] * conv.output_size[1]) for name, conv in convs.items()
    }
    with torch.no_grad():
        stem = net.stem(images).flatten(2)
        head = net(images)
    expected = stem[:, :, found["stem"].pixels].transpose(1, 2)
    torch.testing.assert_close(found["stem"].outputs, expected)
    torch.testing.assert_close(found["head"].outputs, head[:, None])
    again = sample_outputs(net, convs, images.split(20), pixels=pixels, seed=5)
    assert all(torch.equal(again[name].pixels, sample.pixels) for name, sample in found.items())
