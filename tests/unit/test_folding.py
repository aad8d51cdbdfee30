"""Folding and merging leave what a network computes as it is, and are not done where they would not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ranksearch.folding import folded, neighbours
from ranksearch.models import build_model
from ranksearch.space import ModelSpec
from ranksearch.surgery import count_macs
from tests.networks import SmallNet, small_images, small_net


def _lively(model: nn.Module, seed: int = 0) -> nn.Module:
    """The model in float64 with batch norms that do something."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for tensor, low, high in (
                (module.running_mean, -0.5, 0.5),
                (module.running_var, 0.5, 2.0),
                (module.weight, 0.5, 1.5),
                (module.bias, -0.5, 0.5),
            ):
                if tensor is not None:
                    tensor.data.uniform_(low, high, generator=generator)
    return model.double().eval()


def _images(shape: tuple[int, ...], count: int = 4) -> Tensor:
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def _norms(model: nn.Module) -> int:
    return sum(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())


class Every(nn.Module):
    """Batch norm after a grouped, a transposed grouped, a padded and a linear layer."""

    shape = (4, 6, 6)

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(4, 8, 3, groups=2, padding=1, padding_mode="reflect"),
            nn.BatchNorm2d(8),
            nn.ReLU(inplace=True),
            nn.ConvTranspose2d(8, 6, 3, stride=2, groups=2, bias=False),
            nn.BatchNorm2d(6, affine=False),
            nn.ReLU(),
        )
        self.linear = nn.Linear(6, 5)
        self.norm = nn.BatchNorm1d(5)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(self.linear(self.body(x).mean((2, 3))))
        return out


class Kept(nn.Module):
    """Batch norms that must stay: the layer's output is used twice, given out, run twice, or changed in between."""

    shape = (3, 5, 5)

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList([nn.Conv2d(3, 3, 3, padding=1) for _ in range(4)])
        self.norms = nn.ModuleList([nn.BatchNorm2d(3) for _ in range(4)])
        self.tokens = nn.Linear(3, 3)
        self.positions = nn.BatchNorm1d(25)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        first = self.convs[0](x)
        x = self.norms[0](first) + first
        given = self.convs[1](x)
        x = self.norms[1](given)
        for _ in range(2):
            x = self.norms[2](self.convs[2](x))
        x = self.norms[3](F.relu_(self.convs[3](x)))
        return self.positions(self.tokens(x.flatten(2).transpose(1, 2))), given


class Pointwise(nn.Module):
    """1x1 layers in a row: narrow enough in the middle to be worth having, or not."""

    shape = (8, 7, 7)

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Conv2d(8, 20, 1, stride=2)
        self.norm = nn.BatchNorm2d(20)
        self.back = nn.Conv2d(20, 8, 1, bias=False)
        self.narrow = nn.Conv2d(8, 2, 1)
        self.out = nn.Conv2d(2, 8, 1)
        self.one, self.two = nn.Linear(8, 16, bias=False), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.back(self.norm(self.wide(x))))
        x = F.relu(self.out(self.narrow(x)))
        out: Tensor = self.two(self.one(x.mean((2, 3))))
        return out


@pytest.mark.parametrize("name", ["resnet20", "resnet18", "digits-cnn", "densenet121"])
def test_built_in_networks_compute_the_same(name: str) -> None:
    options = {"shortcut": "B"} if name == "resnet20" else {}
    model = _lively(build_model(ModelSpec(name=name, options=options), weights=None))
    shape = {"resnet20": (3, 32, 32), "digits-cnn": (1, 8, 8)}.get(name, (3, 64, 64))
    images = _images(shape, 2)
    before = model(images)
    found = folded(model, shape)
    torch.testing.assert_close(found.model(images), before, rtol=1e-9, atol=1e-9)
    if name == "densenet121":  # most of its batch norms come before a convolution
        assert 0 < _norms(found.model) < _norms(model)
    else:
        assert (_norms(found.model), found.norms) == (0, _norms(model))
    assert count_macs(found.model.float(), shape) == count_macs(model.float(), shape)


@pytest.mark.parametrize("network", [Every, Kept, Pointwise])
def test_any_network_computes_the_same(network: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model = _lively(network())
    images = _images(network.shape)
    before, state = model(images), {key: value.clone() for key, value in model.state_dict().items()}
    found = folded(model, network.shape)
    for one, other in zip(found.model(images), before, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items()), "the model was changed"
    assert found.norms == {Every: 3, Kept: 0, Pointwise: 1}[network]


def test_only_what_is_cheaper_together_is_merged() -> None:
    torch.manual_seed(0)
    model = _lively(Pointwise())
    found = folded(model, Pointwise.shape)
    # wide and back become 8 to 8 channels at 4x4 pixels, one and two 8 to 3; narrow and out stay apart.
    assert found.merged == 2
    assert count_macs(found.model.float(), Pointwise.shape) == 16 * (8 * 8 + 8 * 2 + 2 * 8) + 8 * 3


def test_neighbours_are_those_that_nobody_comes_between() -> None:
    pairs = neighbours(small_net(), SmallNet.shape)
    assert ("stem", "norm") in pairs
    assert ("tokens", "head") not in pairs, "they have functions between them"
    assert neighbours(nn.Sequential(nn.Identity(), nn.Linear(3, 2), nn.Dropout(), nn.Linear(2, 2)), (3,)) == [
        ("1", "2"),
        ("1", "3"),
    ], "what hands its input through stands between none"


def test_folding_is_deterministic_and_channels_last() -> None:
    one, two = (folded(small_net(), SmallNet.shape).model for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert one.get_parameter("body.plain.weight").is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(one(small_images()), small_net()(small_images()), rtol=1e-5, atol=1e-5)
