"""ONNX that holds the very whole numbers of a rank map with widths, and the ranges that its search scored with.

Pairs of QuantizeLinear and DequantizeLinear go into the graph in float32, as ONNX Runtime's own quantiser sets them.
Weights are int8, or int4 two in a byte, of which a Cast makes int8 as the file is loaded. What goes into a layer is
rounded in the ranges of :func:`ranksearch.scoring.deployed_ranges`. Two things are added to what a search simulates.
Biases are int32, in steps of the products'. And ONNX Runtime convolves in int8 only what ends in eight bits: where an
output goes on in float32, as into the sum of a skip, it is rounded too, in a range found likewise.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from ranksearch.deployment.portable import INPUT, LARGEST, write_onnx
from ranksearch.deployment.target import Job, graph_of
from ranksearch.errors import ExportError
from ranksearch.rankmap import WidthsRecord
from ranksearch.rounding import Range, range_of, whole_numbers, widths_of
from ranksearch.stages import kernel_of, turned, turned_groups
from ranksearch.table import FLOAT_BITS

if TYPE_CHECKING:
    from onnxscript import ir

_OPSET = 21
"""The first with int4."""
_ABSORBED = ("Relu", "Clip")
"""Operators that ONNX Runtime takes into the convolution before them."""
_WITH_BIAS = ("Conv", "Gemm")


def write_whole(job: Job, widths: WidthsRecord, path: Path) -> None:
    """Write the folded network of a map with widths; its ranges are those of ``job``.

    Raises:
        ExportError: a layer's weights are no whole multiples, or it cannot be found in the graph.
    """
    model, rank_map = job.folded.model, job.rank_map
    bits = {name: layer.bits for name, layer in rank_map.layers.items()}
    with tempfile.TemporaryDirectory() as folder:
        plain = Path(folder) / "float32.onnx"
        write_onnx(graph_of(model, rank_map), model, rank_map, plain, opset=_OPSET)
        from onnxscript import ir

        made = ir.load(plain)
        graph = _Graph(made.graph)
        for name, width in widths_of(model, bits, widths.other_bits).items():
            graph.round_layer(name, model.get_submodule(name), width, (job.ranges or {}).get(name))
        ends = graph.ends()
        images = torch.cat(job.calibration)
        wider = Path(folder) / "wider.onnx"
        _save(_giving(ir.load(plain), [str(end.name) for end in ends]), wider, model)
        graph.round_ends(ends, [range_of(value, widths.clip) for value in _values(wider, images, len(ends))])
        graph.tidy()
        _save(made, path, model)


def _giving(made: ir.Model, names: list[str]) -> ir.Model:
    """The model with values from inside it as further outputs."""
    values = {value.name: value for node in made.graph for value in node.outputs}
    made.graph.outputs.extend(values[name] for name in names)
    return made


def _values(file: Path, images: Tensor, count: int) -> Iterator[Tensor]:
    """The last outputs of a model, one after another, so that only one is held."""
    import onnxruntime

    options: Any = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session: Any = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    for name in names[len(names) - count :]:
        yield torch.from_numpy(session.run([name], {INPUT: images.contiguous().numpy()})[0])


def _save(made: ir.Model, path: Path, model: nn.Module) -> None:
    from onnxscript import ir

    size = sum(value.nbytes for value in model.state_dict().values())
    ir.save(made, path, external_data=f"{path.name}.data" if size > LARGEST else None)


@dataclass(kw_only=True, eq=False)
class _Rounding:
    """A convolution or product of whole numbers."""

    node: ir.Node
    name: str
    """Of its layer."""
    step: np.ndarray
    """``(T,)``: of the products."""


@dataclass(eq=False)
class _Graph:
    """A graph that is being rounded."""

    graph: ir.Graph
    rounded: dict[tuple[str, Range], ir.Value] = field(default_factory=dict)
    """What was rounded already."""
    whole: list[_Rounding] = field(default_factory=list)
    named: Counter[str] = field(default_factory=Counter)
    """How often a name was given: a layer that runs more than once has more than one input."""

    def round_layer(self, name: str, module: nn.Module, bits: int, inputs: Range | None) -> None:
        """Round the weights of a layer to so many bits, and what goes into it in its range, where it has one."""
        found = self._weight(name, module)
        if found is None:
            if inputs is None:  # the network has it and does not use it
                return
            raise no_own_weights(name, "onnx")
        weight, axis = found
        nodes = [node for node, index in weight.uses() if index == 1]
        step = None
        if bits < FLOAT_BITS:
            whole, step = _arrays(name, module, bits, transposed=axis == 1 and isinstance(module, nn.Linear))
            # For each use its own: on x86 without VNNI ONNX Runtime loads no file where two share their weights.
            for node, index in list(weight.uses()):
                held = self._dequantised(self._free(f"{name}.weight"), whole, step, axis, bits)
                node.replace_input_with(index, held)
        if inputs is None:
            return
        for node in nodes:
            taken = node.inputs[0]
            assert taken is not None, node
            node.replace_input_with(0, self._rounded(taken, inputs, f"{name}.input"))
            if step is not None and node.op_type in _WITH_BIAS:
                self.whole.append(_Rounding(node=node, name=name, step=step * np.float32(inputs.scale)))

    def _weight(self, name: str, module: nn.Module) -> tuple[ir.Value, int] | None:
        """Where a layer's weights are, and the axis of their outputs; of a linear layer the exporter turns them."""
        known = self.graph.initializers
        if f"{name}.weight" in known:
            return known[f"{name}.weight"], 1 if turned_groups(module) else 0
        if isinstance(module, nn.Linear):
            wanted = module.weight.detach().numpy().T
            for value in known.values():
                held = value.const_value
                if held is not None and tuple(held.shape) == wanted.shape and np.array_equal(held.numpy(), wanted):
                    return value, 1
        return None

    def _free(self, name: str) -> str:
        self.named[name] += 1
        return name if self.named[name] == 1 else f"{name}.{self.named[name]}"

    def _constant(self, name: str, array: np.ndarray) -> ir.Value:
        from onnxscript import ir

        value = ir.val(name, const_value=ir.tensor(array, name=name))
        self.graph.register_initializer(value)
        return value

    def _added(self, kind: str, inputs: list[ir.Value], name: str, **attributes: int) -> ir.Value:
        """The output of a new node."""
        from onnxscript import ir

        node = ir.node(kind, inputs, attributes, outputs=[ir.val(name)], name=name)
        self.graph.append(node)
        return node.outputs[0]

    def _dequantised(self, name: str, whole: np.ndarray, step: np.ndarray, axis: int, bits: int) -> ir.Value:
        """Whole numbers with one step for each index along ``axis``, as float32."""
        if bits == 4:
            from ml_dtypes import int4
            from onnxscript import ir

            packed = self._constant(f"{name}_quantized", whole.astype(int4))
            held = self._added("Cast", [packed], f"{name}_int8", to=int(ir.DataType.INT8))
        else:
            held = self._constant(f"{name}_quantized", whole)
        scale = self._constant(f"{name}_scale", step)
        zero = self._constant(f"{name}_zero_point", np.zeros(len(step), whole.dtype))
        return self._added("DequantizeLinear", [held, scale, zero], f"{name}_dequantized", axis=axis)

    def _rounded(self, value: ir.Value, known: Range, name: str) -> ir.Value:
        """A value of the graph rounded to eight bits, once in each range."""
        key = str(value.name), known
        if key not in self.rounded:
            name = self._free(name)
            scale = self._constant(f"{name}_scale", np.array(known.scale, np.float32))
            zero = self._constant(f"{name}_zero_point", np.array(known.zero_point, np.uint8))
            held = self._added("QuantizeLinear", [value, scale, zero], f"{name}_quantized")
            self.rounded[key] = self._added("DequantizeLinear", [held, scale, zero], f"{name}_dequantized")
        return self.rounded[key]

    def ends(self) -> list[ir.Value]:
        """Where convolutions of whole numbers end in float32; their biases become whole, too."""
        found = []
        for one in self.whole:
            self._round_bias(one)
            if one.node.op_type == "Conv" and (end := self._end(one.node.outputs[0])) is not None:
                found.append(end)
        return found

    def _round_bias(self, one: _Rounding) -> None:
        bias = one.node.inputs[2] if len(one.node.inputs) > 2 else None
        if bias is None or bias.const_value is None:
            return
        name = self._free(f"{one.name}.bias")
        wide = np.round(bias.const_value.numpy().astype(np.float64) / one.step)
        if np.abs(wide).max() < 2**31:
            held = self._dequantised(name, wide.astype(np.int32), one.step, 0, 32)
            one.node.replace_input_with(2, held)
            return
        # A channel that is all but dead: beside its weights the bias is too large for 32 bits.
        one.node.replace_input_with(2, None)
        output, axes = one.node.outputs[0], one.node.outputs[0].shape
        assert axes is not None, one.name
        shape = [-1] + [1] * (len(axes) - 2 if one.node.op_type == "Conv" else 0)
        apart = self._constant(f"{name}_apart", bias.const_value.numpy().reshape(shape))
        uses = list(output.uses())
        total = self._added("Add", [output, apart], f"{name}_added")
        for node, index in uses:
            node.replace_input_with(index, total)

    def _end(self, value: ir.Value) -> ir.Value | None:
        """What is to be rounded of a convolution's output; None where all of it is, or where it leaves the graph."""
        uses = list(value.uses())
        if len(uses) == 1 and uses[0].node.op_type in _ABSORBED:
            value = uses[0].node.outputs[0]
            uses = list(value.uses())
        rounding = [node for node, _ in uses if node.op_type == "QuantizeLinear"]
        if value.is_graph_output() or len(rounding) == len(uses) == 1:
            return None
        return value

    def round_ends(self, ends: list[ir.Value], ranges: list[Range]) -> None:
        """Round values, for everything that takes them."""
        for value, known in zip(ends, ranges, strict=True):
            uses = [(node, index) for node, index in value.uses() if node.op_type != "QuantizeLinear"]
            done = next((held for (name, _), held in self.rounded.items() if name == value.name), None)
            held = done if done is not None else self._rounded(value, known, f"{value.name}.output")
            for node, index in uses:
                node.replace_input_with(index, held)

    def tidy(self) -> None:
        """Drop the weights in float32, and put the nodes in order."""
        for name in [name for name, value in self.graph.initializers.items() if not value.uses()]:
            del self.graph.initializers[name]
        self.graph.sort()


