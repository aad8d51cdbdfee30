"""Modules of stages against torch's own layers, and geometry against what torch computes and counts."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor, fx, nn

from ranksearch.conv import Conv
from ranksearch.decompositions.format import response
from ranksearch.stages import TiedConv, build_chain, build_stage, geometry, kernel_of
from tests import oracles
from tests.cases import LAYERS, LayerCase

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")


def tied_conv(ndim: int, groups: int, tied: int, **fields: object) -> Conv:
    """Two inputs and three outputs a group, every axis unlike the others."""
    axes = {"kernel": (3, 2, 4), "stride": (2, 1, 2), "padding": (1, 1, 0), "dilation": (1, 2, 1), "size": (7, 8, 6)}
    none = {"output_padding": (0,) * ndim}
    sizes = none | {name: size[:ndim] for name, size in axes.items()}
    return Conv(in_channels=2 * groups, out_channels=3 * groups, groups=groups, tied=tied, **sizes | fields)  # type: ignore[arg-type]


TIED = [tied_conv(n, *groups) for n in (1, 2, 3) for groups in ((3, 3), (4, 2), (6, 3))]
TIED += [tied_conv(n, 4, 2, transposed=True, output_padding=(1, 0, 1)[:n]) for n in (1, 2, 3)]
TIED += [tied_conv(n, 4, 2, padding_mode=mode, bias=False) for n in (1, 2, 3) for mode in ("reflect", "circular")]
TIED += [tied_conv(2, 3, 3, padding_same=True, stride=(1, 1)), tied_conv(1, 3, 3, padding_mode="replicate")]
every_tied = pytest.mark.parametrize("conv", TIED, ids=[f"{i}, {len(c.kernel)}-d" for i, c in enumerate(TIED)])


def with_repeated_kernel(conv: Conv, weight: Tensor, bias: Tensor | None) -> nn.Module:
    """torch's own grouped layer, every kernel written out as often as it is used."""
    blocks = weight.chunk(conv.groups // conv.tied)
    return build_stage(replace(conv, tied=1), torch.cat([b for b in blocks for _ in range(conv.tied)]), bias)


@every_tied
def test_a_tied_convolution_is_the_grouped_one_with_the_kernel_repeated(conv: Conv) -> None:
    torch.manual_seed(0)
    weight, bias = torch.randn(conv.weight_shape), torch.randn(conv.out_channels) if conv.bias else None
    ours, theirs = build_stage(conv, weight, bias), with_repeated_kernel(conv, weight, bias)
    assert isinstance(ours, TiedConv)
    assert not isinstance(theirs, TiedConv)
    x = torch.randn(3, conv.in_channels, *conv.size)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)
    assert tuple(ours(x).shape[2:]) == conv.output_size
    assert conv.macs == oracles.macs(ours, x) == oracles.macs(theirs, x)
    assert conv.params == oracles.params(ours)
    assert list(ours.state_dict()) == (["weight", "bias"] if conv.bias else ["weight"])


@pytest.mark.parametrize("conv", [TIED[4], TIED[11], TIED[-1]], ids=["plain", "transposed", "padded"])
def test_a_tied_convolution_can_be_traced_exported_and_trained(conv: Conv) -> None:
    module = build_stage(conv, torch.randn(conv.weight_shape), None)
    x, more = torch.randn(2, conv.in_channels, *conv.size), torch.randn(5, conv.in_channels, *conv.size)
    torch.testing.assert_close(fx.symbolic_trace(module)(more), module(more))
    exported = torch.export.export(module, (x,), dynamic_shapes=({0: torch.export.Dim.AUTO},)).module()
    torch.testing.assert_close(exported(more), module(more))
    module(x).square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in module.parameters())


def test_a_tied_convolution_keeps_channels_last() -> None:
    conv = tied_conv(2, 3, 3, padding_mode="reflect")
    module = build_stage(conv, torch.randn(conv.weight_shape), None)
    x = torch.randn(2, conv.in_channels, *conv.size)
    expected, format = module(x), torch.channels_last
    found = copy.deepcopy(module).to(memory_format=format)(x.contiguous(memory_format=format))
    assert found.is_contiguous(memory_format=format)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    built = build_chain([conv.pointwise_to(6), conv, conv.after(4, bias=True)])
    assert built(x).shape == (2, 4, *conv.output_size)


