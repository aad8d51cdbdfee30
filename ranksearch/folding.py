"""A network made quick for inference, its function unchanged: batch norm folded, 1x1 neighbours merged, channels-last.

Folding (Jacob et al. 2018, arXiv 1712.05877, section 3.2) scales the kernel before a batch norm by gamma / sigma.
Merging multiplies two 1x1 kernels with nothing between them where the product has fewer MACs than both: factors of one
layer, or the last of one and the first of the next. Who is whose neighbour is seen in one forward pass at the level of
torch's operators, so that any network works, whatever its Python.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ranksearch.conv import Conv
from ranksearch.stages import build_stage, kernel_of
from ranksearch.surgery import Layer, Shape, channels_last, find_layers, replaced, run_one


@dataclass(frozen=True, kw_only=True, eq=False)
class Folded:
    """A network made quick, and what was done to it."""

    model: nn.Module
    """In evaluation mode; for inference only, as its batch norms are gone."""
    norms: int
    """Batch norms that were folded into the convolution or linear layer before them."""
    merged: int
    """1x1 convolutions or linear layers that were merged into the one before them."""


def folded(model: nn.Module, input_shape: Shape, *, merge: bool = True) -> Folded:
    """A copy of ``model`` that computes the same in evaluation mode, up to rounding, with less work.

    Args:
        model: a network; it is untouched.
        input_shape: of one image.
        merge: whether 1x1 neighbours are merged, too. The product of two kernels of few bits is none of few bits.

    Raises:
        ModelError: the network does not run on inputs of ``input_shape``.
    """
    quick, norms = _norms_folded(replaced(model, {}).eval(), input_shape)
    merged = 0
    while merge and (pair := _cheapest_merge(quick, input_shape)) is not None:
        first, second, module = pair
        quick = replaced(quick, {first: module, second: nn.Identity()})
        merged += 1
    return Folded(model=channels_last(quick), norms=norms, merged=merged)


def _norms_folded(model: nn.Module, input_shape: Shape) -> tuple[nn.Module, int]:
    layers = {layer.name: layer for layer in find_layers(model, input_shape)}
    modules: dict[str, nn.Module] = {}
    for first, second in neighbours(model, input_shape):
        norm = model.get_submodule(second)
        if first not in layers or not isinstance(norm, nn.modules.batchnorm._BatchNorm) or not _foldable(norm):
            continue
        conv = layers[first].conv
        # A batch norm over a linear layer's positions has them as its channels, not the layer's outputs.
        if norm.num_features != conv.out_channels or (conv.linear and conv.size != (1, 1)):
            continue
        modules[first] = _with_norm(model.get_submodule(first), conv, norm)
        modules[second] = nn.Identity()
    return replaced(model, modules), len(modules) // 2


def _foldable(norm: nn.modules.batchnorm._BatchNorm) -> bool:
    """Whether it has running statistics, and computes what torch's batch norm does."""
    return norm.running_mean is not None and type(norm).forward is nn.modules.batchnorm._BatchNorm.forward


def _with_norm(module: nn.Module, conv: Conv, norm: nn.modules.batchnorm._BatchNorm) -> nn.Module:
    """The layer followed by the batch norm, as one layer; reckoned in float64."""
    kernel, bias = kernel_of(module)
    mean, variance = cast(Tensor, norm.running_mean).double(), cast(Tensor, norm.running_var).double()
    scale = (variance + norm.eps).rsqrt()
    if norm.affine:
        scale = scale * norm.weight.detach().double()
    shift = -mean * scale
    if norm.affine:
        shift = shift + norm.bias.detach().double()
    if bias is not None:
        shift = shift + bias.double() * scale
    scaled = kernel.double() * scale.reshape(-1, *[1] * (kernel.ndim - 1))
    return _stage(conv, scaled, shift, like=kernel)


