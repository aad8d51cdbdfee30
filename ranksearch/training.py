"""Brief fine-tuning of a compressed network, with distillation from the dense one (Hinton et al. 2015)."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ranksearch.data import Split, augmented
from ranksearch.refit import batch_norms
from ranksearch.space import AugmentSpec, FineTuneSpec
from ranksearch.team import ALONE, Team

ToInput = Callable[[Split, Tensor], Tensor]
"""Images of a split at the given indices, as a network's input."""


def steps_of(spec: FineTuneSpec, images: int) -> int:
    """Optimiser steps that a fine-tuning of ``images`` training images makes."""
    return spec.steps if spec.epochs is None else max(1, round(spec.epochs * steps_of_epoch(spec, images)))


def steps_of_epoch(spec: FineTuneSpec, images: int) -> int:
    """Steps of one pass over ``images`` training images: whole batches, the remainder is dropped."""
    return max(1, images // spec.batch_images)


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
    between: Callable[[int], None] | None = None,
) -> float:
    """Train ``model`` in place; returns the mean loss of the last tenth of the steps.

    ``between`` is called after every step with their number so far.

    The learning rate is warmed up linearly over a tenth of the steps and brought to zero by a cosine. The same seed
    gives the same batches, changes of images and draws of layers like dropout.

    Raises:
        FloatingPointError: the loss is not finite.
    """
    training = Training(model, dense, split, to_input, spec, augment, seed=seed, dtype=dtype)
    training.set_mode()
    try:
        losses = []
        for done in range(1, training.total + 1):
            losses.append(training.step())
            if between is not None:
                between(done)
    finally:
        model.eval()
    tail = losses[-max(1, training.total // 10) :]
    return sum(tail) / len(tail)


class Training:
    """A training of ``model``, in place and one step at a time, which can stop and go on bit for bit.

    The caller sets the model's mode. What is trained at which rate follows the spec, with its cycle of the rate and its
    weight decay on kernels; or it is ``groups``: parameters and the constant rate of each group, by SGD without decay.
    Layers that draw numbers, like dropout, draw the training's own; torch's global generators are left as they are.
    A ``team`` trains on the batches that one process would, each member on its share, and ends in the same weights.
    """

    def __init__(
        self,
        model: nn.Module,
        dense: nn.Module,
        split: Split,
        to_input: ToInput,
        spec: FineTuneSpec,
        augment: AugmentSpec,
        *,
        seed: int,
        dtype: torch.dtype,
        groups: Sequence[tuple[Sequence[Tensor], float]] | None = None,
        team: Team = ALONE,
    ) -> None:
        self.model, self.dense, self.spec, self.dtype, self.team = model, dense, spec, dtype, team
        self._joined = team.joined(model)
        self.split, self.to_input, self.augment = split, to_input, augment
        self.cycled = groups is None
        self.total = steps_of(spec, len(split.labels))
        self.steps = 0
        self._labels = torch.as_tensor(split.labels)
        self._generator = torch.Generator().manual_seed(seed)
        self._order = torch.empty(0, dtype=torch.int64)
        self._place = 0
        self._device = next(model.parameters()).device
        # Another seed than that of the batches, lest the layers draw the same numbers.
        self._seed = seed ^ 2**31
        self._drawing = {
            kind: torch.Generator(kind).manual_seed(self._seed).get_state() for kind in {"cpu", self._device.type}
        }
        """States of the global generators that layers draw from."""
        parts = _kernels_and_others(model, spec) if groups is None else [_group(p, rate, 0.0) for p, rate in groups]
        self.optimiser: torch.optim.Optimizer
        if spec.optimiser == "adam" and self.cycled:
            self.optimiser = torch.optim.AdamW(parts, betas=(spec.momentum, 0.999))
        else:
            self.optimiser = torch.optim.SGD(parts, momentum=spec.momentum, nesterov=spec.momentum > 0)

    def set_mode(self) -> None:
        """Put the model into training mode, its batch norms as the spec has them."""
        self.model.train()
        if self.spec.batch_norm == "frozen" and self.cycled:
            for norm in batch_norms(self.model):
                norm.eval()

    def step(self) -> float:
        """One step; returns its loss, and raises FloatingPointError where that is not finite."""
        for group in self.optimiser.param_groups if self.cycled else ():
            group["lr"] = self.spec.learning_rate * _schedule(self.steps, self.total)
        batch = self._batch()
        part = self.team.share(len(batch))
        images = self.to_input(self.split, batch[part])
        images = augmented(images, self.augment, self._generator, batch=len(batch), part=part)
        labels = self._labels[batch[part]].to(images.device)
        with self._own_draws():
            loss = _loss(self._joined, self.dense, images, labels, self.spec, self.dtype)
        share = len(images) / len(batch)
        value = self.team.total(loss * share)
        if not math.isfinite(value):
            raise FloatingPointError(
                f"fine-tuning diverged: the loss is {value} at step {self.steps} of {self.total}. "
                "Lower the learning rate."
            )
        self.optimiser.zero_grad(set_to_none=True)
        # Gradients are averaged over the team: those of unequal shares count by their images.
        torch.autograd.backward(loss * (share * self.team.size))
        self.optimiser.step()
        self.steps += 1
        return value

    @contextmanager
    def _own_draws(self) -> Iterator[None]:
        """Torch's global generators are meanwhile those of this training."""
        cuda = self._device.type == "cuda"
        with torch.random.fork_rng(devices=[self._device] if cuda else []):
            if self.team.size > 1:  # others for every member, and known without its checkpoint
                torch.manual_seed(self._seed + self.steps * self.team.size + self.team.place)
                yield
                return
            torch.set_rng_state(self._drawing["cpu"])
            if cuda:
                torch.cuda.set_rng_state(self._drawing["cuda"], self._device)
            yield
            self._drawing["cpu"] = torch.get_rng_state()
            if cuda:
                self._drawing["cuda"] = torch.cuda.get_rng_state(self._device)

    def _batch(self) -> Tensor:
        """Indices of the next batch, pass after pass in a new order; the remainder of a pass is dropped."""
        count = len(self._labels)
        size = min(self.spec.batch_images, count)
        if self._place + size > len(self._order):
            self._order, self._place = torch.randperm(count, generator=self._generator), 0
        self._place += size
        return self._order[self._place - size : self._place]

    def state_dict(self) -> dict[str, Any]:
        """A copy of all that the remaining steps depend on."""
        state = {
            "model": self.model.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "generator": self._generator.get_state(),
            "drawing": self._drawing,
            "order": self._order,
            "place": self._place,
            "steps": self.steps,
        }
        return copy.deepcopy(state)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what ``state_dict`` gave, in a training made with the same arguments."""
        self.model.load_state_dict(state["model"])
        self.optimiser.load_state_dict(state["optimiser"])
        self._generator.set_state(state["generator"])
        self._drawing = dict(state["drawing"])
        self._order, self._place, self.steps = state["order"], state["place"], state["steps"]


def _kernels_and_others(model: nn.Module, spec: FineTuneSpec) -> list[dict[str, Any]]:
    """The parameters that decay, and those that do not."""
    kernels = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    return [_group(kernels, spec.learning_rate, spec.weight_decay), _group(others, spec.learning_rate, 0.0)]


def _group(parameters: Sequence[Tensor], rate: float, decay: float) -> dict[str, Any]:
    return {"params": list(parameters), "lr": rate, "weight_decay": decay}


def _schedule(step: int, steps: int) -> float:
    """Share of the largest learning rate at a step."""
    warm = max(1, steps // 10)
    return (step + 1) / warm if step < warm else 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


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
