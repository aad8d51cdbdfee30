"""All factors of a layer fitted to the dense network's outputs, from the compressed network's own inputs.

Asymmetric reconstruction (X. Zhang, J. Zou, K. He, J. Sun, "Accelerating Very Deep Convolutional Networks for
Classification and Detection", 2016, section 3.3, for one factor after another and one format), for all factors of any
format at once (ours): with G the second moment of the compressed network's input patches and C their correlation with
the dense outputs, both about their means, the squared error of a chain whose kernels compose to the matrix W is

    tr(W G W') - 2 tr(W C) + const = ||(W - W*) L||^2 + const,   G = L L',  W* = C' G^-1,

a function of small matrices, whatever the number of images. L-BFGS goes down it from the factors that there are, each
scaled to norm 1, so that their gauge hardly moves.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from ranksearch.calibration import Sample, as_image, patches
from ranksearch.conv import Conv
from ranksearch.stages import composed, kernel_of, set_kernel

LARGEST = 2400
"""Values of an input patch at most: of larger ones G takes longer than all the rest of the evaluation."""
STEPS = 20
PATCHES, PATCHES_A_VALUE = 8192, 8
"""Patches that the moments are taken of: no more than these, or so many for each value of a patch."""
_CHUNK_VALUES = 2**24
"""Values of the patches that are held at a time."""


@torch.no_grad()
def reconstruct(
    chain: nn.Sequential, conv: Conv, stages: Sequence[Conv], x: Tensor, sample: Sample, *, ridge: float
) -> float:
    """Fit all kernels of ``chain`` in place; the bias is left to who fits the last stage.

    Args:
        chain: the modules of one compressed layer.
        conv: geometry of the dense layer.
        stages: geometries of the modules.
        x: the compressed network's input of the layer, all images.
        sample: the dense network's outputs of the layer on the same images.
        ridge: pull towards the kernel there is, relative to the mean square of the input patches.

    Returns:
        what is left of the error that could be taken away, 0 to 1.

    A layer with patches of over :data:`LARGEST` values is left as it is, and so is one whose moments are not positive
    definite or whose fit is not finite.
    """
    if conv.in_channels * prod(conv.kernel) > LARGEST:
        return 1.0
    gram, cross = _moments(as_image(x, conv), conv, sample)
    kernels = [kernel_of(stage)[0] for stage in chain]
    start = composed(stages, kernels).flatten(1)
    pull = ridge * gram.diagonal().mean().clamp_min(1e-12)
    gram.diagonal().add_(pull)
    root, info = torch.linalg.cholesky_ex(gram)
    if int(info) != 0:
        return 1.0
    best = torch.cholesky_solve(cross + pull * start.T, root).T
    whole = float(((start - best) @ root).square().sum())
    if not whole > 0:
        return 1.0
    scale = float((best @ root).square().sum())
    found = _descended(kernels, stages, gram, best, scale)
    left = float(((composed(stages, found).flatten(1) - best) @ root).square().sum())
    if not all(bool(torch.isfinite(kernel).all()) for kernel in found) or not left < whole:
        return 1.0
    for module, kernel in zip(chain, found, strict=True):
        set_kernel(module, kernel.to(kernel_of(module)[0].dtype))
    return left / whole


def _moments(x: Tensor, conv: Conv, sample: Sample) -> tuple[Tensor, Tensor]:
    """``(K, K)`` and ``(K, T)``, float64: second moments of the patches, and with the outputs, about the means."""
    values = conv.in_channels * prod(conv.kernel)
    enough = max(PATCHES, PATCHES_A_VALUE * values)
    every = max(1, len(x) * len(sample.pixels) // enough)
    pixels, outputs = sample.pixels[::every].to(x.device), sample.outputs[:, ::every].to(x.device)
    step = max(1, _CHUNK_VALUES // (values * len(pixels)))
    gram, cross = x.new_zeros(values, values, dtype=torch.float64), x.new_zeros(values, outputs.shape[-1]).double()
    seen, told, count = x.new_zeros(values).double(), x.new_zeros(outputs.shape[-1]).double(), 0
    # About the first patch: about zero, a large mean would take the moments' digits.
    origin = patches(x[:1], conv, pixels)[:1]
    zero = outputs[0, 0]
    for start in range(0, len(x), step):
        # Pixel by pixel of the kernel, each with all its channels, as they lie in memory.
        own = (patches(x[start : start + step], conv, pixels) - origin).transpose(1, 2).flatten(1)
        out = outputs[start : start + step].to(own.dtype).flatten(0, 1) - zero
        gram += own.T @ own
        cross += own.T @ out
        seen += own.sum(0)
        told += out.sum(0)
        count += len(own)
    order = torch.arange(values, device=x.device).reshape(-1, conv.in_channels).T.flatten()
    gram = gram / count - torch.outer(seen, seen) / count**2
    cross = cross / count - torch.outer(seen, told) / count**2
    return gram[order][:, order], cross[order]


def _descended(
    kernels: Sequence[Tensor], stages: Sequence[Conv], gram: Tensor, best: Tensor, scale: float
) -> list[Tensor]:
    """The kernels after L-BFGS, in single precision: they need no more digits than they are stored with."""
    norms = [kernel.norm().clamp_min(1e-12) for kernel in kernels]
    free = [(k / n).contiguous().requires_grad_(True) for k, n in zip(kernels, norms, strict=True)]
    optimiser: Any = torch.optim.LBFGS(free, max_iter=STEPS, history_size=10, line_search_fn="strong_wolfe")
    gram, best = (gram / scale).float(), best.float()

    def closure() -> Tensor:
        whole = composed(stages, [k * n for k, n in zip(free, norms, strict=True)], torch.float32)
        with torch.no_grad():
            apart = whole.flatten(1) - best
            slope = apart @ gram
        gradients = torch.autograd.grad(whole, free, (2 * slope).reshape(whole.shape))
        for kernel, gradient in zip(free, gradients, strict=True):
            kernel.grad = gradient.contiguous()
        return (apart * slope).sum()

    with torch.enable_grad():
        optimiser.step(closure)
    return [kernel.detach() * norm for kernel, norm in zip(free, norms, strict=True)]
