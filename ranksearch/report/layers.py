"""What each layer of a rank map costs and loses: MACs, parameters, latency and errors, dense and compressed."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
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
from ranksearch.table import FLOAT_BITS

_SECONDS = 0.05
"""For which one layer is timed."""


@dataclass(frozen=True, kw_only=True)
class LayerReport:
    """One layer, dense and compressed."""

    name: str
    format: str
    """``dense`` where it stays so."""
    ranks: tuple[int, ...]
    bits: int
    """Of each weight."""
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
    other_bits = FLOAT_BITS if rank_map.widths is None else rank_map.widths.other_bits
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
                bits=other_bits if chosen is None else chosen.bits,
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
    """Layer to its relative errors alone and in place. Of one batch, the dense layers' outputs are held at once."""
    sums = {name: [0.0, 0.0, 0.0] for name in rank_map.layers}
    """Squared differences alone and in place, squared outputs."""
    outputs: dict[str, deque[Tensor]] = {name: deque() for name in rank_map.layers}
    """Of the dense layers, call after call."""

    def hear_dense(name: str, x: Tensor, y: Tensor) -> None:
        sums[name][0] += _squared(compressed.get_submodule(name)(x) - y)
        sums[name][2] += _squared(y)
        outputs[name].append(y.clone())  # what follows may change it in place

    def hear_compressed(name: str, _: Tensor, changed: Tensor) -> None:
        sums[name][1] += _squared(changed - outputs[name].popleft())

    for images in batches:
        with _heard(dense, rank_map.layers, hear_dense):
            dense(images)
        with _heard(compressed, rank_map.layers, hear_compressed):
            compressed(images)
    return {
        name: ((alone / total) ** 0.5, (in_place / total) ** 0.5)
        for name, (alone, in_place, total) in sums.items()
        if total > 0
    }


def _squared(values: Tensor) -> float:
    return float(values.double().square().sum())


@contextmanager
def _heard(model: nn.Module, names: Iterable[str], hear: Callable[[str, Tensor, Tensor], None]) -> Iterator[None]:
    """Every call of the named modules is told with its input and output."""
    handles = []
    for name in names:

        def told(_: nn.Module, args: Any, output: Tensor, name: str = name) -> None:
            hear(name, args[0], output)

        handles.append(model.get_submodule(name).register_forward_hook(told))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
