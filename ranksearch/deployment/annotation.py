"""What torchao's PT2E quantisation is told of a network: the steps of weights, and the ranges of what layers take.

Importing it imports torchao.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torchao.quantization.pt2e.observer import ObserverBase
from torchao.quantization.pt2e.quantizer import (
    FixedQParamsQuantizationSpec,
    QuantizationAnnotation,
    QuantizationSpec,
    Quantizer,
)

from ranksearch.deployment.whole import no_own_weights, whole_weights
from ranksearch.rounding import Range
from ranksearch.table import FLOAT_BITS

_aten = torch.ops.aten
_CONVOLUTIONS = _aten.conv1d, _aten.conv2d, _aten.conv3d
_TRANSPOSED = _aten.conv_transpose1d, _aten.conv_transpose2d, _aten.conv_transpose3d
_INSTEAD = "pt2"


class Known(Quantizer):  # type: ignore[misc]  # torchao has no types
    """Annotates each layer of a graph with its bits and its range.

    Args:
        model: the network that the graph is of, with rounded weights.
        bits: of every layer's weights.
        known: ranges of what goes into layers; others take it as it is.
    """

    def __init__(self, model: nn.Module, bits: Mapping[str, int], known: Mapping[str, Range]) -> None:
        super().__init__()
        self._model, self._bits, self._known = model, bits, known

    def annotate(self, graph: GraphModule) -> GraphModule:
        """Annotate the graph in place.

        Raises:
            ExportError: the weights of a layer with a range are not in it.
        """
        found: dict[str, list[Node]] = {}
        for node in graph.graph.nodes:
            if getattr(node.target, "overloadpacket", None) in (*_CONVOLUTIONS, *_TRANSPOSED, _aten.linear):
                found.setdefault(str(node.args[1].target).removesuffix(".weight"), []).append(node)
        for name, width in self._bits.items():
            if name not in found and name in self._known:
                raise no_own_weights(name, _INSTEAD)
            for node in found.get(name, []):
                self._annotate(node, name, width)
        return graph

    def _annotate(self, node: Node, name: str, bits: int) -> None:
        module, taken = self._model.get_submodule(name), dict[Any, Any]()
        if name in self._known:
            taken[node.args[0]] = FixedQParamsQuantizationSpec(
                dtype=torch.uint8,
                scale=self._known[name].scale,
                zero_point=self._known[name].zero_point,
                quant_min=0,
                quant_max=255,
                qscheme=torch.per_tensor_affine,
            )
        if bits < FLOAT_BITS and _has_kernel(node):
            taken[node.args[1]] = QuantizationSpec(
                dtype=torch.int8,
                observer_or_fake_quant_ctr=_PerChannelStep.with_args(
                    step=whole_weights(name, module, bits, _INSTEAD)[1]
                ),
                quant_min=-127,
                quant_max=127,
                qscheme=torch.per_channel_symmetric,
                ch_axis=0,
            )
        node.meta["quantization_annotation"] = QuantizationAnnotation(input_qspec_map=taken, _annotated=True)

    def validate(self, graph: GraphModule) -> None:
        """All is supported: what has no int8 kernel runs in float32."""


def _has_kernel(node: Any) -> bool:
    """Whether inductor can be given whole numbers for the weights of a layer.

    Others have rounded inputs and rounded weights, but compute in float32: it would run a transposed convolution as a
    plain one; and of an input of one channel, for any number of images, it takes a layout that its int8 kernel does not
    use.
    """
    kind = node.target.overloadpacket
    return kind is _aten.linear or (kind in _CONVOLUTIONS and node.args[0].meta["val"].shape[1] > 1)


def norms_apart(graph: GraphModule) -> None:
    """Write every batch norm as a product and a sum, in place.

    PT2E would fold one into the layer before it, whose steps are then others, and whatever else takes its outputs.
    """
    for number, node in enumerate(list(graph.graph.nodes)):
        if node.op != "call_function" or node.target != _aten.batch_norm.default:
            continue
        x, weight, bias, mean, variance, of_batch, _, eps, *_ = node.args
        if of_batch:
            continue
        held = [None if one is None else _tensor(graph, one) for one in (weight, bias, mean, variance)]
        scale = (held[3] + eps).rsqrt() * (1 if held[0] is None else held[0])
        shift = (0 if held[1] is None else held[1]) - held[2] * scale
        shape = [-1] + [1] * (x.meta["val"].ndim - 2)
        with graph.graph.inserting_before(node):
            for what, operator, value in (("scale", _aten.mul.Tensor, scale), ("shift", _aten.add.Tensor, shift)):
                name = f"_norm_{what}_{number}"
                graph.register_buffer(name, value.detach().reshape(shape))
                x = graph.graph.call_function(operator, (x, graph.graph.get_attr(name)))
                x.meta = dict(node.meta)
        node.replace_all_uses_with(x)
        graph.graph.erase_node(node)
    graph.recompile()


def _tensor(graph: GraphModule, node: Node) -> Tensor:
    owner, _, name = str(node.target).rpartition(".")
    found: Tensor = getattr(graph.get_submodule(owner), name)
    return found


class _PerChannelStep(ObserverBase):  # type: ignore[misc]  # torchao has no types
    """Knows the step of each output channel; by the start of its name it is told the channels' axis."""

    def __init__(self, step: Tensor, ch_axis: int, **known: Any) -> None:
        super().__init__(dtype=known["dtype"])
        self.step, self.ch_axis = step, ch_axis
        self.qscheme, self.quant_min, self.quant_max = known["qscheme"], known["quant_min"], known["quant_max"]

    def forward(self, x: Tensor) -> Tensor:
        """``x`` itself."""
        return x

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        """Steps and zero points, ``(T,)``."""
        return self.step, torch.zeros(len(self.step), dtype=torch.int64)
