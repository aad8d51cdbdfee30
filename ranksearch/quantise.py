"""Per-channel equalisation of factors before quantisation, through the gauge that is free between them.

Nothing non-linear stands between the factors of a layer, so that dividing a channel by s and multiplying the next
factor's column by s changes nothing in exact arithmetic. In int8 a tensor of activations has one scale, and a kernel
one for each output channel: channels of very different ranges lose digits. We take s = sqrt(activations' range /
column's range), as Xiao et al. 2022 (SmoothQuant, arXiv 2211.10438) balance activations and weights at alpha = 1/2,
in the gauge that Nagel et al. 2019 (arXiv 1906.04721) use between layers; that it is used between low-rank factors is
the idea of Kozyrskiy and Phan 2020 (arXiv 2006.08878), as we reconstruct it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from ranksearch.folding import neighbours
from ranksearch.stages import kernel_of, set_kernel
from ranksearch.surgery import Shape, evaluating, find_layers, replaced


@torch.no_grad()
def equalised(model: nn.Module, input_shape: Shape, batches: Iterable[Tensor]) -> tuple[nn.Module, int]:
    """A copy of ``model`` that computes the same, up to rounding, and the number of factor pairs that were balanced.

    Args:
        model: in evaluation mode; layers that follow each other with nothing between are balanced.
        input_shape: of one image.
        batches: images ``(N, C, *size)`` that show the activations' ranges.

    Raises:
        ModelError: the network does not run on inputs of ``input_shape``.
    """
    found = replaced(model, {})
    layers = {layer.name: layer.conv for layer in find_layers(found, input_shape)}
    pairs = [(one, two) for one, two in neighbours(found, input_shape) if one in layers and two in layers]
    ranges = _ranges(found, {one: layers[one].linear for one, _ in pairs}, batches)
    for one, two in pairs:
        balance(found.get_submodule(one), found.get_submodule(two), ranges[one])
    return found, len(pairs)


@torch.no_grad()
def balance(first: nn.Module, second: nn.Module, ranges: Tensor) -> None:
    """Balance the channels between two layers of torch's own, in place: what they compute together stays the same.

    Args:
        first: whose outputs go into ``second``, with nothing between.
        second: the other one.
        ranges: ``(channels,)``: size of the activations between them, up to a common factor.
    """
    groups = int(getattr(second, "groups", 1))
    columns, _ = kernel_of(second)
    apart = columns.reshape(groups, -1, *columns.shape[1:])
    width = apart.transpose(1, 2).flatten(0, 1).flatten(1).abs().amax(1)
    scale = _balance(ranges.to(width), width)
    rows, bias = kernel_of(first)
    set_kernel(first, rows / scale.reshape(-1, *[1] * (rows.ndim - 1)))
    if bias is not None:
        bias.div_(scale)
    spread = scale.reshape(groups, 1, -1, *[1] * (columns.ndim - 2))
    set_kernel(second, (apart * spread).reshape(columns.shape))


def _balance(activations: Tensor, weights: Tensor) -> Tensor:
    """The divisor of each channel, with the geometric mean 1; 1 where a channel is dead."""
    alive = (activations > 0) & (weights > 0)
    ratio = torch.where(alive, activations / torch.where(alive, weights, 1), 1).log() / 2
    mean = ratio[alive].mean() if bool(alive.any()) else ratio.new_zeros(())
    return torch.where(alive, (ratio - mean).exp(), 1)


def _ranges(model: nn.Module, linear: Mapping[str, bool], batches: Iterable[Tensor]) -> dict[str, Tensor]:
    """Largest magnitude of each output channel of the named layers."""
    found: dict[str, Tensor] = {}
    handles = []
    for name, last in linear.items():

        def hear(_: nn.Module, args: tuple[Tensor, ...], output: Tensor, name: str = name, last: bool = last) -> None:
            highest = output.movedim(-1 if last else 1, 0).flatten(1).abs().amax(1)
            found[name] = highest if name not in found else torch.maximum(found[name], highest)

        handles.append(model.get_submodule(name).register_forward_hook(hear))
    try:
        with evaluating(model):
            for images in batches:
                model(images)
    finally:
        for handle in handles:
            handle.remove()
    return found
