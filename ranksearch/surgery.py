"""Finding the layers of a network, and swapping them for chains of stages; the network given is never changed."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ranksearch.conv import Conv
from ranksearch.decompositions import (
    FORMATS,
    Format,
    Prepared,
    Statistics,
    chain,
    check_ranks,
    compressed_stages,
    prepare,
)
from ranksearch.errors import ModelError, RankError, RankMapError, UnsupportedLayer
from ranksearch.rankmap import RankMap

Shape = tuple[int, int, int]
"""Channels, height, width of one image."""


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One convolution or linear layer of a network, in the order of execution."""

    name: str
    conv: Conv
    calls: int
    """How often one forward pass runs it."""


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


def channels_last(model: nn.Module) -> nn.Module:
    """``model`` with its convolution kernels channels-last, in place: about twice as fast on CPUs."""
    for parameter in model.parameters():
        if parameter.ndim == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    return model


def find_layers(model: nn.Module, input_shape: Shape) -> list[Layer]:
    """Every ``Conv2d`` and ``Linear`` that a forward pass runs, with its geometry.

    Subclasses that compute something else (their own ``forward``) are not among them: a chain would not equal them.

    Raises:
        ModelError: the network does not run on images of ``input_shape``.
    """
    found: dict[str, tuple[Conv, int]] = {}
    handles = []
    for name, module in model.named_modules():
        if _is_plain(module):

            def record(module: nn.Module, inputs: tuple[Tensor, ...], name: str = name) -> None:
                conv, calls = found.get(name, (None, 0))
                found[name] = (conv or geometry(module, tuple(inputs[0].shape)), calls + 1)

            handles.append(module.register_forward_pre_hook(record))
    try:
        _forward_one(model, input_shape)
    finally:
        for handle in handles:
            handle.remove()
    return [Layer(name=name, conv=conv, calls=calls) for name, (conv, calls) in found.items()]


def _is_plain(module: nn.Module) -> bool:
    """Whether a module computes what ``Conv2d`` or ``Linear`` does."""
    if isinstance(module, nn.Conv2d):
        kind = type(module)
        return kind.forward is nn.Conv2d.forward and kind._conv_forward is nn.Conv2d._conv_forward
    return isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward


def geometry(module: nn.Module, input_shape: tuple[int, ...]) -> Conv:
    """The geometry of a ``Conv2d`` or ``Linear`` on inputs of ``input_shape``, the batch first."""
    if isinstance(module, nn.Linear):
        positions = 1
        for extent in input_shape[1:-1]:
            positions *= extent
        return Conv(
            in_channels=module.in_features,
            out_channels=module.out_features,
            bias=module.bias is not None,
            size=(positions, 1),
            linear=True,
        )
    conv = cast(nn.Conv2d, module)
    same = conv.padding == "same"
    padding = (0, 0) if isinstance(conv.padding, str) else cast(tuple[int, int], tuple(conv.padding))
    return Conv(
        in_channels=conv.in_channels,
        out_channels=conv.out_channels,
        kernel=cast(tuple[int, int], tuple(conv.kernel_size)),
        stride=cast(tuple[int, int], tuple(conv.stride)),
        padding=padding,
        dilation=cast(tuple[int, int], tuple(conv.dilation)),
        groups=conv.groups,
        bias=conv.bias is not None,
        padding_mode=conv.padding_mode,
        padding_same=same,
        size=(input_shape[-2], input_shape[-1]),
    )


