"""A network whose factors are trained once for all ranks: any rank map is scored by slicing, untrained of its own.

Every searched layer holds the chain of largest ranks of each format; a rank map takes the leading channels of its
stages. As in J. Yu and T. Huang, "Universally slimmable networks" (2019, arXiv 1903.05134), each step sums the
gradients of the smallest rank map and of some drawn at random, with outputs distilled from the largest network, which
here is the dense one; batch norms see the statistics of each batch, and are recalibrated for the rank map that is
scored.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ranksearch.conv import Conv
from ranksearch.data import augmented, to_input
from ranksearch.decompositions import FORMATS, compressed_stages
from ranksearch.evaluation import Evaluator
from ranksearch.refit import recalibrate
from ranksearch.scoring import reproducible, score
from ranksearch.surgery import build_layer, channels_last, kernel_of, replaced
from ranksearch.table import Candidate

STEPS, BATCH, RATE, TEMPERATURE = 300, 64, 1e-3, 2.0
DRAWN = 2
"""Rank maps at random in each step, beside the smallest."""
Choices = tuple[int, ...]


class Layer(nn.Module):
    """One layer in every format at its largest ranks, which computes what the candidate chosen last does."""

    def __init__(self, ours: Evaluator, name: str, conv: Conv, candidates: Sequence[Candidate]) -> None:
        super().__init__()
        self.dense, self.conv = ours.dense.get_submodule(name), conv
        self.chains = nn.ModuleDict()
        self.picked = next(candidate for candidate in candidates if candidate.dense)
        weight, bias = kernel_of(self.dense)
        for form in sorted({candidate.format for candidate in candidates if not candidate.dense}):
            ranks = [candidate.ranks for candidate in candidates if candidate.format == form]
            largest = tuple(max(one) for one in zip(*ranks, strict=True))
            factors = ours.factors[name, form, "activation-aware"]
            self.chains[form] = build_layer(FORMATS[form], conv, factors, largest, bias, weight.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Outputs of the chosen candidate."""
        if self.picked.dense:
            return cast(Tensor, self.dense(x))
        stages = compressed_stages(FORMATS[self.picked.format], self.conv, self.picked.ranks)
        for module, stage in zip(cast(nn.Sequential, self.chains[self.picked.format]), stages, strict=True):
            whole = cast(nn.Conv2d, module)
            weight = whole.weight[: stage.out_channels, : stage.in_channels]
            bias = None if whole.bias is None else whole.bias[: stage.out_channels]
            x = F.conv2d(x, weight, bias, whole.stride, cast("tuple[int, int]", whole.padding), whole.dilation)
        return x


class Nested:
    """The network of all ranks of a bench."""

    def __init__(self, ours: Evaluator) -> None:
        self.ours, self.table = ours, ours.bench.table
        self.layers = {layer.name: Layer(ours, layer.name, layer.conv, layer.candidates) for layer in self.table.layers}
        self.model = channels_last(replaced(ours.dense, dict(self.layers)))

    def choose(self, choices: Choices) -> None:
        """Take the ranks of one map."""
        for name, candidate in self.table.picked(choices).items():
            cast(Layer, self.model.get_submodule(name)).picked = candidate

    def train(self, smallest: Choices, drawn: Callable[[], Choices]) -> None:
        """Train on the training images; deterministic where ``drawn`` is."""
        data, generator = self.ours.data, torch.Generator().manual_seed(0)
        split, count = data.train, len(data.train.labels)
        for name in self.layers:  # the dense network is the teacher, and stays
            cast(Layer, self.model.get_submodule(name)).dense.requires_grad_(False)
        optimiser = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], weight_decay=1e-4)
        self.model.train()
        for step in range(STEPS):
            for group in optimiser.param_groups:
                group["lr"] = RATE * min(1, (step + 1) / 20) * 0.5 * (1 + math.cos(math.pi * step / STEPS))
            index = torch.randint(count, (BATCH,), generator=generator).numpy()
            images = augmented(to_input(split.images[index], data), data.augment, generator)
            with torch.no_grad():
                taught = (self.ours.dense(images) / TEMPERATURE).log_softmax(1)
            optimiser.zero_grad(set_to_none=True)
            for choices in (smallest, *(drawn() for _ in range(DRAWN))):
                self.choose(choices)
                outputs = (self.model(images) / TEMPERATURE).log_softmax(1)
                loss = TEMPERATURE**2 * F.kl_div(outputs, taught, reduction="batchmean", log_target=True)
                torch.autograd.backward(loss)
            optimiser.step()
        self.model.eval()

    def accuracy(self, choices: Choices) -> float:
        """Of one rank map, recalibrated, on the search images, 0 to 1."""
        self.choose(choices)
        ours = self.ours
        with reproducible(1):
            batches = -(-len(ours.refit_images) // ours.spec.batch_images)
            recalibrate(self.model, torch.tensor_split(ours.refit_images, batches))
            found = score(
                self.model, ours.data.search, ours.data, batch_images=ours.spec.batch_images, device=ours.device
            )
        return found.accuracy
