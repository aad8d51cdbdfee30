"""How good and how stable the factors of a layer are, for any chain of stages.

The sensitivity is the expected squared error of the composed kernel per unit variance of independent noise on every
entry of every factor (Phan et al. 2020, for CP). A chain is linear in each of its stages, so it is a sum over stages:
an entry of stage n that joins input channel i to output channel o moves the kernel by the outer product of what comes
before i and what comes after o, and of an entry that several groups share, by the sum of theirs.

The kernel of a chain is composed one spatial axis at a time: no two stages of a format extend along the same axis.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from ranksearch.conv import Conv
from ranksearch.decompositions.format import Format, Ranks, compressed_stages


@dataclass(frozen=True, kw_only=True)
class Report:
    """What became of one layer's kernel."""

    relative_error: float
    """Squared norm of the difference over that of the kernel, in the metric of the factors' kind."""
    sensitivity: float
    """Expected squared error of the kernel per unit variance of noise on the factors."""
    degeneracy: float | None
    """Norm of the largest term over the norm of their sum, where the kernel is a sum of terms that can cancel."""


def report(
    form: Format, conv: Conv, ranks: Ranks, weight: Tensor, kernels: Sequence[Tensor], root: Tensor | None = None
) -> Report:
    """Error, sensitivity and degeneracy of the factors of one layer, in float64.

    Args:
        form: the format.
        conv: geometry of the dense layer.
        ranks: of the factors.
        weight: dense kernel ``(T, S / groups, *spatial)``, or with an axis of groups in front as it is prepared.
        kernels: of the stages.
        root: ``(S, S)`` square root of the input moment, one for every group in front; where the error is that of the
            output.
    """
    parts = _blocks(conv, compressed_stages(form, conv, ranks), kernels)
    found = torch.cat([compose(stages, weights) for stages, weights in parts])
    dense = weight.double().reshape(found.shape)
    if root is None:
        difference, norm = found - dense, dense.norm()
    else:
        metric = root.double().reshape(conv.groups, *root.shape[-2:])
        apart = (conv.groups, -1, *dense.shape[1:])
        difference = torch.einsum("gts...,gsr->gtr...", (found - dense).reshape(apart), metric)
        norm = torch.einsum("gts...,gsr->gtr...", dense.reshape(apart), metric).norm()
    degeneracies = [d for d in (_degeneracy(stages, weights) for stages, weights in parts) if d is not None]
    return Report(
        relative_error=float((difference.norm() / norm) ** 2) if float(norm) > 0 else 0.0,
        sensitivity=sum(_sensitivity(stages, weights) for stages, weights in parts),
        degeneracy=max(degeneracies, default=None),
    )


def sensitivity(conv: Conv, stages: Sequence[Conv], kernels: Sequence[Tensor]) -> float:
    """The sensitivity of the chain of ``stages`` that replaces ``conv``."""
    return sum(_sensitivity(part, weights) for part, weights in _blocks(conv, stages, kernels))


Block = tuple[Sequence[Conv], list[Tensor]]


def _blocks(conv: Conv, stages: Sequence[Conv], kernels: Sequence[Tensor]) -> list[Block]:
    """The chain of every group of the dense layer, in float64."""
    if conv.groups == 1:
        return [(stages, [kernel.double() for kernel in kernels])]
    alone = [
        stage.resized(
            in_channels=stage.in_channels // conv.groups,
            out_channels=stage.out_channels // conv.groups,
            groups=stage.groups // conv.groups,
        )
        for stage in stages
    ]
    chunks = [kernel.double().chunk(conv.groups) for kernel in kernels]
    return [(alone, [chunk[i] for chunk in chunks]) for i in range(conv.groups)]


def compose(stages: Sequence[Conv], weights: Sequence[Tensor]) -> Tensor:
    """The kernel ``(T, S, *spatial)`` of a chain."""
    return _before(stages, weights)[-1]