@pytest.mark.parametrize("case", LAYERS, ids=lambda case: case.name)
def test_a_layer_is_rebuilt_from_its_geometry_and_kernel(case: LayerCase) -> None:
    layer = case.build()
    conv, (weight, bias) = geometry(layer, (1, *case.shape)), kernel_of(layer)
    assert tuple(weight.shape) == conv.weight_shape
    assert Conv.from_json(conv.to_json()) == conv
    rebuilt, x = build_stage(conv, weight, bias), torch.randn(2, *case.shape)
    assert type(rebuilt) is type(layer)
    assert torch.equal(rebuilt(x), layer(x))
    assert rebuilt.weight.data_ptr() != layer.weight.data_ptr()
    size = (layer(x).shape[1:-1].numel(), 1) if conv.linear else tuple(layer(x).shape[2:])
    assert size == conv.output_size
    assert conv.macs == oracles.macs(layer, x)
    assert conv.params == oracles.params(layer)


def test_geometry_written_before_there_were_other_dimensions_is_read() -> None:
    old = {
        "in_channels": 4,
        "out_channels": 6,
        "kernel": [3, 5],
        "stride": [2, 1],
        "padding": [1, 2],
        "dilation": [1, 1],
        "groups": 1,
        "bias": False,
        "padding_mode": "zeros",
        "padding_same": False,
        "size": [9, 8],
        "linear": False,
    }
    layer = nn.Conv2d(4, 6, (3, 5), stride=(2, 1), padding=(1, 2), bias=False)
    assert Conv.from_json(old) == geometry(layer, (1, 4, 9, 8))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kernel": (3,)}, "of all alike"),
        ({"kernel": (3, 3, 3)}, "of all alike"),
        (dict.fromkeys(("kernel", "stride", "padding", "dilation", "size", "output_padding"), ()), "one to three"),
        ({"output_padding": (1, 0)}, "for transposed convolutions"),
        ({"transposed": True, "padding_mode": "reflect"}, "padded by a number of zeros"),
        ({"transposed": True, "padding_same": True}, "padded by a number of zeros"),
        ({"groups": 4, "tied": 3}, "tied must divide groups"),
        ({"tied": 0}, "positive"),
        ({"padding": (-1, 0)}, "positive"),
        ({"stride": (1.5, 1)}, "integers"),
    ],
)
def test_impossible_geometry_is_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Conv(in_channels=8, out_channels=8, **fields)  # type: ignore[arg-type]


@pytest.mark.parametrize("ndim", [1, 2, 3])
@pytest.mark.parametrize("outer", [1, 2])
def test_the_response_to_a_patch_is_the_output_of_the_chain_on_it(ndim: int, outer: int) -> None:
    """Grouped, depthwise and tied stages; on an image of the kernel's size a chain has one output pixel."""
    torch.manual_seed(0)
    axes, one, none = (3, 2, 4)[:ndim], (1,) * ndim, (0,) * ndim
    plain = Conv(
        in_channels=4,
        out_channels=6,
        kernel=axes,
        stride=one,
        padding=none,
        dilation=one,
        output_padding=none,
        size=axes,
    )
    wide = plain.pointwise_to(12).resized(groups=outer)
    shared = plain.resized(in_channels=12, out_channels=6, groups=3 * outer, tied=3)
    filters = shared.after(6, bias=False).resized(groups=6)
    chain = [wide, shared, filters, filters.after(5, bias=False)]
    weights = [torch.randn(conv.weight_shape) for conv in chain]
    patch = torch.randn(4, *axes)
    expected = build_chain([c.resized(bias=False) for c in chain], weights)(patch[None]).flatten()
    torch.testing.assert_close(response(chain, weights, patch), expected, rtol=1e-4, atol=1e-4)
