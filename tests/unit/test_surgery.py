"""Finding and exchanging layers, and rank maps on networks."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from ranksearch.conv import Conv
from ranksearch.decompositions import FORMATS, max_rank, prepare
from ranksearch.errors import ModelError, RankMapError
from ranksearch.models.cifar_resnet import resnet20
from ranksearch.rankmap import LayerRanks, ModelRecord, RankMap
from ranksearch.surgery import (
    apply_rank_map,
    build_layer,
    channels_last,
    count_macs,
    count_params,
    evaluating,
    find_layers,
    kernel_of,
    replaced,
    skeleton,
)
from tests import oracles
from tests.networks import SharedNet, SmallNet, small_images, small_net

RANKS = {"body.plain": ("tucker2", (5, 6)), "body.strided": ("spatial-svd", (9,)), "body.point": ("svd", (4,))}
FULL = {
    "stem": ("channel-svd", (8,)),
    "body.plain": ("tucker2", (8, 8)),
    "body.strided": ("spatial-svd", (24,)),
    "body.point": ("svd", (10,)),
    "tokens": ("svd", (10,)),
    "head": ("svd", (4,)),
}


def rank_map(model: nn.Module, choices: dict[str, tuple[str, tuple[int, ...]]], shape: tuple[int, int, int]) -> RankMap:
    convs = {layer.name: layer.conv for layer in find_layers(model, shape)}
    layers = {
        name: LayerRanks(format=form, ranks=ranks, conv=convs[name].to_json(), macs=1, params=1)
        for name, (form, ranks) in choices.items()
    }
    record = ModelRecord(name="net", input_shape=shape)
    return RankMap(model=record, layers=layers, macs=1, params=1, dense_macs=1, dense_params=1)


def test_layers_are_found_in_the_order_of_execution_with_their_geometry() -> None:
    net = small_net()
    layers = {layer.name: layer.conv for layer in find_layers(net, SmallNet.shape)}
    assert list(layers) == [
        "stem",
        *(f"body.{name}" for name in ("plain", "strided", "point", "grouped", "depthwise")),
        "tokens",
        "head",
    ]
    assert layers["body.strided"] == Conv(
        in_channels=8, out_channels=12, kernel=(3, 3), stride=(2, 2), padding=(2, 2), dilation=(2, 2), size=(9, 9)
    )
    assert (layers["tokens"].size, layers["tokens"].linear, layers["head"].size) == ((25, 1), True, (1, 1))
    assert sum(conv.macs for conv in layers.values()) == oracles.macs(net, small_images(1))
    assert count_macs(net, SmallNet.shape) == oracles.macs(net, small_images(1))
    norm = sum(p.numel() for p in net.norm.parameters())
    assert sum(conv.params for conv in layers.values()) + norm == count_params(net)


def test_a_layer_that_runs_several_times_says_so() -> None:
    assert {layer.name: layer.calls for layer in find_layers(SharedNet(), SharedNet.shape)} == {
        "first": 1,
        "shared": 3,
        "last": 1,
    }


def test_layers_that_compute_something_else_are_not_found() -> None:
    class Standardised(nn.Conv2d):
        def forward(self, input: Tensor) -> Tensor:
            return self._conv_forward(input, self.weight - self.weight.mean(), self.bias)

    net = nn.Sequential(nn.Conv2d(3, 4, 3), Standardised(4, 4, 3), parametrizations.weight_norm(nn.Conv2d(4, 4, 1)))
    assert [layer.name for layer in find_layers(net, (3, 8, 8))] == ["0", "2"]


class Volumes(nn.Module):
    """A network on volumes that goes down, through a sequence, and up again; the last step is told its size."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv3d(2, 4, 3, stride=2, padding=1)
        self.along = nn.Conv1d(4, 6, 3, padding="same")
        self.up = nn.ConvTranspose3d(6, 4, 2, stride=2, groups=2)
        self.last = nn.ConvTranspose3d(4, 2, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        small = self.down(input=x)
        along = self.along(small.flatten(2)).unflatten(2, small.shape[2:])
        found: Tensor = self.last(self.up(along), output_size=[2 * n for n in x.shape[2:]])
        return found


def test_layers_of_one_and_three_dimensions_are_found_and_replaced() -> None:
    torch.manual_seed(0)
    net, x = Volumes().requires_grad_(False), torch.randn(2, 2, 4, 6, 8)
    layers = {layer.name: layer.conv for layer in find_layers(net, (2, 4, 6, 8))}
    assert {name: conv.size for name, conv in layers.items()} == {
        "down": (4, 6, 8),
        "along": (24,),
        "up": (2, 3, 4),
    }
    assert sum(conv.macs for conv in layers.values()) == oracles.macs(nn.Sequential(net.down), x) + oracles.macs(
        nn.Sequential(net.along), torch.zeros(1, 4, 24)
    ) + oracles.macs(nn.Sequential(net.up), torch.zeros(1, 6, 2, 3, 4))
    modules = {}
    for name, conv in layers.items():
        form = FORMATS["tucker2"]
        weight, bias = kernel_of(net.get_submodule(name))
        modules[name] = build_layer(form, conv, prepare(form, conv, weight), max_rank(form, conv), bias, weight.dtype)
    torch.testing.assert_close(replaced(net, modules)(x), net(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(4, 9, 9), (3, 1, 1), (3, -1, 9)])
def test_images_that_a_network_cannot_take_are_refused(shape: tuple[int, int, int]) -> None:
    with pytest.raises(ModelError, match="must run on one image of shape"):
        find_layers(nn.Sequential(nn.Conv2d(3, 4, 3)), shape)


def test_whatever_a_users_forward_raises_is_told() -> None:
    class Picky(nn.Conv2d):
        def forward(self, input: Tensor) -> Tensor:
            assert input.shape[-1] == 224, "images of 224 pixels only"
            return super().forward(input)

    for count in (find_layers, count_macs):
        with pytest.raises(ModelError, match="AssertionError: images of 224 pixels only"):
            count(Picky(3, 4, 3), (3, 8, 8))


def test_modes_and_hooks_are_restored() -> None:
    net = small_net().train()
    net.norm.eval()
    before, modes = copy.deepcopy(net.state_dict()), [module.training for module in net.modules()]
    find_layers(net, SmallNet.shape)
    count_macs(net, SmallNet.shape)
    with evaluating(net):
        assert not any(module.training for module in net.modules())
    with pytest.raises(ModelError), evaluating(net):
        find_layers(net, (1, 1, 1))
    assert [module.training for module in net.modules()] == modes
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in net.modules())
    torch.testing.assert_close(net.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float64, 1e-5)])
