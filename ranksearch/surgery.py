"""Finding the layers of a network, and swapping them for chains of stages; the network given is never changed."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
)
from ranksearch.decompositions.format import STABILISED
from ranksearch.errors import ModelError, RankError, RankMapError, UnsupportedLayer, first_line
from ranksearch.factors import factors_at, prepared_factors
from ranksearch.rankmap import RankMap
from ranksearch.rounding import round_weights, widths_of
from ranksearch.stages import PLAIN, TRANSPOSED
from ranksearch.stages import build_chain as build_chain
from ranksearch.stages import build_stage as build_stage
from ranksearch.stages import evaluating as evaluating
from ranksearch.stages import geometry as geometry
from ranksearch.stages import kernel_of as kernel_of

Shape = tuple[int, ...]
"""Of one input: channels, height, width of an image, or whatever else the network takes."""


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One convolution or linear layer of a network, in the order of execution."""

    name: str
    conv: Conv
    calls: int
    """How often one forward pass runs it."""


def channels_last(model: nn.Module) -> nn.Module:
    """``model`` with its convolution kernels channels-last, in place: about twice as fast on CPUs."""
    for parameter in model.parameters():
        if parameter.ndim == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    return model


def find_layers(model: nn.Module, input_shape: Shape) -> list[Layer]:
    """Every convolution and linear layer that a forward pass runs, with its geometry.

    Subclasses that compute something else (their own ``forward``) are not among them: a chain would not equal them.
    Nor are transposed convolutions that are told the size of their output when they are called.

    Raises:
        ModelError: the network does not run on inputs of ``input_shape``.
    """
    found: dict[str, tuple[Conv, int]] = {}
    told: set[str] = set()
    handles = []
    for name, module in model.named_modules():
        if _is_plain(module):

            def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], name: str = name) -> None:
                x, *others = (*args, *kwargs.values())
                if any(other is not None for other in others):
                    told.add(name)
                conv, calls = found.get(name, (None, 0))
                found[name] = (conv or geometry(module, tuple(x.shape)), calls + 1)

            handles.append(module.register_forward_pre_hook(record, with_kwargs=True))
    try:
        run_one(model, input_shape)
    finally:
        for handle in handles:
            handle.remove()
    return [Layer(name=name, conv=conv, calls=calls) for name, (conv, calls) in found.items() if name not in told]


def _is_plain(module: nn.Module) -> bool:
    """Whether a module computes what torch's convolution or linear layer does."""
    bases: list[Any] = [nn.Linear, *PLAIN.values(), *TRANSPOSED.values()]
    base = next((base for base in bases if isinstance(module, base)), None)
    return base is not None and all(
        getattr(type(module), part, None) is getattr(base, part, None) for part in ("forward", "_conv_forward")
    )


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
    rank_map: RankMap,
    model: nn.Module,
    statistics: Mapping[str, Statistics] | None = None,
    *,
    cache: Path | None = None,
) -> nn.Module:
    """A compressed copy of the dense ``model``, each layer of the map decomposed afresh at its ranks.

    Factors are activation-aware for the layers that ``statistics`` holds, weight-only for the others; fits are
    stabilised as the map says, and weights of few bits rounded to their nearest multiples.

    Args:
        rank_map: the map.
        model: the dense network.
        statistics: by layer.
        cache: folder where decompositions are looked for and kept.

    Raises:
        RankMapError: the map is for another model.
        DecompositionError: a kernel cannot be factorised.
    """
    modules: dict[str, nn.Module] = {}
    for name, conv in check_fits(rank_map, model).items():
        layer, (weight, bias) = rank_map.layers[name], kernel_of(model.get_submodule(name))
        prepared = prepared_factors(layer.format, conv, weight, (statistics or {}).get(name), cache)
        fit = factors_at(layer.format, conv, prepared, layer.ranks, layer.stabilise or STABILISED, cache)
        form = FORMATS[layer.format]
        modules[name] = build_layer(form, conv, prepared, layer.ranks, bias, weight.dtype, fit.kernels)
    found = replaced(model, modules)
    if rank_map.widths is not None:
        bits = {name: layer.bits for name, layer in rank_map.layers.items()}
        round_weights(found, widths_of(found, bits, rank_map.widths.other_bits))
    return found


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
        run_one(model, input_shape)
    return counter.get_total_flops() // 2


def count_params(model: nn.Module) -> int:
    """Parameters of the network, batch-norm's included, running statistics not."""
    return sum(parameter.numel() for parameter in model.parameters())


def run_one(model: nn.Module, input_shape: Shape) -> Any:
    """What the network, in evaluation mode, gives for one image of zeros.

    Raises:
        ModelError: it does not run on inputs of ``input_shape``.
    """
    parameter = next(model.parameters(), None)
    try:
        image = torch.zeros((1, *input_shape)) if parameter is None else parameter.new_zeros((1, *input_shape))
        with torch.no_grad(), evaluating(model):
            return model(image)
    except Exception as error:  # a user's forward may raise anything
        raise ModelError(
            f"the network must run on one image of shape {input_shape} (channels, height, width): {first_line(error)}. "
            "Check data and model against each other."
        ) from error
