"""What each layer of a rank map costs and loses: MACs, parameters, latency and errors, dense and compressed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ranksearch.conv import Conv
from ranksearch.latency import latency_ms
from ranksearch.preparation import Notify, silent
from ranksearch.rankmap import RankMap
from ranksearch.surgery import find_layers

_SECONDS = 0.05
"""For which one layer is timed."""


@dataclass(frozen=True, kw_only=True)
class LayerReport:
    """One layer, dense and compressed."""

    name: str
    format: str
    """``dense`` where it stays so."""
    ranks: tuple[int, ...]
    conv: Conv
    calls: int
    """How often one forward pass runs it; costs are those of one call."""
    dense_macs: int
    macs: int
    dense_params: int
    params: int
    dense_latency_ms: float
    """Of one image, this layer alone."""
    latency_ms: float
    error: float | None
    """Norm of the difference of its outputs from the dense layer's, on the dense network's inputs, relative to theirs;
    None where it stays dense."""
    error_in_place: float | None
    """Likewise in the compressed network, with what its earlier layers hand down."""


def measure_layers(
    rank_map: RankMap, dense: nn.Module, compressed: nn.Module, batches: Iterable[Tensor], notify: Notify = silent
) -> list[LayerReport]:
    """Every convolution and linear layer, in the order of execution.

    Args:
        rank_map: the map.
        dense: the dense network, in evaluation mode.
        compressed: that of the map, likewise, on the same device.
        batches: images ``(N, C, *size)`` there, for the errors.
        notify: told what is being done.
    """
    errors = _errors(rank_map, dense, compressed, batches)
    found = []
    layers = find_layers(dense, rank_map.model.input_shape)
    for i, layer in enumerate(layers):
        notify("timing layers", i, len(layers))
        chosen = rank_map.layers.get(layer.name)
        shape = _input_shape(layer.conv)
        before = latency_ms(dense.get_submodule(layer.name), shape, seconds=_SECONDS)
        alone, in_place = errors.get(layer.name, (None, None))
        found.append(
            LayerReport(
                name=layer.name,
                format="dense" if chosen is None else chosen.format,
                ranks=() if chosen is None else chosen.ranks,
                conv=layer.conv,
                calls=layer.calls,
                dense_macs=layer.conv.macs,
                macs=layer.conv.macs if chosen is None else chosen.macs,
                dense_params=layer.conv.params,
                params=layer.conv.params if chosen is None else chosen.params,
                dense_latency_ms=before,
                latency_ms=before
                if chosen is None
                else latency_ms(compressed.get_submodule(layer.name), shape, seconds=_SECONDS),
                error=alone,
                error_in_place=in_place,
            )
        )
    return found


def _input_shape(conv: Conv) -> tuple[int, ...]:
    """Of one input of the layer, without the batch."""
    if not conv.linear:
        return (conv.in_channels, *conv.size)
    positions = conv.size[0]
    return (conv.in_channels,) if positions == 1 else (positions, conv.in_channels)


@torch.no_grad()
def _errors(
    rank_map: RankMap, dense: nn.Module, compressed: nn.Module, batches: Iterable[Tensor]
) -> dict[str, tuple[float, float]]:
    """Layer to its relative errors alone and in place."""
    sums = {name: [0.0, 0.0, 0.0] for name in rank_map.layers}
    """Squared differences alone and in place, squared outputs."""
    for images in batches:
        with _heard(dense, rank_map.layers) as ours:
            dense(images)
        with _heard(compressed, rank_map.layers) as theirs:
            compressed(images)
        for name in rank_map.layers:
            chain = compressed.get_submodule(name)
            for (x, y), (_, changed) in zip(ours[name], theirs[name], strict=True):
                for i, difference in enumerate((chain(x) - y, changed - y, y)):
                    sums[name][i] += float(difference.double().square().sum())
    return {
        name: ((alone / total) ** 0.5, (in_place / total) ** 0.5)
        for name, (alone, in_place, total) in sums.items()
        if total > 0
    }


@contextmanager
def _heard(model: nn.Module, names: Iterable[str]) -> Iterator[dict[str, list[tuple[Tensor, Tensor]]]]:
    """Inputs and outputs of the named modules, call after call."""
    heard: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in names}
    handles = []
    for name, calls in heard.items():

        def hear(_: nn.Module, args: Any, output: Tensor, calls: list[tuple[Tensor, Tensor]] = calls) -> None:
            # Copied: what follows may change them in place.
            calls.append((args[0].clone(), output.clone()))

        handles.append(model.get_submodule(name).register_forward_hook(hear))
    try:
        yield heard
    finally:
        for handle in handles:
            handle.remove()
