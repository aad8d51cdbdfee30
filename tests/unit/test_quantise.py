"""Equalisation leaves the network as it is, and makes its factors fit for one scale a tensor."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ranksearch.quantise import equalised


class Factors(nn.Module):
    """Factors in a row with channels of very different ranges: plain, grouped, transposed, linear."""

    shape = (4, 6, 6)

    def __init__(self) -> None:
        super().__init__()
        self.chain = nn.Sequential(
            nn.Conv2d(4, 6, 1), nn.Conv2d(6, 6, 3, padding=1, groups=3, bias=False), nn.Conv2d(6, 8, 1)
        )
        self.up = nn.Sequential(nn.Conv2d(8, 4, 1), nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2))
        self.head = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3))
        with torch.no_grad():
            for first in (self.chain[0], self.head[0]):
                spread = 10.0 ** torch.linspace(-2, 2, len(first.weight))  # type: ignore[arg-type]
                first.weight.mul_(spread.reshape(-1, *[1] * (first.weight.ndim - 1)))
                first.bias.mul_(spread)
            self.head[1].weight.div_(spread)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.up(F.relu(self.chain(x))))
        out: Tensor = self.head(x.mean((2, 3)))
        return out


def _factors() -> Factors:
    torch.manual_seed(0)
    return Factors().double().eval()


def _images(count: int = 16) -> Tensor:
    return torch.randn(count, *Factors.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def test_the_network_computes_the_same() -> None:
    model, images = _factors(), _images()
    before = model(images)
    found, pairs = equalised(model, Factors.shape, images.split(8))
    assert pairs == 4  # two in the chain, one before the transposed layer, one in the head; none across a ReLU
    torch.testing.assert_close(found(images), before, rtol=1e-9, atol=1e-9)
    assert torch.equal(model(images), before), "the model was changed"
    assert not torch.equal(found.get_parameter("head.0.weight"), model.get_parameter("head.0.weight"))


def _in_int8(head: nn.Sequential, x: Tensor) -> Tensor:
    """The two linear layers as int8 has them, by torch's own fake quantisation."""
    x = x.float()
    for layer in head:
        weight = layer.weight.detach().float()
        scale = weight.abs().amax(1) / 127
        weight = torch.fake_quantize_per_channel_affine(
            weight, scale, torch.zeros_like(scale, dtype=torch.int32), 0, -127, 127
        )
        x = F.linear(x, weight, layer.bias.detach().float())
        x = torch.fake_quantize_per_tensor_affine(x, float(x.detach().abs().max()) / 127, 0, -127, 127)
    return x


def test_equalised_factors_lose_less_in_int8() -> None:
    model = _factors()
    found, _ = equalised(model, Factors.shape, [_images()])
    x = torch.randn(200, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64).abs()
    with torch.no_grad():
        exact = model.head(x).float()
        before, after = (
            float((_in_int8(network.get_submodule("head"), x) - exact).norm() / exact.norm())  # type: ignore[arg-type]
            for network in (model, found)
        )
    assert after < 0.02
    assert after < before / 5


def test_dead_channels_stay_finite() -> None:
    model = _factors()
    with torch.no_grad():
        model.head[0].weight[1] = 0
        model.head[0].bias[1] = 0
        model.head[1].weight[:, 2] = 0
    found, _ = equalised(model, Factors.shape, [_images()])
    assert all(bool(torch.isfinite(p).all()) for p in found.parameters())
    torch.testing.assert_close(found(_images()), model(_images()), rtol=1e-9, atol=1e-9)