def _before(stages: Sequence[Conv], weights: Sequence[Tensor]) -> list[Tensor]:
    """Before every stage, and after the last: the kernel ``(C, S, *spatial)`` from the input to its channels."""
    known = [_identity(stages[0].in_channels, weights[0])]
    for stage, weight in zip(stages, weights, strict=True):
        inputs = known[-1].reshape(stage.groups, -1, *known[-1].shape[1:]).flatten(3)
        product = torch.einsum("goik,gisl->goskl", _grouped(stage, weight).flatten(3), inputs)
        known.append(_joined(product.flatten(0, 1), weight.shape[2:], known[-1].shape[2:]))
    return known


def _after(stages: Sequence[Conv], weights: Sequence[Tensor]) -> list[Tensor]:
    """After every stage: the kernel ``(T, C, *spatial)`` from its channels to the output."""
    known = [_identity(stages[-1].out_channels, weights[-1])]
    for stage, weight in zip(stages[:0:-1], weights[:0:-1], strict=True):
        outputs = known[-1].reshape(known[-1].shape[0], stage.groups, -1, *known[-1].shape[2:]).flatten(3)
        product = torch.einsum("goik,tgol->tgikl", _grouped(stage, weight).flatten(3), outputs)
        known.append(_joined(product.flatten(1, 2), weight.shape[2:], known[-1].shape[2:]))
    return known[::-1]


def _identity(channels: int, like: Tensor) -> Tensor:
    eye = torch.eye(channels, dtype=like.dtype, device=like.device)
    return eye.reshape(channels, channels, *[1] * (like.ndim - 2))


def _grouped(stage: Conv, weight: Tensor) -> Tensor:
    """The kernel of every group ``(groups, out, in, *spatial)``, a shared one repeated."""
    shared = weight.reshape(stage.groups // stage.tied, -1, *weight.shape[1:])
    return shared.repeat_interleave(stage.tied, 0)


def _joined(product: Tensor, ours: Sequence[int], theirs: Sequence[int]) -> Tensor:
    """``(A, B, K, L)`` to ``(A, B, *spatial)``, where along every axis one of the two kernels is of size 1."""
    axes = len(ours)
    apart = product.reshape(*product.shape[:2], *ours, *theirs)
    paired = apart.permute(0, 1, *(2 + axis + side * axes for axis in range(axes) for side in (0, 1)))
    return paired.reshape(*product.shape[:2], *(a * b for a, b in zip(ours, theirs, strict=True)))


def _sensitivity(stages: Sequence[Conv], weights: Sequence[Tensor]) -> float:
    before, after = _before(stages, weights), _after(stages, weights)
    total = 0.0
    for stage, inputs, outputs in zip(stages, before[:-1], after, strict=True):
        # A shared entry moves the kernel by the sum over its groups: squared, their inner products.
        into = _inner_products(inputs.transpose(0, 1), stage)
        total += prod(stage.kernel) * float((into * _inner_products(outputs, stage)).sum())
    return total


def _inner_products(kernel: Tensor, stage: Conv) -> Tensor:
    """Between tied groups of ``(X, C, *spatial)``, summed over their channels: ``(shared kernels, tied, tied)``."""
    grouped = kernel.reshape(kernel.shape[0], stage.groups // stage.tied, stage.tied, -1, *kernel.shape[2:]).flatten(4)
    return torch.einsum("xmgck,xmhck->mgh", grouped, grouped)


def _degeneracy(stages: Sequence[Conv], weights: Sequence[Tensor]) -> float | None:
    """Largest over the whole, for the terms that the first stage with groups, if there is one, adds up."""
    index = next((i for i, stage in enumerate(stages) if stage.groups > 1), None)
    whole = float(compose(stages, weights).norm())
    if index is None or not 0 < whole < float("inf"):
        return None
    stage = stages[index]
    inputs = _before(stages[: index + 1], weights[: index + 1])[-1]
    outputs = _after(stages[index:], weights[index:])[0]
    # Norm of every term from Gram matrices: the terms themselves would take the groups' number of kernels.
    into = inputs.reshape(stage.groups, -1, *inputs.shape[1:]).flatten(2)
    out_of = outputs.transpose(0, 1).reshape(stage.groups, -1, outputs.shape[0], *outputs.shape[2:]).flatten(2)
    norms = ((into @ into.mT) * (out_of @ out_of.mT)).sum((1, 2))
    return float(norms.max().clamp_min(0).sqrt()) / whole
