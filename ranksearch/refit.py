"""Refitting a compressed network without labels: sequential regression, batch-norm recalibration, and the gauge.

Sequential regression (ours): going forward once with all images, the last factor of every compressed layer and its bias
are refitted by ridge regression so that, from the *compressed* network's input, they give the *dense* network's output.
It absorbs the error handed down by earlier layers. One forward pass does all of it: each layer refits itself, by a
hook, in the moment the activations reach it, so any network works, whatever its graph.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import pairwise
from typing import cast

import torch
from torch import Tensor, nn

from ranksearch.calibration import Sample, as_image, patches
from ranksearch.conv import Conv
from ranksearch.decompositions import FORMATS, OwnGauge, Ranks, compressed_stages, regauged, sensitivity
from ranksearch.quantise import balance
from ranksearch.reconstruction import reconstruct
from ranksearch.rounding import rounded, rounded_to_outputs
from ranksearch.stages import TiedConv, geometry, kernel_of, set_kernel
from ranksearch.surgery import evaluating
from ranksearch.table import FLOAT_BITS

Chain = tuple[str, Conv, Ranks]
"""The format of a layer that was replaced, its dense geometry and its ranks."""


@torch.no_grad()
def sequential_regression(
    model: nn.Module,
    names: Iterable[str],
    samples: Mapping[str, Sample],
    images: Tensor,
    *,
    chains: Mapping[str, Chain] | None = None,
    bits: Mapping[str, int] | None = None,
    ridge: float = 1e-4,
) -> None:
    """Refit, in place, the last stage of the named layers of the compressed ``model``.

    With ``bits`` every stage is rounded as the activations reach it, so that what comes after, first of all the
    regression of the layer's last stage, makes up for it.

    Args:
        model: the compressed network; each named layer is a chain that ends in a layer of torch's own, with a bias.
        names: the layers that were replaced.
        samples: the dense network's outputs of these layers on ``images``.
        images: calibration images ``(N, C, *size)``, the ones that the samples were taken on.
        chains: what the layers were replaced by; given, all their stages are fitted first (see ``reconstruction``).
        bits: of the weights of the layers that are to be rounded.
        ridge: pull towards the factor there is, relative to the mean square of the features.
    """
    handles = []
    widths = bits or {}
    for name in names:
        width = widths.get(name, FLOAT_BITS)
        chain = cast(nn.Sequential, model.get_submodule(name))

        def fit(module: nn.Module, inputs: tuple[Tensor, ...], name: str = name, stages: nn.Sequential = chain) -> None:
            form, conv, ranks = cast(Mapping[str, Chain], chains)[name]
            geometries = compressed_stages(FORMATS[form], conv, ranks)
            reconstruct(stages, conv, geometries, inputs[0], samples[name], ridge=ridge)

        def refit(
            module: nn.Module, inputs: tuple[Tensor, ...], sample: Sample = samples[name], bits: int = width
        ) -> None:
            _regress(module, inputs[0], sample, ridge, bits)

        if chains is not None:
            handles.append(chain[0].register_forward_pre_hook(fit))
        for stage, following in pairwise(chain) if width < FLOAT_BITS else ():

            def coarsen(
                module: nn.Module, inputs: tuple[Tensor, ...], following: nn.Module = following, bits: int = width
            ) -> None:
                _round(module, following, inputs[0], bits)

            handles.append(stage.register_forward_pre_hook(coarsen))
        handles.append(chain[-1].register_forward_pre_hook(refit))
    try:
        with evaluating(model):
            model(images)
    finally:
        for handle in handles:
            handle.remove()


def _round(module: nn.Module, following: nn.Module, x: Tensor, bits: int) -> None:
    """Round a stage to its nearest multiples, its channels first balanced against the stage that follows.

    Not to its outputs, as the last stage is: that lost more, since what matters of an inner stage is the space that its
    outputs span, in which the regression still moves.
    """
    if not isinstance(module, TiedConv) and not isinstance(following, TiedConv):
        conv = geometry(module, tuple(x.shape))
        outputs = as_image(module.forward(x), conv)
        balance(module, following, outputs.movedim(1, 0).flatten(1).square().mean(1).sqrt())
    set_kernel(module, rounded(kernel_of(module)[0], bits))


def _regress(module: nn.Module, x: Tensor, sample: Sample, ridge: float, bits: int) -> None:
    """Weights and bias of one stage by ridge regression of ``sample`` on its input ``x``, one regression a group."""
    conv = geometry(module, tuple(x.shape))
    features = patches(as_image(x, conv), conv, sample.pixels.to(x.device))
    targets = sample.outputs.to(device=x.device, dtype=features.dtype).flatten(0, 1)
    weight, _ = kernel_of(module)
    parts = zip(features.chunk(conv.groups, 1), targets.chunk(conv.groups, 1), weight.chunk(conv.groups), strict=True)
    found = [_solve(own.flatten(1), out, kernel, ridge, bits) for own, out, kernel in parts]
    solved = [one for one in found if one is not None]
    if len(solved) == len(found):
        set_kernel(module, torch.cat([kernel for kernel, _ in solved]))
        cast(Tensor, module.bias).copy_(torch.cat([bias for _, bias in solved]))
    elif bits < FLOAT_BITS:
        set_kernel(module, rounded(weight, bits))


def _solve(features: Tensor, targets: Tensor, kernel: Tensor, ridge: float, bits: int) -> tuple[Tensor, Tensor] | None:
    """Kernel and bias of one group; None where the activations are too ill-conditioned to regress on."""
    current = kernel.flatten(1).T.to(features.dtype)
    mean_in, mean_out = features.mean(0), targets.mean(0)
    features = features - mean_in
    gram = (features.T @ features).double()
    cross = (features.T @ (targets - mean_out)).double()
    # The pull keeps directions that the images do not excite (dead channels) where they are.
    pull = ridge * gram.diagonal().mean().clamp_min(1e-12)
    system = gram + pull * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    factor, info = torch.linalg.cholesky_ex(system)
    if int(info) != 0:
        return None
    solution = torch.cholesky_solve(cross + pull * current.double(), factor).to(features.dtype)
    if not bool(torch.isfinite(solution).all()):
        return None
    if bits < FLOAT_BITS:
        solution = rounded_to_outputs(solution.T, gram / len(features), bits).T
    return solution.T.reshape(kernel.shape), mean_out - mean_in @ solution


@torch.no_grad()
def regauge(model: nn.Module, chains: Mapping[str, Chain]) -> None:
    """Bring the named layers to their least sensitive gauge, in place; the network's outputs stay as they are.

    Training drifts along the directions that leave a loop of factors unchanged, and the factors grow (Phan et al. 2022,
    arXiv 2203.02617). Layers whose format has no gauge of its own are left alone.
    """
    for name, (form, conv, _) in chains.items():
        gauge, stages = FORMATS[form], cast(nn.Sequential, model.get_submodule(name))
        if isinstance(gauge, OwnGauge):
            kernels = [kernel_of(stage)[0] for stage in stages]
            for stage, kernel in zip(stages, regauged(gauge, conv, kernels), strict=True):
                set_kernel(stage, kernel)


@torch.no_grad()
def sensitivity_of(model: nn.Module, chains: Mapping[str, Chain]) -> float:
    """Sum over the named layers of the sensitivity of their factors (:func:`ranksearch.decompositions.sensitivity`)."""
    total = 0.0
    for name, (form, conv, ranks) in chains.items():
        kernels = [kernel_of(stage)[0] for stage in cast(nn.Sequential, model.get_submodule(name))]
        total += sensitivity(conv, compressed_stages(FORMATS[form], conv, ranks), kernels)
    return total


@torch.no_grad()
def recalibrate(model: nn.Module, batches: Iterable[Tensor]) -> None:
    """Collect the running statistics of every batch norm afresh over ``batches``, in place; modes are restored."""
    norms = batch_norms(model)
    momenta = [norm.momentum for norm in norms]
    try:
        with evaluating(model):
            for norm in norms:
                norm.reset_running_stats()
                norm.momentum = None  # a cumulative mean over the batches
                norm.train()
            for images in batches:
                model(images)
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum


def batch_norms(model: nn.Module) -> list[nn.modules.batchnorm._BatchNorm]:
    """The batch norms that keep running statistics."""
    return [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
