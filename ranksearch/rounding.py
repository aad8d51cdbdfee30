"""Weights and activations of few bits: kernels rounded to whole multiples of a scale, and their simulation.

Weights are symmetric, with one scale for each output channel; activations have one range for each tensor, symmetric
between the factors of a layer, where nothing makes them positive. Folding a batch norm into a kernel multiplies its
output channels, so that a rounded kernel stays one. A kernel is rounded to its nearest multiples, or to its outputs:
one input after another, each error made up for by the inputs that are still to come (E. Frantar et al., "GPTQ", 2022,
arXiv 2210.17323, algorithm 1), which is a regression whose solution is whole multiples. Rounding itself, and the
gradient that it lets through, are PyTorch's ``fake_quantize``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ranksearch.stages import PLAIN, TRANSPOSED, TiedConv, evaluating, kernel_of, set_kernel, turned, turned_groups
from ranksearch.table import FLOAT_BITS

Clip = Literal["mse", "percentile"]

_KINDS = (nn.Linear, TiedConv, *PLAIN.values(), *TRANSPOSED.values())
_SHARES = tuple(1 - i / 80 for i in range(41))
"""Clips of a range that are tried, from all of it to half of it."""
_OUTERMOST = 1e-4
"""Share of the values that the percentile leaves out, half at each end."""
_SAMPLE = 2**16
"""Values of an activation that its range is found on."""
_OFF_GRID = 1e-3
"""Steps that a multiple may lie beside a whole number: far above the last digits, far below one part in 127."""
_DAMPING = 0.01
"""Added to the diagonal of the second moments, relative to its mean, as in GPTQ."""


def rounded(kernel: Tensor, bits: int) -> Tensor:
    """``kernel`` ``(T, ...)`` with each output channel rounded at its scale of least squared error; itself at 32 bits.

    Rounding what is rounded already changes nothing but the last digits.
    """
    if bits == FLOAT_BITS:
        return kernel
    return _rounded_at(kernel, scales(kernel, bits), bits)


def scales(kernel: Tensor, bits: int) -> Tensor:
    """``(T,)``, float32: the step of each output channel, of least squared error among clips of its range."""
    rows, whole = kernel.detach().flatten(1).float(), _whole(kernel, bits)
    best: Tensor = whole
    least = torch.full_like(whole, torch.inf)
    for share in _SHARES:  # of equal errors the unclipped range is kept
        error = (_rounded_at(rows, share * whole, bits) - rows).square().sum(1)
        best, least = torch.where(error < least, share * whole, best), torch.minimum(error, least)
    return best


def _whole(kernel: Tensor, bits: int) -> Tensor:
    """The steps with which nothing is clipped."""
    largest, tiny = 2 ** (bits - 1) - 1, torch.finfo(torch.float32).tiny * 1e6
    found: Tensor = kernel.detach().flatten(1).float().abs().amax(1).clamp_min(tiny) / largest
    return found


def _rounded_at(kernel: Tensor, scale: Tensor, bits: int) -> Tensor:
    largest, zero = 2 ** (bits - 1) - 1, torch.zeros_like(scale, dtype=torch.int32)
    return torch.fake_quantize_per_channel_affine(kernel, scale, zero, 0, -largest, largest)


def whole_numbers(kernel: Tensor, bits: int) -> tuple[Tensor, Tensor] | None:
    """What a rounded kernel ``(T, ...)`` is made of, up to the last digits: of each channel the coarsest step there is.

    Returns:
        the whole numbers, int8 ``(T, ...)``, and the steps, float32 ``(T,)``, whose products the kernel is; None where
        a channel is no whole multiples of one step.
    """
    rows = kernel.detach().flatten(1).double()
    top = rows.abs().amax(1, keepdim=True)
    alive = top > 0
    shares = rows / torch.where(alive, top, 1)
    most = torch.where(alive, 0, 1)
    for count in range(2 ** (bits - 1) - 1, 0, -1):  # the largest weight is one of the multiples
        fits = ((shares * count).round() - shares * count).abs().amax(1, keepdim=True) < _OFF_GRID
        most = torch.where(fits & alive, count, most)
    if not bool((most > 0).all()):
        return None
    whole = (shares * most).round()
    # The step of least squares: last digits that every weight has lost alone cancel out.
    step = (rows * whole).sum(1) / whole.square().sum(1).clamp_min(1)
    step = torch.where(alive[:, 0], step, 1).float().clamp_min(torch.finfo(torch.float32).tiny)
    return whole.to(torch.int8).reshape(kernel.shape), step


def rounded_to_outputs(kernel: Tensor, moments: Tensor, bits: int) -> Tensor:
    """``kernel`` ``(T, S)`` rounded so that its outputs change little (GPTQ, algorithm 1); no row more than nearest.

    Args:
        kernel: one row an output channel.
        moments: ``(S, S)``, float64: second moments of the inputs.
        bits: of each weight.

    Where the moments cannot be factorised, the nearest multiples.
    """
    moments = moments + _DAMPING * moments.diagonal().mean().clamp_min(1e-12) * torch.eye(len(moments)).to(moments)
    # Inputs of much variance first: those after make up for them.
    order = torch.argsort(moments.diagonal(), descending=True, stable=True)
    best = rounded(kernel, bits)
    factor, failed = torch.linalg.cholesky_ex(moments[order][:, order])
    if int(failed):
        return best
    upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(factor), upper=True)
    if int(failed):
        return best
    least = _lost(best, kernel, moments)
    # Clipped, a channel has less room to make up for others' errors: its whole range is tried, too.
    for step in (scales(kernel, bits), _whole(kernel, bits)):
        found = _descending(kernel[:, order].double(), upper, step.double(), bits)[:, torch.argsort(order)]
        found = found.to(kernel.dtype)
        lost = _lost(found, kernel, moments)
        best, least = torch.where((lost < least)[:, None], found, best), torch.minimum(lost, least)
    return best


def _lost(found: Tensor, kernel: Tensor, moments: Tensor) -> Tensor:
    """Mean squared change of every output; not a number where the rounding is none."""
    apart = (found - kernel).double()
    return ((apart @ moments) * apart).sum(1)


def _descending(rest: Tensor, upper: Tensor, step: Tensor, bits: int) -> Tensor:
    """One column after another rounded, those to the right changed to make up for it."""
    largest, found = 2 ** (bits - 1) - 1, torch.empty_like(rest)
    for i in range(rest.shape[1]):
        found[:, i] = step * (rest[:, i] / step).round().clamp(-largest, largest)
        rest[:, i + 1 :] -= torch.outer((rest[:, i] - found[:, i]) / upper[i, i], upper[i, i + 1 :])
    return found


def widths_of(model: nn.Module, layers: Mapping[str, int], other: int) -> dict[str, int]:
    """Name to bits of every convolution and linear layer of ``model``.

    Args:
        model: a compressed network.
        layers: bits of the layers that are chains of stages; a chain's stages all have them.
        other: bits of all others.
    """
    names = [name for name, module in model.named_modules() if isinstance(module, _KINDS)]
    return {name: layers.get(name.rpartition(".")[0], other) for name in names}


@torch.no_grad()
def round_weights(model: nn.Module, widths: Mapping[str, int]) -> None:
    """Round the kernels of the named modules in place, each to its nearest multiples."""
    for name, bits in widths.items():
        module = model.get_submodule(name)
        set_kernel(module, rounded(kernel_of(module)[0], bits))


def weight_bytes(model: nn.Module, widths: Mapping[str, int]) -> int:
    """Bytes of all numbers of ``model``: of named modules weights of few bits and float32 scales, the rest float32."""
    total = sum(4 * p.numel() for p in model.parameters())
    for name, bits in widths.items():
        weight = cast(Tensor, model.get_submodule(name).weight)
        if bits < FLOAT_BITS:
            total += -(-weight.numel() * bits // 8) + 4 * len(weight) - 4 * weight.numel()
    return total


@dataclass(frozen=True, kw_only=True)
class Range:
    """Where the values of one activation lie."""

    scale: float
    zero_point: int
    """From 0 to 255."""

    def __call__(self, x: Tensor) -> Tensor:
        """``x`` rounded to eight bits; gradients pass where it is not clipped."""
        return torch.fake_quantize_per_tensor_affine(x, self.scale, self.zero_point, 0, 255)


def range_of(x: Tensor, clip: Clip, *, symmetric: bool = False) -> Range:
    """The range of eight bits for values like those of ``x``; of values of both signs zero is a multiple, too.

    Args:
        x: the values.
        clip: which of them may lie outside.
        symmetric: as far below zero as above it: 255 values, the zero point is 128.
    """
    values = x.detach().float().flatten()
    low, high = min(0.0, float(values.min())), max(0.0, float(values.max()))
    sample = values[:: max(1, len(values) // _SAMPLE)]
    made = _symmetric if symmetric else _range
    if clip == "percentile":
        ends = torch.quantile(sample, torch.tensor([_OUTERMOST / 2, 1 - _OUTERMOST / 2]).to(sample))
        return made(min(0.0, float(ends[0])), max(0.0, float(ends[1])))
    tried = [made(share * low, share * high) for share in _SHARES]
    errors = [float((each(sample) - sample).square().sum()) for each in tried]
    return tried[min(range(len(tried)), key=errors.__getitem__)]


def _range(low: float, high: float) -> Range:
    scale = max((high - low) / 255, 1e-30)
    return Range(scale=scale, zero_point=min(255, max(0, round(-low / scale))))


def _symmetric(low: float, high: float) -> Range:
    return Range(scale=max(high, -low, 1e-30) / 127, zero_point=128)


def _between_factors(model: nn.Module, name: str) -> bool:
    """Whether a convolution or linear layer takes what another one gives, with nothing between."""
    above, _, own = name.rpartition(".")
    row = model.get_submodule(above) if above else model
    if not isinstance(row, nn.Sequential):
        return False
    # A module that stands in more than one place, such as one ReLU for all, counts in each.
    names = [each for each, _ in row.named_modules(remove_duplicate=False) if each and "." not in each]
    place = names.index(own)
    return place > 0 and isinstance(row.get_submodule(names[place - 1]), _KINDS)


@torch.no_grad()
def ranges(model: nn.Module, names: Iterable[str], images: Tensor, clip: Clip) -> dict[str, Range]:
    """The ranges of what goes into the named modules, on calibration images ``(N, C, *size)``; modes are restored.

    Between the factors of a layer they are symmetric.
    """
    found: dict[str, Range] = {}
    names = list(names)
    between = {name for name in names if _between_factors(model, name)}

    def look(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            found[name] = range_of(inputs[0], clip, symmetric=name in between)

        return hook

    handles = [model.get_submodule(name).register_forward_pre_hook(look(name)) for name in names]
    try:
        with evaluating(model):
            model(images)
    finally:
        for handle in handles:
            handle.remove()
    return found


@contextmanager
def rounding_activations(model: nn.Module, known: Mapping[str, Range]) -> Iterator[None]:
    """Meanwhile what goes into the named modules is rounded to eight bits."""

    def hook(each: Range) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...]]:
        return lambda module, inputs: (each(inputs[0]), *inputs[1:])

    handles = [model.get_submodule(name).register_forward_pre_hook(hook(each)) for name, each in known.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Rounded(nn.Module):
    """A weight as its nearest multiples of steps that stay as they were, where training begins."""

    def __init__(self, module: nn.Module, bits: int) -> None:
        super().__init__()
        self.bits, self.groups = bits, turned_groups(module)
        self.scale: Tensor
        self.register_buffer("scale", scales(self._kernel(cast(Tensor, module.weight)), bits), persistent=False)

    def _kernel(self, weight: Tensor) -> Tensor:
        return turned(weight, self.groups) if self.groups else weight

    def forward(self, weight: Tensor) -> Tensor:
        """The rounded weight, as PyTorch stores it."""
        return self._kernel(_rounded_at(self._kernel(weight), self.scale, self.bits))


def round_while_training(model: nn.Module, widths: Mapping[str, int]) -> None:
    """Let the named modules compute with rounded weights, while training moves what is rounded.

    Gradients pass straight through (Y. Bengio et al. 2013, arXiv 1308.3432), as deep as :func:`round_for_good`.
    """
    for name, bits in widths.items():
        if bits < FLOAT_BITS:
            module = model.get_submodule(name)
            parametrize.register_parametrization(module, "weight", _Rounded(module, bits))


def round_for_good(model: nn.Module) -> None:
    """Leave the rounded weights of :func:`round_while_training` as the modules' own."""
    for module in model.modules():
        if parametrize.is_parametrized(module, "weight"):
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)