def no_own_weights(name: str, instead: str) -> ExportError:
    """Of a layer whose weights are not in the graph: what to say, and which formats to take instead."""
    return ExportError(
        f"weights that are whole numbers must stand in the graph as they are in the network, {name} has none there "
        f"that are its own. Do not compute with a layer's weights, or use `--to {instead}`."
    )


def whole_weights(name: str, module: nn.Module, bits: int, instead: str) -> tuple[Tensor, Tensor]:
    """The whole numbers of a layer's weights, int8 as PyTorch stores them, and the step of each output channel.

    Raises:
        ExportError: there are none, or a transposed layer has several groups; the message names ``instead``.
    """
    groups = turned_groups(module)
    if groups > 1:
        raise ExportError(
            f"weights of whole numbers must have their output channels along one axis, the transposed convolution "
            f"{name} has {groups} groups. Use `--to {instead}`."
        )
    found = whole_numbers(kernel_of(module)[0], bits)
    if found is None:
        raise ExportError(
            f"weights of {bits} bits must be whole multiples of a step in every output channel, those of {name} are "
            f"not. Export the rank map and its weights again, or use `--to {instead}`."
        )
    whole, step = found
    weight: Any = module.weight
    return (turned(whole, groups) if groups else whole).reshape(weight.shape), step


def _arrays(name: str, module: nn.Module, bits: int, *, transposed: bool) -> tuple[np.ndarray, np.ndarray]:
    """Whole numbers and steps; ``transposed``: as ONNX stores those of a product."""
    stored, step = whole_weights(name, module, bits, "onnx")
    return np.ascontiguousarray(stored.numpy().T if transposed else stored.numpy()), step.numpy()
