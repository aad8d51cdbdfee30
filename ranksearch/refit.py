"""Refitting a compressed network without labels: sequential regression, and batch-norm recalibration.

Sequential regression (ours): going forward once with all images, the last factor of every compressed layer and its bias
are refitted by ridge regression so that, from the *compressed* network's input, they give the *dense* network's output.
It absorbs the error handed down by earlier layers. One forward pass does all of it: each layer refits itself, by a
hook, in the moment the activations reach it, so any network works, whatever its graph.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import cast

import torch
from torch import Tensor, nn

from ranksearch.calibration import Sample, as_image, taps
from ranksearch.conv import Conv
from ranksearch.surgery import evaluating, geometry


@torch.no_grad()
def sequential_regression(
    model: nn.Module, names: Iterable[str], samples: Mapping[str, Sample], images: Tensor, *, ridge: float = 1e-4
) -> None:
    """Refit, in place, the last stage of the named layers of the compressed ``model``.

    Args:
        model: the compressed network; each named layer is a chain of stages whose last one has a bias.
        names: the layers that were replaced.
        samples: the dense network's outputs of these layers on ``images``.
        images: calibration images ``(N, C, H, W)``, the ones that the samples were taken on.
        ridge: pull towards the factor there is, relative to the mean square of the features.
    """
    handles = []
    for name in names:
        last = cast(nn.Sequential, model.get_submodule(name))[-1]

        def refit(module: nn.Module, inputs: tuple[Tensor, ...], sample: Sample = samples[name]) -> None:
            _regress(module, inputs[0], sample, ridge)

        handles.append(last.register_forward_pre_hook(refit))
    try:
        with evaluating(model):
            model(images)
    finally:
        for handle in handles:
            handle.remove()


def _regress(module: nn.Module, x: Tensor, sample: Sample, ridge: float) -> None:
    """Weights and bias of one stage by ridge regression of ``sample`` on its input ``x``."""
    conv = geometry(module, tuple(x.shape))
    features = _features(as_image(x, conv), conv, sample.pixels.to(x.device))
    targets = sample.outputs.to(device=x.device, dtype=features.dtype).flatten(0, 1)
    weight = cast(Tensor, module.weight)
    current = weight.flatten(1).T.to(features.dtype)
    mean_in, mean_out = features.mean(0), targets.mean(0)
    features = features - mean_in
    gram = (features.T @ features).double()
    cross = (features.T @ (targets - mean_out)).double()
    # The pull keeps directions that the images do not excite (dead channels) where they are.
    pull = ridge * gram.diagonal().mean().clamp_min(1e-12)
    system = gram + pull * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    factor, info = torch.linalg.cholesky_ex(system)
    if int(info) != 0:
        return  # Activations too ill-conditioned to regress on: the factor stays as it is.
    solution = torch.cholesky_solve(cross + pull * current.double(), factor).to(weight.dtype)
    if bool(torch.isfinite(solution).all()):
        weight.copy_(solution.T.reshape(weight.shape))
        cast(Tensor, module.bias).copy_(mean_out - mean_in @ solution)


def _features(x: Tensor, conv: Conv, pixels: Tensor) -> Tensor:
    """Patches ``(N P, S height width)`` under the kernel at the given output pixels, ordered as the kernel is."""
    # Channels-last, a tap is rows of channels, and picking pixels copies only those picked.
    patches = [tap.permute(0, 2, 3, 1)[:, pixels // tap.shape[3], pixels % tap.shape[3]] for _, _, tap in taps(x, conv)]
    return torch.stack(patches, dim=-1).flatten(0, 1).flatten(1).float()


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