def kernel_of(module: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Kernel ``(T, S, height, width)`` and bias of a ``Conv2d`` or ``Linear``."""
    weight = cast(Tensor, module.weight).detach()
    bias = cast("Tensor | None", module.bias)
    return (weight[..., None, None] if weight.ndim == 2 else weight), None if bias is None else bias.detach()


def build_stage(conv: Conv, weight: Tensor, bias: Tensor | None) -> nn.Conv2d | nn.Linear:
    """A module of this geometry that holds a copy of ``weight`` and, if it has a bias, of ``bias`` (zeros if None)."""
    # Made on the meta device, nothing is drawn from the random generator and nothing initialised in vain.
    module: nn.Conv2d | nn.Linear
    if conv.linear:
        module = nn.Linear(conv.in_channels, conv.out_channels, bias=conv.bias, device="meta")
    else:
        module = nn.Conv2d(
            conv.in_channels,
            conv.out_channels,
            conv.kernel,
            stride=conv.stride,
            padding="same" if conv.padding_same else conv.padding,
            dilation=conv.dilation,
            groups=conv.groups,
            bias=conv.bias,
            padding_mode=conv.padding_mode,
            device="meta",
        )
    # Contiguous whatever the factor's strides: the last bits of a convolution depend on the layout.
    kernel = weight.detach().reshape(module.weight.shape)
    module.weight = nn.Parameter(kernel.clone(memory_format=torch.contiguous_format))
    if conv.bias:
        start = weight.new_zeros(conv.out_channels) if bias is None else bias.detach().to(weight, copy=True)
        module.bias = nn.Parameter(start)
    return module


def build_chain(
    stages: Sequence[Conv], weights: Sequence[Tensor] | None = None, bias: Tensor | None = None
) -> nn.Module:
    """The stages as a module, on the device and in the dtype of ``weights``; zeros without weights."""
    if weights is None:
        weights = [torch.zeros(conv.weight_shape) for conv in stages]
    return nn.Sequential(*(build_stage(conv, weight, bias) for conv, weight in zip(stages, weights, strict=True)))


def build_layer(
    form: Format,
    conv: Conv,
    prepared: Prepared,
    ranks: tuple[int, ...],
    bias: Tensor | None,
    dtype: torch.dtype,
    kernels: list[Tensor] | None = None,
) -> nn.Module:
    """The chain that replaces one layer at these ranks; ``bias`` is the dense layer's, ``kernels`` are made if None."""
    weights, bias = chain(form, conv, prepared, ranks, bias, kernels)
    return build_chain(compressed_stages(form, conv, ranks), [weight.to(dtype) for weight in weights], bias)


def replaced(model: nn.Module, modules: Mapping[str, nn.Module]) -> nn.Module:
    """A copy of ``model`` with some submodules exchanged; the copy shares no tensor with it."""
    # The layers that are exchanged are not copied first: pointing the copy's memo at the new module skips them.
    memo: dict[int, Any] = {id(model.get_submodule(name)): module for name, module in modules.items()}
    return copy.deepcopy(model, memo)


def apply_rank_map(
    rank_map: RankMap, model: nn.Module, statistics: Mapping[str, Statistics] | None = None
) -> nn.Module:
    """A compressed copy of the dense ``model``, each layer of the map decomposed afresh at its ranks.

    Factors are activation-aware for the layers that ``statistics`` holds, weight-only for the others.

    Raises:
        RankMapError: the map is for another model.
        DecompositionError: a kernel cannot be factorised.
    """
    modules: dict[str, nn.Module] = {}
    for name, conv in check_fits(rank_map, model).items():
        form, ranks = FORMATS[rank_map.layers[name].format], rank_map.layers[name].ranks
        weight, bias = kernel_of(model.get_submodule(name))
        prepared = prepare(form, conv, weight, (statistics or {}).get(name))
        modules[name] = build_layer(form, conv, prepared, ranks, bias, weight.dtype)
    return replaced(model, modules)


def skeleton(rank_map: RankMap, model: nn.Module) -> nn.Module:
    """A copy of ``model`` with the compressed structure and zero factors, ready for the compressed weights."""
    modules: dict[str, nn.Module] = {}
    for name, conv in check_fits(rank_map, model).items():
        layer = rank_map.layers[name]
        weight, _ = kernel_of(model.get_submodule(name))
        modules[name] = build_chain(compressed_stages(FORMATS[layer.format], conv, layer.ranks)).to(weight)
    return replaced(model, modules)


def check_fits(rank_map: RankMap, model: nn.Module) -> dict[str, Conv]:
    """Layer to geometry for every layer of the map; raises :class:`RankMapError` unless the model has just these."""
    present = {layer.name: layer.conv for layer in find_layers(model, rank_map.model.input_shape)}
    wrong = []
    for name, layer in rank_map.layers.items():
        if layer.format not in FORMATS:
            wrong.append(f"{name} has the unknown format {layer.format!r} (known: {', '.join(FORMATS)})")
        elif name not in present:
            wrong.append(f"the model has no layer {name}")
        elif present[name] != layer.geometry:
            wrong.append(f"{name} is {layer.geometry} in the map and {present[name]} in the model")
        else:
            try:
                check_ranks(FORMATS[layer.format], present[name], layer.ranks)
            except (RankError, UnsupportedLayer) as error:
                wrong.append(f"{name}: {error}")
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise RankMapError(
            f"a rank map must be for the model it is applied to; this one, for {rank_map.model.name}, is not: "
            f"{'; '.join(wrong[:3])}{more}. Give the model that the map was searched for."
        )
    return {name: present[name] for name in rank_map.layers}


def count_macs(model: nn.Module, input_shape: Shape) -> int:
    """MACs per image of convolutions and linear layers, counted by PyTorch's own counter on a forward pass."""
    counter = FlopCounterMode(display=False)
    with counter:
        _forward_one(model, input_shape)
    return counter.get_total_flops() // 2


def count_params(model: nn.Module) -> int:
    """Parameters of the network, batch-norm's included, running statistics not."""
    return sum(parameter.numel() for parameter in model.parameters())


def _forward_one(model: nn.Module, input_shape: Shape) -> None:
    parameter = next(model.parameters(), None)
    try:
        image = torch.zeros((1, *input_shape)) if parameter is None else parameter.new_zeros((1, *input_shape))
        with torch.no_grad(), evaluating(model):
            model(image)
    except Exception as error:  # a user's forward may raise anything
        first_line = str(error).partition("\n")[0]
        reason = f"{type(error).__name__}: {first_line}" if first_line else type(error).__name__
        raise ModelError(
            f"the network must run on one image of shape {input_shape} (channels, height, width): {reason}. "
            "Check data and model against each other."
        ) from error
