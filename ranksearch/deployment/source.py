"""A network as the source of a Python module that imports torch alone, with its weights beside it.

The source is written from the graph of torch.export, operator by operator: convolutions and linear layers as modules of
``torch.nn``, the rest as functions of torch. Variables are used again as soon as their values are dead, so that the
memory of activations is freed as in any forward written by hand.
"""

from __future__ import annotations

import keyword
import math
import operator
import runpy
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, count
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.fx import Node

from ranksearch.deployment.target import Job, Runner, Target
from ranksearch.errors import ExportError
from ranksearch.surgery import count_macs

_LAYERS = {
    "linear": "Linear",
    **{f"conv{n}d": f"Conv{n}d" for n in (1, 2, 3)},
    **{f"conv_transpose{n}d": f"ConvTranspose{n}d" for n in (1, 2, 3)},
}
_INFIX = {operator.add: "+", operator.sub: "-", operator.mul: "*", operator.floordiv: "//"}
_DEFAULTS: Mapping[str, Any] = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1, "output_padding": 0}
_LAST = 2**63 - 1
"""The end of a slice that goes to the end."""

_MODULE = '''"""{title}

Inputs are float32 images (N, {shape}), normalised as the network was trained; outputs are (N, classes).
{facts}
Needs torch alone. `load()` reads the weights from the file {weights} beside this one.
"""

import torch
from torch import nn


class Network(nn.Module):
    """The compressed network, for inference."""

    def __init__(self):
        super().__init__()
{layers}

    def forward(self, x):
{body}


def load(weights=__file__.removesuffix(".py") + ".pt"):
    """The network with its weights, in evaluation mode, on the CPU."""
    network = Network()
    network.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    return network.eval(){layout}
'''


def _write(job: Job, path: Path) -> None:
    if not path.stem.isidentifier() or keyword.iskeyword(path.stem):
        raise ExportError(f"a Python module must have the name of one, found {path.name}. Name it like network.py.")
    writer = _Writer(job.program)
    rank_map = job.rank_map
    macs = count_macs(job.folded.model, rank_map.model.input_shape)
    share = 100 * macs / rank_map.dense_macs
    text = _MODULE.format(
        title=f"{rank_map.model.name}, compressed by ranksearch to {share:.1f} % of its MACs.",
        shape=", ".join(map(str, rank_map.model.input_shape)),
        facts=f"{macs:,} MACs per image.",
        weights=path.with_suffix(".pt").name,
        layers=_indented(writer.members() or ["pass"]),
        body=_indented(writer.body()),
        # Of kernels with three axes torch knows another channels-last, which CPUs do not gain by.
        layout="" if any(x.ndim == 5 for x in writer.tensors.values()) else ".to(memory_format=torch.channels_last)",
    )
    path.write_text(text, encoding="utf-8")
    torch.save(writer.state(), path.with_suffix(".pt"))


def _indented(lines: Sequence[str]) -> str:
    return "\n".join(f"        {line}" for line in lines)


class _Writer:
    """The source of one graph."""

    def __init__(self, program: ExportedProgram) -> None:
        signature = program.graph_signature
        self.nodes = list(program.graph.nodes)
        self.tensors = {k: v for k, v in {**program.state_dict, **program.constants}.items() if isinstance(v, Tensor)}
        """By the names they have in the network."""
        self.held = {
            spec.arg.name: cast(str, spec.target)
            for spec in signature.input_specs
            if spec.kind in (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR)
        }
        """Of the placeholders that are no inputs: the names of their tensors."""
        self.layers: dict[str, str] = {}
        """Name of a layer in the network to the call that makes it."""
        self.calls = {node: made for node in self.nodes if (made := self._layer(node)) is not None}
        """The nodes that a layer computes, and its name."""
        inside = {f"{layer}.{leaf}" for layer, call in self.layers.items() for leaf in _leaves(call)}
        self.loose = sorted(set(self.held.values()) - inside)
        """Tensors that are in none of the layers."""
        self.attributes = _attributes([*self.layers, *self.loose])

    def members(self) -> list[str]:
        """Statements that make the layers, and room for tensors that are in none."""
        made = [f"self.{self.attributes[name]} = {call}" for name, call in self.layers.items()]
        for name in self.loose:
            tensor = self.tensors[name]
            made.append(
                f'self.register_buffer("{self.attributes[name]}", torch.empty({tuple(tensor.shape)}, '
                f"dtype={tensor.dtype}))"
            )
        return made

    def state(self) -> dict[str, Tensor]:
        """The weights, by the names in the module."""
        found = {}
        for name in sorted(set(self.held.values())):
            found[self._place(name)] = self.tensors[name].detach().clone(memory_format=torch.contiguous_format)
        return found

    def body(self) -> list[str]:
        """The statements of ``forward``."""
        last = {operand: i for i, node in enumerate(self.nodes) for operand in node.all_input_nodes}
        names: dict[Node, str] = {}
        lines: list[str] = []
        for i, node in enumerate(self.nodes):
            if node.op == "placeholder" and node.name not in self.held:
                names[node] = "x"
            elif node.op == "call_function":
                expression = self._expression(node, names)
                live = {names[other] for other in names if last.get(other, -1) > i}
                names[node] = next(name for name in _variables() if name not in live)
                lines.append(f"{names[node]} = {expression}" if node in last else expression)
            elif node.op == "output":
                lines.append(f"return {self._value(node.args[0][0], names)}")
        return lines

    def _layer(self, node: Node) -> str | None:
        """The name of the layer that a node runs, which is noted; None where it runs none."""
        kind = _LAYERS.get(_operator(node)) if node.op == "call_function" else None
        if kind is None:
            return None
        given = _given(node)
        weight, bias = given["weight"], given["bias"]
        layer = self._owner(weight, "weight")
        if layer is None or (bias is not None and self._owner(bias, "bias") != layer):
            return None
        call = _constructor(kind, self.tensors[f"{layer}.weight"].shape, given, bias is not None)
        return layer if self.layers.setdefault(layer, call) == call else None

    def _owner(self, node: Any, leaf: str) -> str | None:
        name = self.held.get(node.name, "") if isinstance(node, Node) else ""
        layer, _, found = name.rpartition(".")
        return layer if found == leaf and layer else None

    def _place(self, name: str) -> str:
        """Where the module keeps the tensor of this name in the network."""
        layer, _, leaf = name.rpartition(".")
        return self.attributes[name] if name in self.attributes else f"{self.attributes[layer]}.{leaf}"

    def _expression(self, node: Node, names: Mapping[Node, str]) -> str:
        if node in self.calls:
            return f"self.{self.attributes[self.calls[node]]}({self._value(node.args[0], names)})"
        values = [self._value(value, names) for value in node.args]
        if node.target is operator.getitem:
            return f"{values[0]}[{values[1]}]"
        if node.target in _INFIX:
            return f"{values[0]} {_INFIX[node.target]} {values[1]}"
        target = node.target
        if not isinstance(target, torch._ops.OpOverload) or target.namespace != "aten":
            raise ExportError(
                f"a Python module can hold operators of torch alone, found {target}. Use `--to pt2` or `--to onnx`."
            )
        if _operator(node) == "slice" and (text := _sliced(node, values)):
            return text
        values += [f"{key}={self._value(value, names)}" for key, value in node.kwargs.items()]
        name = _operator(node)
        public = callable(getattr(torch, name, None)) and not name.startswith("_")
        function = f"torch.{name}" if public else f"torch.ops.{target}"
        return f"{function}({', '.join(values)})"

    def _value(self, value: Any, names: Mapping[Node, str]) -> str:
        """An operand as Python writes it."""
        if isinstance(value, Node):
            if value.name not in self.held:
                return names[value]
            return f"self.{self._place(self.held[value.name])}"
        if isinstance(value, list | tuple):
            return "[" + ", ".join(self._value(one, names) for one in value) + "]"
        if isinstance(value, float) and not math.isfinite(value):
            return f'float("{value}")'
        if isinstance(value, torch.device):
            return f'torch.device("{value}")'
        return repr(value)


