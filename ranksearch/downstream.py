"""The network from one layer onward: the logits that another output of a layer leads to.

The network is traced into a graph (``torch.fx``). For every layer, the nodes that its output reaches become a graph of
their own, fed with the other output and with the dense activations that they read beside it (skip connections), batch
norms folded into the convolutions before them. A network that cannot be traced, or that overwrites activations it reads
again, is run whole with the output exchanged by a hook: the same numbers, later.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

from ranksearch.errors import ModelError
from ranksearch.surgery import channels_last


@dataclass(frozen=True, kw_only=True, eq=False)
class Pass:
    """What one pass of the dense network over a batch leaves."""

    images: Tensor
    inputs: Mapping[str, Tensor]
    """Of the named layers."""
    outputs: Mapping[str, Tensor]
    """Of the named layers."""
    logits: Tensor
    beside: Mapping[str, tuple[Any, ...]]
    """Layer to the other activations that the network after it reads."""

    def gradients(self, direction: Tensor) -> dict[str, Tensor]:
        """Gradients of ``logits . direction`` with respect to the outputs, after a pass over ``images`` that need it.

        A layer whose output the logits do not depend on gets zeros.
        """
        found = torch.autograd.grad(self.logits, list(self.outputs.values()), direction, materialize_grads=True)
        return dict(zip(self.outputs, found, strict=True))

    def detached(self) -> Pass:
        """The same without the history of gradients."""
        return Pass(
            images=self.images.detach(),
            inputs={name: x.detach() for name, x in self.inputs.items()},
            outputs={name: y.detach() for name, y in self.outputs.items()},
            logits=self.logits.detach(),
            beside={
                name: tuple(v.detach() if isinstance(v, Tensor) else v for v in values)
                for name, values in self.beside.items()
            },
        )


class Downstream(Protocol):
    """A network that can be continued from the output of any of its named layers."""

    def run(self, images: Tensor) -> Pass:
        """The dense pass over a batch ``(N, C, H, W)``."""
        ...

    def onward(self, name: str, output: Tensor, dense: Pass) -> Tensor:
        """The logits where layer ``name`` gives ``output``, which may be overwritten, on the batch of ``dense``."""
        ...


def opened(dense: nn.Module, names: Sequence[str], images: Tensor, dtype: torch.dtype) -> Downstream:
    """``dense``, in evaluation mode and ``dtype``, ready to be continued from the named layers; it is not changed.

    Args:
        dense: the network, in float32.
        names: layers that run once in a forward pass.
        images: a few images, on which the graph is compared with the network itself.
        dtype: of activations and weights.
    """
    whole = Whole(dense, names)
    try:
        traced = Traced(dense, names)
        fits = _agree(traced, whole, names, images)
    except Exception:  # a user's forward may do anything while it is traced, or afterwards
        fits = False
    return traced.to(dtype) if fits else whole.to(dtype)


@torch.no_grad()
def _agree(traced: Traced, whole: Whole, names: Sequence[str], images: Tensor) -> bool:
    """Whether the graph of every layer, given the dense output, leads to the logits of the network itself."""
    logits, dense = whole.run(images).logits, traced.run(images)
    scale = float(logits.abs().max())
    found = [dense.logits, *(traced.onward(name, dense.outputs[name].clone(), dense) for name in names)]
    return all(bool(((x - logits).abs() <= 1e-3 * scale).all()) for x in found)


class Whole:
    """Runs everything, whatever the network; outputs are exchanged by hooks."""

    def __init__(self, dense: nn.Module, names: Sequence[str]) -> None:
        self.network = copy.deepcopy(dense).eval().requires_grad_(False)
        self.names = names

    def to(self, dtype: torch.dtype) -> Whole:
        """Itself, in ``dtype``."""
        channels_last(self.network.to(dtype))
        return self

    def run(self, images: Tensor) -> Pass:
        """See :class:`Downstream`."""
        inputs: dict[str, Tensor] = {}
        outputs: dict[str, Tensor] = {}

        def keep(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
            def hook(module: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> Tensor:
                if name in outputs:
                    raise ModelError(
                        f"a layer whose price is measured must run once in a forward pass, {name} runs more often. "
                        "Leave it dense: layers.exclude."
                    )
                # Copies: what comes after may overwrite an activation in place.
                inputs[name], outputs[name] = given[0].clone(), output
                return output.clone()

            return hook

        handles = [self.network.get_submodule(name).register_forward_hook(keep(name)) for name in self.names]
        try:
            logits = self.network(images)
        finally:
            for handle in handles:
                handle.remove()
        return Pass(images=images, inputs=inputs, outputs=outputs, logits=logits, beside={})

    def onward(self, name: str, output: Tensor, dense: Pass) -> Tensor:
        """See :class:`Downstream`."""
        handle = self.network.get_submodule(name).register_forward_hook(lambda *_: output)
        try:
            return cast(Tensor, self.network(dense.images))
        finally:
            handle.remove()


class Traced:
    """Runs only what the output of a layer reaches; raises whatever tracing raises, ValueError where it cannot be."""

    def __init__(self, dense: nn.Module, names: Sequence[str]) -> None:
        self.root = copy.deepcopy(dense).eval().requires_grad_(False)
        graph = fx.Tracer().trace(self.root)
        _make_functional(self.root, graph)
        nodes = {name: _only_node(graph, name) for name in names}
        logits = next(node for node in graph.nodes if node.op == "output").args[0]
        if not isinstance(logits, fx.Node):
            raise ValueError("the network must return one tensor")
        folded = _fold(self.root, graph)
        self.suffixes: dict[str, nn.Module] = {}
        self.beside: dict[str, list[fx.Node]] = {}
        for name, node in nodes.items():
            suffix, self.beside[name] = _suffix(self.root, graph, node, logits, folded)
            self.suffixes[name] = fx.GraphModule(self.root, suffix)
        self.inputs = {name: node.all_input_nodes[0] for name, node in nodes.items()}
        self.outputs, self.logits = nodes, logits
        # The dense pass gives back all that is read again.
        read = [logits, *self.inputs.values(), *nodes.values(), *(n for group in self.beside.values() for n in group)]
        self.kept = list(dict.fromkeys(read))
        whole = fx.Graph()
        copies: dict[fx.Node, fx.Node] = {}
        whole.graph_copy(graph, copies)
        whole.output(tuple(copies[node] for node in self.kept))
        self.whole = fx.GraphModule(self.root, whole)

    def to(self, dtype: torch.dtype) -> Traced:
        """Itself, in ``dtype``."""
        for module in (self.whole, *self.suffixes.values()):
            channels_last(module.to(dtype))
        return self

    def run(self, images: Tensor) -> Pass:
        """See :class:`Downstream`."""
        values = dict(zip(self.kept, self.whole(images), strict=True))
        return Pass(
            images=images,
            inputs={name: values[node] for name, node in self.inputs.items()},
            outputs={name: values[node] for name, node in self.outputs.items()},
            logits=values[self.logits],
            beside={name: tuple(values[node] for node in group) for name, group in self.beside.items()},
        )

    def onward(self, name: str, output: Tensor, dense: Pass) -> Tensor:
        """See :class:`Downstream`."""
        return cast(Tensor, self.suffixes[name](output, *dense.beside[name]))


def _only_node(graph: fx.Graph, name: str) -> fx.Node:
    """The one node that calls the submodule ``name``."""
    found = [node for node in graph.nodes if node.op == "call_module" and node.target == name]
    if len(found) != 1:
        raise ValueError(f"{name} is called {len(found)} times in the graph")
    return cast(fx.Node, found[0])


_FUNCTIONAL: dict[Any, Any] = {
    operator.iadd: operator.add,
    operator.isub: operator.sub,
    operator.imul: operator.mul,
    operator.itruediv: operator.truediv,
}
_ADD, _RELU = (operator.add, torch.add), (F.relu, torch.relu)
_FRESH = (*_FUNCTIONAL.values(), *_ADD, *_RELU, torch.cat, F.batch_norm)
"""Functions whose value shares memory with no other."""
_FRESH_MODULES = (
    nn.modules.conv._ConvNd,
    nn.modules.batchnorm._NormBase,
    nn.Linear,
    nn.ReLU,
    nn.ReLU6,
    nn.SiLU,
    nn.Hardswish,
)
"""Modules whose output shares memory with nothing."""


def _make_functional(root: nn.Module, graph: fx.Graph) -> None:
    """Replace operations in place by those that are not; ValueError where that would change what is computed."""
    modules = dict(root.named_modules())
    overwriting = {name for name, module in modules.items() if getattr(module, "inplace", False)}
    for node in graph.nodes:
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
        if node.op == "call_module":
            if name not in overwriting:
                continue
            modules[name].inplace = False
        elif node.op == "call_function" and node.kwargs.get("inplace"):
            node.update_kwarg("inplace", False)
        elif node.op == "call_function" and node.target in _FUNCTIONAL:
            node.target = _FUNCTIONAL[node.target]
        elif node.op == "call_function" and name.endswith("_") and not name.endswith("__"):
            node.target = getattr(torch, name[:-1])
        elif node.op == "call_method" and name.endswith("_") and not name.endswith("__"):
            node.target = name[:-1]
        else:
            continue
        changed = node.args[0]
        if not isinstance(changed, fx.Node) or not _spare(changed, modules):
            raise ValueError(f"{node} overwrites an activation that may be read again")


def _fresh(node: fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    """Whether the value of a node shares memory with no other."""
    if node.op == "call_module":
        return isinstance(modules[str(node.target)], _FRESH_MODULES)
    return node.op == "call_function" and node.target in _FRESH


def _spare(node: fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    """Whether the value of a node may be overwritten by the one node that reads it."""
    return len(node.users) == 1 and _fresh(node, modules)


def _is_relu(node: fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    if node.op == "call_module":
        return isinstance(modules[str(node.target)], nn.ReLU)
    return node.op == "call_function" and node.target in _RELU


def _added(spare: Tensor, other: Any) -> Tensor:
    """``spare + other``, in the memory of ``spare`` where it fits."""
    fits = isinstance(other, Tensor) and other.shape == spare.shape and other.dtype == spare.dtype
    return spare.add_(other) if fits else spare + other


def _fold(root: nn.Module, graph: fx.Graph) -> dict[fx.Node, tuple[str, fx.Node]]:
    """Batch norms right after a convolution, to the name of a new submodule that does both, and the convolution."""
    modules = dict(root.named_modules())
    folded: dict[fx.Node, tuple[str, fx.Node]] = {}
    for node in list(graph.nodes):
        before = node.args[0] if node.op == "call_module" and len(node.args) == 1 and not node.kwargs else None
        if not isinstance(before, fx.Node) or before.op != "call_module" or len(before.users) > 1:
            continue
        conv, norm = modules[str(before.target)], modules[str(node.target)]
        plain = type(conv) in (nn.Conv1d, nn.Conv2d, nn.Conv3d) and len(before.args) == 1 and not before.kwargs
        if plain and type(norm) in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d) and norm.track_running_stats:
            name = f"_folded_{len(folded)}"
            root.add_module(name, fuse_conv_bn_eval(cast(nn.Conv2d, conv), cast(nn.BatchNorm2d, norm)))
            folded[node] = (name, before)
    return folded


def _suffix(
    root: nn.Module, graph: fx.Graph, start: fx.Node, logits: fx.Node, folded: Mapping[fx.Node, tuple[str, fx.Node]]
) -> tuple[fx.Graph, list[fx.Node]]:
    """The graph from the value of ``start`` to the logits, and the other nodes whose values it takes after that one."""
    reached = {start}
    for node in graph.nodes:
        if node.op != "output" and any(source in reached for source in node.all_input_nodes):
            reached.add(node)
    wanted = {logits}
    for node in reversed(graph.nodes):
        if node in wanted:
            wanted.update(node.all_input_nodes)
    # A folded convolution is run with its batch norm, unless it is the very layer that is replaced.
    joined = {node: pair for node, pair in folded.items() if pair[1] in reached and pair[1] is not start}
    skipped = {conv for _, conv in joined.values()} | {start}
    order = [node for node in graph.nodes if node in reached and node in wanted and node not in skipped]
    sources = {node: joined[node][1].all_input_nodes if node in joined else node.all_input_nodes for node in order}
    beside = list(dict.fromkeys(s for node in order for s in sources[node] if s not in reached))
    if logits not in reached:
        beside.append(logits)
    made = fx.Graph()
    values = {start: made.placeholder("output_of_layer")}
    values |= {node: made.placeholder(f"beside_{i}") for i, node in enumerate(beside)}
    modules = dict(root.named_modules())
    for node in order:
        # What is made here, and read by nobody else, is overwritten: half the traffic of memory.
        spare = [n for n in node.all_input_nodes if n in reached and n is not start and _spare(n, modules)]
        if node in joined:
            name, conv = joined[node]
            values[node] = made.call_module(name, (values[cast(fx.Node, conv.args[0])],))
        elif spare and _is_relu(node, modules):
            values[node] = made.call_function(torch.relu_, (values[spare[0]],))
        elif spare and node.target in _ADD and len(node.args) == 2 and not node.kwargs:
            other = node.args[1] if node.args[0] is spare[0] else node.args[0]
            values[node] = made.call_function(_added, (values[spare[0]], fx.node.map_arg(other, values.__getitem__)))
        else:
            values[node] = made.node_copy(node, values.__getitem__)
    made.output(values[logits])
    return made, beside