def _cheapest_merge(model: nn.Module, input_shape: Shape) -> tuple[str, str, nn.Module] | None:
    """The two neighbours whose merging saves most MACs, and what they become; None where none saves any."""
    layers = {layer.name: layer for layer in find_layers(model, input_shape)}
    best: tuple[int, str, str, Conv] | None = None
    for first, second in neighbours(model, input_shape):
        if first in layers and second in layers and (conv := _product(layers[first], layers[second])) is not None:
            saved = layers[first].conv.macs + layers[second].conv.macs - conv.macs
            if saved > 0 and (best is None or saved > best[0]):
                best = saved, first, second, conv
    if best is None:
        return None
    _, first, second, conv = best
    (one, bias), (two, shift) = kernel_of(model.get_submodule(first)), kernel_of(model.get_submodule(second))
    matrix = two.double().flatten(1)
    offset = None if shift is None else shift.double()
    if bias is not None:
        carried = matrix @ bias.double()
        offset = carried if offset is None else offset + carried
    return first, second, _stage(conv, matrix @ one.double().flatten(1), offset, like=one)


def _product(first: Layer, second: Layer) -> Conv | None:
    """The geometry of two layers as one 1x1 layer; None where they are none."""
    one, two = first.conv, second.conv
    plain = all(
        conv.pointwise and conv.groups == 1 and not conv.transposed and not any(conv.padding) for conv in (one, two)
    )
    if not plain or one.linear != two.linear or one.ndim != two.ndim:
        return None
    stride = tuple(a * b for a, b in zip(one.stride, two.stride, strict=True))
    return one.resized(out_channels=two.out_channels, stride=stride, padding_same=False)


def _stage(conv: Conv, kernel: Tensor, bias: Tensor | None, *, like: Tensor) -> nn.Module:
    made = conv.resized(bias=bias is not None)
    return build_stage(made, kernel.to(like.dtype), None if bias is None else bias.to(like.dtype)).eval()


def neighbours(model: nn.Module, input_shape: Shape) -> list[tuple[str, str]]:
    """Pairs of innermost modules, each called once, of which the second takes just what the first gives.

    Nothing else takes it: no operator, no other module, and it is no output of the network.

    Raises:
        ModelError: the network does not run on inputs of ``input_shape``.
    """
    seen = _Flow()
    with _recorded(model, seen), seen:
        seen.taken(run_one(model, input_shape))
    calls = Counter(name for name, _, _ in seen.modules)
    givers: dict[int, str] = {}
    for name, taken, given in seen.modules:
        if given is not taken:  # what hands its input through, such as Identity, gives nothing of its own
            givers[id(given)] = name
    return [
        (givers[id(taken)], name)
        for name, taken, _ in seen.modules
        if id(taken) in givers and seen.uses[id(taken)] == 1 and calls[name] == calls[givers[id(taken)]] == 1
    ]


class _Flow(TorchDispatchMode):
    """Counts how many operators take each tensor, and keeps what went into and came out of modules."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.uses: Counter[int] = Counter()
        self.kept: list[Tensor] = []
        """Every tensor that was taken: an id names its tensor only as long as that lives."""
        self.modules: list[tuple[str, Tensor, Tensor]] = []

    def taken(self, values: Any) -> None:
        """Count the tensors among ``values`` as taken once more."""
        for tensor in tree_leaves(values):
            if isinstance(tensor, Tensor):
                self.uses[id(tensor)] += 1
                self.kept.append(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.taken((args, kwargs or {}))
        return func(*args, **(kwargs or {}))


@contextmanager
def _recorded(model: nn.Module, seen: _Flow) -> Iterator[None]:
    """Calls of innermost modules with one tensor in and one out are kept in ``seen``."""
    handles = []
    for name, module in model.named_modules():
        if next(module.children(), None) is None:

            def record(_: nn.Module, args: tuple[Any, ...], output: Any, name: str = name) -> None:
                if len(args) == 1 and isinstance(args[0], Tensor) and isinstance(output, Tensor):
                    seen.modules.append((name, args[0], output))

            handles.append(module.register_forward_hook(record))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