def test_at_full_rank_a_network_computes_the_same(dtype: torch.dtype, tolerance: float) -> None:
    net, images = small_net(dtype), small_images(dtype=dtype)
    built = rank_map(net, FULL, SmallNet.shape).apply(net)
    assert {p.dtype for p in built.parameters()} == {dtype}
    torch.testing.assert_close(built(images), net(images), rtol=tolerance, atol=tolerance)


def test_the_dense_network_is_untouched_and_shares_no_tensor() -> None:
    net = small_net()
    before = copy.deepcopy(net.state_dict())
    built = apply_rank_map(rank_map(net, RANKS, SmallNet.shape), net)
    kept = {p.data_ptr() for p in net.state_dict().values()}
    assert not any(p.data_ptr() in kept for p in built.state_dict().values())
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.add_(1)
    torch.testing.assert_close(net.state_dict(), before, rtol=0, atol=0)
    assert isinstance(net.body["plain"], nn.Conv2d)
    assert isinstance(built.get_submodule("body.plain"), nn.Sequential)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_skeleton_takes_the_compressed_weights(dtype: torch.dtype) -> None:
    net, images = small_net(dtype), small_images(dtype=dtype)
    chosen = rank_map(net, RANKS, SmallNet.shape)
    built, empty = chosen.apply(net), skeleton(chosen, net)
    assert not any(bool(value.any()) for name, value in empty.state_dict().items() if name.startswith("body.plain"))
    empty.load_state_dict(built.state_dict())
    assert torch.equal(empty(images), built(images))
    assert count_macs(empty, SmallNet.shape) == count_macs(built, SmallNet.shape)


def test_a_skeleton_draws_no_random_numbers() -> None:
    net = small_net()
    chosen = rank_map(net, RANKS, SmallNet.shape)
    state = torch.get_rng_state()
    skeleton(chosen, net)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_module_reached_by_two_names_is_exchanged_in_both_places() -> None:
    net = nn.Sequential(nn.Conv2d(2, 2, 1), nn.ReLU())
    net.append(net[0])
    other = nn.Conv2d(2, 2, 1)
    copied = replaced(net, {"0": other})
    assert copied.get_submodule("0") is copied.get_submodule("2") is other


def test_channels_last_changes_no_value() -> None:
    net = resnet20().eval()
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(channels_last(copy.deepcopy(net))(images), net(images), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "tucker9"}, "unknown format 'tucker9'"),
        ({"ranks": (5, 9)}, r"from 1 to \(8, 8\)"),
        ({"ranks": (5,)}, "2 integers"),
        ({"ranks": (0, 5)}, "from 1"),
        ({"format": "svd", "ranks": (3,)}, "1x1"),
        ({"conv": Conv(in_channels=8, out_channels=8, kernel=(3, 3), size=(9, 9)).to_json()}, "in the map and"),
    ],
)
@pytest.mark.parametrize("use", [apply_rank_map, skeleton])
def test_a_map_for_another_model_is_refused(use: object, change: dict[str, object], message: str) -> None:
    net = small_net()
    good = rank_map(net, RANKS, SmallNet.shape)
    layer = good.layers["body.plain"].model_copy(update=change)
    bad = good.model_copy(update={"layers": {**good.layers, "body.plain": layer}})
    with pytest.raises(RankMapError, match=message):
        use(bad, net)  # type: ignore[operator]


def test_all_layers_that_a_model_lacks_are_counted() -> None:
    chosen = rank_map(small_net(), RANKS, SmallNet.shape)
    with pytest.raises(RankMapError, match=r"no layer body\.plain.*no layer body\.strided"):
        chosen.apply(nn.Sequential(nn.Conv2d(3, 3, 3)))
