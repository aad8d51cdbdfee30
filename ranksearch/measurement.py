"""One piece of the work of measuring prices: all candidates of all layers on some images (see ``prices``)."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ranksearch.calibration import as_image
from ranksearch.conv import Conv
from ranksearch.decompositions import FORMATS, Prepared, compressed_stages
from ranksearch.downstream import Downstream, Pass, opened
from ranksearch.evaluation import reproducible
from ranksearch.factors import factors_at
from ranksearch.space import StabiliseSpec
from ranksearch.surgery import build_layer, channels_last, kernel_of
from ranksearch.table import Candidate, LayerPrices

Price = Literal["weight", "output", "divergence", "loss", "drop", "second-order"]
PRICES: tuple[Price, ...] = get_args(Price)
WITH_LABELS: tuple[Price, ...] = ("loss", "drop")
"""The prices that need labels."""

Unit = tuple[int, np.ndarray, "np.ndarray | None"]
"""One piece of work: the number of its first image, images ``(N, C, H, W)`` and labels ``(N,)``."""
Sums = dict[str, tuple[np.ndarray, np.ndarray]]
"""What images add up to, float64, by layer. ``(candidates, 5)``: squared error of the output, half the squared change
of the log-likelihood, divergence, cross-entropy, images that are right. ``(3, T)``: number, sum and sum of squares of
the dense outputs."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Measurement:
    """Measures layers on one unit of images after another; pickled, it carries plain bytes, no shared memory."""

    dense: nn.Module
    layers: tuple[LayerPrices, ...]
    prepared: Mapping[tuple[str, str], Prepared]
    """Prepared tensors by layer and format."""
    prices: tuple[Price, ...]
    batch_images: int
    dtype: torch.dtype
    threads: int
    seed: int
    stabiliser: StabiliseSpec
    """Of candidates that are fitted."""
    cache: Path | None
    """Folder where fits are kept."""

    def __reduce__(self) -> tuple[Callable[[bytes], Measurement], tuple[bytes]]:
        return _restored, (pickle.dumps(self.__dict__),)

    def weights(self, layer: LayerPrices) -> list[float]:
        """Relative squared errors of the composed kernels of one layer's candidates."""
        weight, _ = kernel_of(self.dense.get_submodule(layer.name))
        errors = []
        with reproducible(self.threads):
            kernel = composed((layer.conv,), (weight,))
            for candidate in layer.candidates:
                error = 0.0
                if not candidate.dense:
                    stages = compressed_stages(FORMATS[candidate.format], layer.conv, candidate.ranks)
                    error = float((composed(stages, self._kernels(layer, candidate)) - kernel).square().sum())
                errors.append(share(error, float(kernel.square().sum())))
        return errors

    def __call__(self, unit: Unit) -> Sums:
        """What one unit of images adds to every layer's sums."""
        first, *arrays = unit
        device = next(self.dense.parameters()).device
        images, labels = (None if a is None else torch.tensor(a, device=device) for a in arrays)
        assert images is not None
        sums = {x.name: (np.zeros((len(x.candidates), 5)), np.zeros((3, x.conv.out_channels))) for x in self.layers}
        with reproducible(self.threads):
            network = opened(self.dense, list(sums), images[:2].to(next(self.dense.parameters())), self.dtype)
            chains = {layer.name: self._chains(layer) for layer in self.layers}
            for start in range(0, len(images), self.batch_images):
                part = slice(start, start + self.batch_images)
                x = images[part].to(self.dtype)
                x = x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x
                dense, gradients = self._dense(network, x, first + start)
                self._add(sums, network, chains, dense, gradients, None if labels is None else labels[part].long())
        return sums

    def _chains(self, layer: LayerPrices) -> list[nn.Module]:
        """The modules of one layer's candidates, the dense one left out."""
        kernel, bias = kernel_of(self.dense.get_submodule(layer.name))
        built = []
        for c in layer.candidates:
            if not c.dense:
                prepared, made = self.prepared[layer.name, c.format], self._kernels(layer, c)
                module = build_layer(FORMATS[c.format], layer.conv, prepared, c.ranks, bias, kernel.dtype, made)
                built.append(channels_last(module.to(self.dtype)))
        return built

    def _kernels(self, layer: LayerPrices, candidate: Candidate) -> list[Tensor]:
        """Of the stages of one candidate."""
        prepared = self.prepared[layer.name, candidate.format]
        found = factors_at(candidate.format, layer.conv, prepared, candidate.ranks, self.stabiliser, self.cache)
        return found.kernels

    def _dense(self, network: Downstream, images: Tensor, first: int) -> tuple[Pass, dict[str, Tensor]]:
        """The dense pass over a batch, and gradients ``(N, K)`` of a random log-likelihood at the layers' outputs."""
        second = "second-order" in self.prices
        with torch.set_grad_enabled(second):
            dense = network.run(images.requires_grad_(second))
        logits = dense.logits.detach().double()
        if not bool(torch.isfinite(logits).all()):
            raise FloatingPointError("the dense network's outputs are not finite. Check its weights and the images.")
        if not second:
            return dense, {}
        generator = torch.Generator().manual_seed((self.seed % 2**31 << 32) + first)
        signs = torch.randint(2, logits.shape, generator=generator).to(logits) * 2 - 1
        p = logits.softmax(1)
        weighted = signs * p.sqrt()
        # The gradient of sum_c a_c log p_c with respect to the logits is a - p sum_c a_c.
        direction = weighted - p * weighted.sum(1, keepdim=True)
        gradients = dense.gradients(direction.to(dense.logits.dtype))
        return dense.detached(), {name: _flat(gradient) for name, gradient in gradients.items()}

    @torch.no_grad()
    def _add(
        self,
        sums: Sums,
        network: Downstream,
        chains: Mapping[str, list[nn.Module]],
        dense: Pass,
        gradients: Mapping[str, Tensor],
        labels: Tensor | None,
    ) -> None:
        """Run every candidate on one batch."""
        local = any(p in self.prices for p in ("output", "second-order"))
        onward = any(p in self.prices for p in ("divergence", "loss", "drop"))
        log_p = dense.logits.double().log_softmax(1)
        for layer in self.layers:
            rows, channels = sums[layer.name]
            y = dense.outputs[layer.name]
            values = as_image(y, layer.conv).double().movedim(1, 0).flatten(1)
            count = torch.full_like(values[:, 0], values.shape[1])
            channels += torch.stack([count, values.sum(1), values.square().sum(1)]).cpu().numpy()
            for row, module in zip(rows, chains[layer.name], strict=False):
                output = module(dense.inputs[layer.name])
                if local:
                    change = _flat(output - y)
                    row[0] += float(torch.dot(change.flatten(), change.flatten()))
                    if gradients:
                        slopes = torch.linalg.vecdot(change, gradients[layer.name])
                        row[1] += float(slopes.double().square().sum()) / 2
                if onward:
                    row[2:] += _outcome(network.onward(layer.name, output, dense), log_p, labels)
            rows[-1, 2:] += _outcome(dense.logits, log_p, labels)


