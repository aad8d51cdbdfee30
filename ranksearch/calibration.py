"""What calibration images show of the dense network: second moments and means of every layer, and its outputs.

Everything is gathered in one pass by forward hooks; sums are kept in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from ranksearch.conv import Conv
from ranksearch.decompositions import Statistics
from ranksearch.errors import DataError
from ranksearch.stages import padded
from ranksearch.surgery import evaluating


@torch.no_grad()
def collect(model: nn.Module, convs: Mapping[str, Conv], batches: Iterable[Tensor]) -> dict[str, Statistics]:
    """Statistics of the named layers over ``batches`` of images ``(N, C, *size)``.

    Raises:
        DataError: no images, or activations that are not finite.
    """
    sums = {name: _Sums(conv) for name, conv in convs.items()}
    handles = [
        model.get_submodule(name).register_forward_hook(lambda _, inputs, output, s=s: s.add(inputs[0], output))
        for name, s in sums.items()
    ]
    try:
        with evaluating(model):
            for images in batches:
                model(images)
    finally:
        for handle in handles:
            handle.remove()
    return {name: s.statistics(name) for name, s in sums.items()}


class _Sums:
    """Running sums of one layer."""

    def __init__(self, conv: Conv) -> None:
        self.conv = conv
        self.images = 0
        self.origin: Tensor | None = None
        self.inputs: Tensor | float = 0.0
        self.patch: Tensor | float = 0.0
        self.mean: Tensor | float = 0.0
        self.products: Tensor | float = 0.0

    def add(self, x: Tensor, y: Tensor) -> None:
        """Inputs and outputs of one batch; per-image means keep the sums of moderate size.

        Outputs are summed about one of them: about zero, a large mean would take the covariance's digits.
        """
        n = x.shape[0]
        x, y = as_image(x, self.conv), as_image(y, self.conv)
        rows, outputs = x.movedim(1, -1).flatten(0, -2), y.movedim(1, -1).flatten(0, -2)
        if self.origin is None:
            self.origin = outputs[0].clone()
        outputs = outputs - self.origin
        self.images += n
        # No format of 1x1 kernels reads the input moment, and that of a wide linear layer takes gigabytes.
        seen = rows[:, :0] if self.conv.pointwise else rows
        self.inputs = self.inputs + (seen.T @ seen).double() / (rows.shape[0] / n)
        self.products = self.products + (outputs.T @ outputs).double() / (outputs.shape[0] / n)
        self.mean = self.mean + outputs.mean(0, dtype=torch.float64) * n
        self.patch = self.patch + patch_means(x, self.conv).double() * n

    def statistics(self, name: str) -> Statistics:
        """The means."""
        if self.origin is None:
            raise DataError("calibration needs at least one image, found none. Check data.train.")
        n = self.images
        mean = torch.as_tensor(self.mean) / n  # of the outputs less their origin
        found = Statistics(
            input_moment=torch.as_tensor(self.inputs) / n,
            patch_mean=torch.as_tensor(self.patch) / n,
            output_mean=self.origin.double() + mean,
            output_covariance=torch.as_tensor(self.products) / n - torch.outer(mean, mean),
        )
        if not bool(torch.isfinite(found.output_covariance).all() and torch.isfinite(found.input_moment).all()):
            raise DataError(
                f"activations must be finite, those of {name} are not. Check the weights and the normalisation."
            )
        return found


def as_image(x: Tensor, conv: Conv) -> Tensor:
    """Activations of a linear layer ``(N, ..., S)`` as ``(N, S, P, 1)``; those of a convolution as they are."""
    return x.reshape(x.shape[0], -1, x.shape[-1]).transpose(1, 2)[..., None] if conv.linear else x


def taps(x: Tensor, conv: Conv) -> Iterator[Tensor]:
    """For every kernel element, in row-major order: the input pixels ``(N, S, *output)`` that it meets.

    Those of a transposed convolution with the zeros between them: each output pixel meets few.
    """
    x = padded(x, conv)
    for element in product(*map(range, conv.kernel)):
        window: list[Any] = [...]
        axes = zip(element, conv.kernel, conv.dilation, conv.stride, conv.output_size, strict=True)
        for i, size, dilation, stride, pixels in axes:
            start, step = ((size - 1 - i) * dilation, 1) if conv.transposed else (i * dilation, stride)
            window.append(slice(start, start + (pixels - 1) * step + 1, step))
        yield x[tuple(window)]


def patches(x: Tensor, conv: Conv, pixels: Tensor) -> Tensor:
    """Patches ``(N P, S, *kernel)``, the kernel flat, under the kernel at the given output pixels."""
    places: list[Any] = [slice(None), *torch.unravel_index(pixels, conv.output_size)]
    # Channels-last, a tap is rows of channels: picking pixels copies only those picked, and rows stay rows.
    found = [tap.movedim(1, -1)[tuple(places)] for tap in taps(x, conv)]
    return torch.stack(found, dim=2).flatten(0, 1).transpose(1, 2).float()


def patch_means(x: Tensor, conv: Conv) -> Tensor:
    """Mean patch ``(S, *kernel)`` under the kernel, over images and output pixels."""
    pixels = (0, *range(2, x.ndim))
    return torch.stack([tap.mean(pixels) for tap in taps(x, conv)], -1).reshape(-1, *conv.kernel)


@dataclass(frozen=True, kw_only=True, eq=False)
class Sample:
    """The dense network's outputs of one layer at a few output pixels of every calibration image."""

    pixels: Tensor
    """``(P,)`` int64: row-major indices of the output pixels."""
    outputs: Tensor
    """``(N, P, T)`` float32."""


@torch.no_grad()
def sample_outputs(
    model: nn.Module, convs: Mapping[str, Conv], batches: Iterable[Tensor], *, pixels: int, seed: int
) -> dict[str, Sample]:
    """Outputs of the named layers at ``pixels`` random output pixels (all where there are fewer)."""
    generator = torch.Generator().manual_seed(seed)
    chosen: dict[str, Tensor] = {}
    for name, conv in convs.items():
        chosen[name] = torch.randperm(prod(conv.output_size), generator=generator)[:pixels].sort().values
    parts: dict[str, list[Tensor]] = {name: [] for name in convs}

    def keep(name: str, conv: Conv) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            rows = as_image(output, conv).movedim(1, -1).flatten(1, -2)
            parts[name].append(rows[:, chosen[name].to(rows.device)].float().contiguous())

        return hook

    handles = [model.get_submodule(name).register_forward_hook(keep(name, conv)) for name, conv in convs.items()]
    try:
        with evaluating(model):
            for images in batches:
                model(images)
    finally:
        for handle in handles:
            handle.remove()
    return {name: Sample(pixels=chosen[name], outputs=torch.cat(parts[name])) for name in convs}
