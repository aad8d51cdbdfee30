"""Brief fine-tuning of a compressed network, with distillation from the dense one (Hinton et al. 2015)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ranksearch.data import Split, augmented
from ranksearch.space import AugmentSpec, FineTuneSpec

ToInput = Callable[[Split, Tensor], Tensor]
"""Images of a split at the given indices, as a network's input."""


def steps_of(spec: FineTuneSpec, images: int) -> int:
    """Optimiser steps that a fine-tuning of ``images`` training images makes."""
    return spec.steps if spec.epochs is None else max(1, round(spec.epochs * images / spec.batch_images))


def fine_tune(
    model: nn.Module,
    dense: nn.Module,
    split: Split,
    to_input: ToInput,
    spec: FineTuneSpec,
    augment: AugmentSpec,
    *,
    seed: int,
    dtype: torch.dtype,
) -> float:
    """Train ``model`` in place; returns the mean loss of the last tenth of the steps.

    SGD with Nesterov momentum, the learning rate warmed up linearly over a tenth of the steps and brought to zero by a
    cosine. The same seed gives the same batches and changes of images.

    Raises:
        FloatingPointError: the loss is not finite.
    """
    steps = steps_of(spec, len(split.labels))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.as_tensor(split.labels)
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    optimiser = torch.optim.SGD(
        [{"params": decayed, "weight_decay": spec.weight_decay}, {"params": others, "weight_decay": 0.0}],
        lr=spec.learning_rate,
        momentum=spec.momentum,
        nesterov=spec.momentum > 0,
    )
    losses: list[float] = []
    model.train()
    try:
        for step, batch in enumerate(_batches(len(labels), spec.batch_images, steps, generator)):
            for group in optimiser.param_groups:
                group["lr"] = spec.learning_rate * _schedule(step, steps)
            images = augmented(to_input(split, batch), augment, generator)
            loss = _loss(model, dense, images, labels[batch].to(images.device), spec, dtype)
            losses.append(float(loss.detach()))
            if not math.isfinite(losses[-1]):
                raise FloatingPointError(f"fine-tuning diverged: the loss is {losses[-1]} at step {step} of {steps}")
            optimiser.zero_grad(set_to_none=True)
            torch.autograd.backward(loss)
            optimiser.step()
    finally:
        model.eval()
    tail = losses[-max(1, steps // 10) :]
    return sum(tail) / len(tail)


def _schedule(step: int, steps: int) -> float:
    """Share of the largest learning rate at a step."""
    warm = max(1, steps // 10)
    return (step + 1) / warm if step < warm else 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def _batches(count: int, size: int, steps: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Indices of ``steps`` batches, pass after pass in a new order; the remainder of a pass is dropped."""
    size = min(size, count)
    made = 0
    while made < steps:
        order = torch.randperm(count, generator=generator)
        for start in range(0, count - size + 1, size):
            if made == steps:
                return
            yield order[start : start + size]
            made += 1


def _loss(
    model: nn.Module, dense: nn.Module, images: Tensor, labels: Tensor, spec: FineTuneSpec, dtype: torch.dtype
) -> Tensor:
    """Divergence from the dense network's softened outputs, and cross-entropy with the labels, weighted."""
    with torch.autocast(images.device.type, dtype=dtype, enabled=dtype != torch.float32):
        outputs = model(images)
        with torch.no_grad():
            taught = dense(images) if spec.distill > 0 else outputs
    outputs, taught = outputs.float(), taught.float()
    loss: Tensor = outputs.new_zeros(())
    if spec.distill > 0:
        soft, target = outputs / spec.temperature, taught / spec.temperature
        divergence = F.kl_div(soft.log_softmax(1), target.log_softmax(1), reduction="batchmean", log_target=True)
        loss = loss + spec.distill * spec.temperature**2 * divergence
    if spec.distill < 1:
        loss = loss + (1 - spec.distill) * F.cross_entropy(outputs, labels)
    return loss


def computes_bfloat16(device: torch.device) -> bool:
    """Whether a device multiplies in bfloat16 itself, which makes training faster with it than with float32."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    capabilities = torch.cpu.get_capabilities()
    return any(bool(capabilities.get(name)) for name in ("avx512_bf16", "amx_bf16", "bf16"))