def _operator(node: Node) -> str:
    """The operator's name without its overload."""
    target = node.target
    return str(target._schema.name).rpartition("::")[2] if isinstance(target, torch._ops.OpOverload) else ""


def _given(node: Node) -> dict[str, Any]:
    """An operator's arguments by name, defaults included."""
    schema = cast(torch._ops.OpOverload, node.target)._schema
    values = dict(zip((argument.name for argument in schema.arguments), node.args, strict=False))
    return {
        argument.name: values.get(argument.name, node.kwargs.get(argument.name, argument.default_value))
        for argument in schema.arguments
    }


def _constructor(kind: str, shape: torch.Size, given: Mapping[str, Any], bias: bool) -> str:
    """The call that makes a layer of ``torch.nn``."""
    groups = int(given.get("groups", 1))
    if kind == "Linear":
        channels: list[Any] = [shape[1], shape[0]]
    elif kind.startswith("ConvTranspose"):
        channels = [shape[0], shape[1] * groups, tuple(shape[2:])]
    else:
        channels = [shape[1] * groups, shape[0], tuple(shape[2:])]
    words = [repr(one) for one in channels]
    for name, default in _DEFAULTS.items():
        value = given.get(name, default)
        value = tuple(value) if isinstance(value, list) else value
        if value != default and not (isinstance(value, tuple) and set(value) == {default}):
            words.append(f"{name}={value!r}")
    return f"nn.{kind}({', '.join(words if bias else [*words, 'bias=False'])})"


def _leaves(call: str) -> tuple[str, ...]:
    """The tensors that a layer made by this call has."""
    return ("weight",) if call.endswith("bias=False)") else ("weight", "bias")


def _sliced(node: Node, values: Sequence[str]) -> str | None:
    """A slice along one axis as Python writes it; None where the axis counts from the end."""
    given = _given(node)
    if given["dim"] < 0:
        return None
    start = "" if given["start"] in (None, 0) else values[2]
    end = "" if given["end"] in (None, _LAST) else values[3]
    step = "" if given["step"] == 1 else f":{values[4]}"
    return f"{values[0]}[{':, ' * given['dim']}{start}:{end}{step}]"


def _attributes(names: Sequence[str]) -> dict[str, str]:
    """Attribute of the module for each name in the network: all different, and none that a module has already."""
    taken: set[str] = set(dir(nn.Module()))
    found: dict[str, str] = {}
    for name in names:
        flat = name.replace(".", "_")
        stem = flat if flat.isidentifier() and not keyword.iskeyword(flat) else f"_{flat}"
        found[name] = next(one for one in chain([stem], (f"{stem}_{i}" for i in count(2))) if one not in taken)
        taken.add(found[name])
    return found


def _variables() -> Iterator[str]:
    return chain("xyzuvw", (f"t{i}" for i in count(1)))


def _read(job: Job, path: Path) -> Runner:
    # Layers draw starting values when they are made; the caller's generator is left as it is.
    with torch.random.fork_rng(devices=[]):
        return cast(Runner, runpy.run_path(str(path), run_name=path.stem)["load"]())


PYTHON = Target(suffix=".py", write=_write, read=_read)