def _flat(x: Tensor) -> Tensor:
    """``(N, K)``, float32: the values of every image; a channels-last batch is not copied."""
    return x.movedim(1, -1).flatten(1).float()


def _outcome(logits: Tensor, log_p: Tensor, labels: Tensor | None) -> tuple[float, float, float]:
    """Divergence from ``log_p``, cross-entropy and number right, summed over a batch; without labels the first only."""
    found = logits.double().log_softmax(1)
    divergence = float(F.kl_div(found, log_p, reduction="sum", log_target=True))
    if labels is None:
        return divergence, 0.0, 0.0
    return divergence, float(F.nll_loss(found, labels, reduction="sum")), float((found.argmax(1) == labels).sum())


def _restored(content: bytes) -> Measurement:
    return Measurement(**pickle.loads(content))


def composed(stages: Sequence[Conv], weights: Sequence[Tensor]) -> Tensor:
    """The one kernel ``(T, S, *kernel)``, float64, that a chain of stages applies; zero between groups."""
    spatial = weights[0].ndim - 2
    convolve = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[spatial - 1]
    inputs = stages[0].in_channels
    kernel = torch.eye(inputs, dtype=torch.float64, device=weights[0].device).reshape(inputs, inputs, *[1] * spatial)
    for stage, weight in zip(stages, weights, strict=True):
        # Correlating with one kernel after another is correlating with their convolution; transposed, torch convolves.
        tied = getattr(stage, "tied", 1)
        groups = weight.double().reshape(stage.groups // tied, -1, *weight.shape[1:]).repeat_interleave(tied, 0)
        kernel = convolve(kernel, groups.transpose(1, 2).flatten(0, 1), groups=stage.groups)
    return kernel.transpose(0, 1)


def share(error: float, whole: float) -> float:
    """``error / whole``; nothing is lost of nothing."""
    return error / whole if whole > 0 else 0.0
