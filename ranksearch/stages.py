"""The modules of single layers and stages: their geometry, their kernels, and how they are made from both.

Kernels are ``(T, S / groups, *kernel)`` here and everywhere; only this file knows how PyTorch stores them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import prod
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ranksearch.conv import Conv


@contextmanager
def evaluating(model: nn.Module) -> Iterator[nn.Module]:
    """``model`` in evaluation mode, every module's mode restored afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield model
    finally:
        for module, mode in modes:
            module.training = mode


PLAIN: dict[int, type[nn.modules.conv._ConvNd]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED: dict[int, type[nn.modules.conv._ConvNd]] = {
    1: nn.ConvTranspose1d,
    2: nn.ConvTranspose2d,
    3: nn.ConvTranspose3d,
}
_CONVOLVE = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_CONVOLVE_TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


class TiedConv(nn.Module):
    """A convolution whose groups share kernels: each ``tied`` consecutive groups one, which is stored once.

    They are folded into the batch, where the shared kernel meets each of them. State: ``weight`` as torch's own layer
    of ``groups / tied`` groups has it, and ``bias`` of all T outputs.
    """

    def __init__(self, conv: Conv, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.conv = conv
        self.weight = nn.Parameter(weight)
        self.bias = None if bias is None else nn.Parameter(bias)

    def forward(self, x: Tensor) -> Tensor:
        """Outputs ``(N, T, *out)`` of inputs ``(N, S, *in)``, whose groups are ordered as torch orders them."""
        conv = self.conv
        y = convolve(_folded(x, conv), one_of_tied(conv), self.weight)
        y = _unfolded(y, conv)
        return y if self.bias is None else y + self.bias.reshape(-1, *[1] * conv.ndim)

    def extra_repr(self) -> str:
        """What is shown of it in a network."""
        conv = self.conv
        return f"{conv.in_channels}, {conv.out_channels}, kernel={conv.kernel}, groups={conv.groups}, tied={conv.tied}"


def _folded(x: Tensor, conv: Conv) -> Tensor:
    """``(N, outer tied s, *in)`` to ``(tied N, outer s, *in)``; joining pieces keeps channels-last what is so."""
    apart = torch.unflatten(x, 1, (conv.groups // conv.tied, conv.tied, -1))
    return torch.cat([apart.select(2, i).flatten(1, 2) for i in range(conv.tied)])


def _unfolded(y: Tensor, conv: Conv) -> Tensor:
    """``(tied N, outer t, *out)`` to ``(N, outer tied t, *out)``."""
    outer = conv.groups // conv.tied
    apart = torch.unflatten(y, 0, (conv.tied, -1))
    pieces = [apart.select(0, i).chunk(outer, 1) for i in range(conv.tied)]
    return torch.cat([piece[group] for group in range(outer) for piece in pieces], 1)


def one_of_tied(conv: Conv) -> Conv:
    """The convolution that a tied one runs on the folded batch."""
    return conv.resized(
        in_channels=conv.in_channels // conv.tied,
        out_channels=conv.out_channels // conv.tied,
        groups=conv.groups // conv.tied,
        tied=1,
    )


def convolve(x: Tensor, conv: Conv, weight: Tensor) -> Tensor:
    """``x`` convolved with ``weight``, stored as torch stores it, by torch's functions; ``conv`` is not tied."""
    if conv.transposed:
        return _CONVOLVE_TRANSPOSED[conv.ndim](
            x, weight, None, conv.stride, conv.padding, conv.output_padding, conv.groups, conv.dilation
        )
    padding = conv.padding
    if conv.padding_same or conv.padding_mode != "zeros":
        x, padding = padded(x, conv), (0,) * conv.ndim
    return _CONVOLVE[conv.ndim](x, weight, None, conv.stride, padding, conv.dilation, conv.groups)


def padded(x: Tensor, conv: Conv) -> Tensor:
    """``x`` with the convolution's padding applied explicitly, so that a kernel slides over it.

    A transposed convolution slides its kernel, turned round, by single steps over its input with zeros in between.
    """
    if conv.transposed:
        spread = [(n - 1) * s + 1 for n, s in zip(x.shape[2:], conv.stride, strict=True)]
        sparse = x.new_zeros((*x.shape[:2], *spread))
        steps: list[Any] = [slice(None, None, s) for s in conv.stride]
        sparse[(..., *steps)] = x
        reach = [d * (k - 1) - p for d, k, p in zip(conv.dilation, conv.kernel, conv.padding, strict=True)]
        x, ends = sparse, [(r, r + extra) for r, extra in zip(reach, conv.output_padding, strict=True)]
    elif conv.padding_same:
        total = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel, strict=True)]
        ends = [(t // 2, t - t // 2) for t in total]
    else:
        ends = [(p, p) for p in conv.padding]
    if not any(map(any, ends)):
        return x
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    return F.pad(x, [n for pair in reversed(ends) for n in pair], mode=mode)


def geometry(module: nn.Module, input_shape: tuple[int, ...]) -> Conv:
    """The geometry of a convolution or linear layer of torch on inputs of ``input_shape``, the batch first."""
    if isinstance(module, nn.Linear):
        return Conv(
            in_channels=module.in_features,
            out_channels=module.out_features,
            bias=module.bias is not None,
            size=(prod(input_shape[1:-1]), 1),
            linear=True,
        )
    conv = cast(nn.Conv2d, module)  # or of another number of axes, or transposed: the fields are the same
    ndim = len(conv.kernel_size)
    padding = (0,) * ndim if isinstance(conv.padding, str) else tuple(conv.padding)
    return Conv(
        in_channels=conv.in_channels,
        out_channels=conv.out_channels,
        kernel=tuple(conv.kernel_size),
        stride=tuple(conv.stride),
        padding=padding,
        dilation=tuple(conv.dilation),
        groups=conv.groups,
        bias=conv.bias is not None,
        padding_mode=conv.padding_mode,
        padding_same=conv.padding == "same",
        size=tuple(input_shape[-ndim:]),
        transposed=conv.transposed,
        output_padding=tuple(conv.output_padding),
    )


def kernel_of(module: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Kernel ``(T / tied, S / groups, *kernel)`` and bias of a stage: torch's own layer, or a :class:`TiedConv`."""
    weight = cast(Tensor, module.weight).detach()
    bias = cast("Tensor | None", module.bias)
    if isinstance(module, nn.Linear):
        weight = weight[..., None, None]
    elif groups := turned_groups(module):
        weight = turned(weight, groups)
    return weight, None if bias is None else bias.detach()


@torch.no_grad()
def set_kernel(module: nn.Module, kernel: Tensor) -> None:
    """Write a kernel as :func:`kernel_of` gives it into the weight of a stage."""
    weight = cast(Tensor, module.weight)
    if groups := turned_groups(module):
        kernel = turned(kernel, groups)
    weight.copy_(kernel.reshape(weight.shape))


def turned_groups(module: nn.Module) -> int:
    """The groups of a transposed stage's own weight; 0 for the other stages."""
    if isinstance(module, TiedConv):
        return one_of_tied(module.conv).groups if module.conv.transposed else 0
    return cast(int, module.groups) if getattr(module, "transposed", False) else 0


def turned(weight: Tensor, groups: int) -> Tensor:
    """A kernel with in and out exchanged group by group: from torch's transposed layout to ours, and back."""
    return weight.reshape(groups, -1, *weight.shape[1:]).transpose(1, 2).flatten(0, 1)


def build_stage(conv: Conv, weight: Tensor, bias: Tensor | None) -> nn.Module:
    """A module of this geometry that holds a copy of ``weight`` and, if it has a bias, of ``bias`` (zeros if None)."""
    weight = weight.detach()
    if conv.transposed:
        weight = turned(weight.reshape(conv.weight_shape), conv.groups // conv.tied)
    start = None
    if conv.bias:
        start = weight.new_zeros(conv.out_channels) if bias is None else bias.detach().to(weight, copy=True)
    if conv.tied > 1:
        return TiedConv(conv, weight.clone(memory_format=torch.contiguous_format), start)
    module = _empty(conv)
    # Contiguous whatever the factor's strides: the last bits of a convolution depend on the layout.
    kernel = weight.reshape(cast(Tensor, module.weight).shape)
    module.weight = nn.Parameter(kernel.clone(memory_format=torch.contiguous_format))
    if start is not None:
        module.bias = nn.Parameter(start)
    return module


def _empty(conv: Conv) -> nn.Module:
    """The module without values: on the meta device nothing is drawn at random and nothing initialised in vain."""
    if conv.linear:
        return nn.Linear(conv.in_channels, conv.out_channels, bias=conv.bias, device="meta")
    fields: dict[str, Any] = {
        "kernel_size": conv.kernel,
        "stride": conv.stride,
        "padding": "same" if conv.padding_same else conv.padding,
        "dilation": conv.dilation,
        "groups": conv.groups,
        "bias": conv.bias,
        "padding_mode": conv.padding_mode,
    }
    if conv.transposed:
        fields["output_padding"] = conv.output_padding
    kinds = TRANSPOSED if conv.transposed else PLAIN
    return kinds[conv.ndim](conv.in_channels, conv.out_channels, **fields, device="meta")


def build_chain(
    stages: Sequence[Conv], weights: Sequence[Tensor] | None = None, bias: Tensor | None = None
) -> nn.Module:
    """The stages as a module, on the device and in the dtype of ``weights``; zeros without weights."""
    if weights is None:
        weights = [torch.zeros(conv.weight_shape) for conv in stages]
    return nn.Sequential(*(build_stage(conv, weight, bias) for conv, weight in zip(stages, weights, strict=True)))


def composed(stages: Sequence[Conv], weights: Sequence[Tensor], dtype: torch.dtype = torch.float64) -> Tensor:
    """The one kernel ``(T, S, *kernel)`` that a chain of stages applies; zero between groups."""
    spatial = weights[0].ndim - 2
    convolve = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[spatial - 1]
    inputs = stages[0].in_channels
    kernel = torch.eye(inputs, dtype=dtype, device=weights[0].device).reshape(inputs, inputs, *[1] * spatial)
    for stage, weight in zip(stages, weights, strict=True):
        # Correlating with one kernel after another is correlating with their convolution; transposed, torch convolves.
        tied = getattr(stage, "tied", 1)
        groups = weight.to(dtype).reshape(stage.groups // tied, -1, *weight.shape[1:]).repeat_interleave(tied, 0)
        extents = list(zip(kernel.shape[2:], weight.shape[2:], strict=True))
        if all(1 in pair for pair in extents):  # nothing overlaps: products alone, many times faster for many groups
            before = kernel.reshape(inputs, stage.groups, -1, kernel.shape[2:].numel())
            product = torch.einsum("sgrx,gury->sguxy", before, groups.flatten(3))
            pairs = product.reshape(inputs, stage.out_channels, *kernel.shape[2:], *weight.shape[2:])
            beside = [axis for i in range(spatial) for axis in (2 + i, 2 + spatial + i)]
            kernel = pairs.permute(0, 1, *beside).reshape(inputs, stage.out_channels, *map(prod, extents))
        else:
            kernel = convolve(kernel, groups.transpose(1, 2).flatten(0, 1), groups=stage.groups)
    return kernel.transpose(0, 1)
