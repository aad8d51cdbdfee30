"""The work of measuring prices in pieces, one layer's kernels or one batch of images each (see ``prices``).

Whoever works on several pieces keeps the traced network and the modules of all candidates from the first one on.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ranksearch.calibration import as_image
from ranksearch.decompositions import FORMATS, Prepared, compressed_stages
from ranksearch.downstream import Downstream, Pass, opened
from ranksearch.factors import factors_at
from ranksearch.rounding import rounded
from ranksearch.scoring import reproducible
from ranksearch.space import StabiliseSpec
from ranksearch.stages import composed
from ranksearch.surgery import build_layer, channels_last, kernel_of
from ranksearch.table import Candidate, LayerPrices

Price = Literal["weight", "output", "divergence", "loss", "drop", "second-order"]
PRICES: tuple[Price, ...] = get_args(Price)
WITH_LABELS: tuple[Price, ...] = ("loss", "drop")
"""The prices that need labels."""
ONWARD: frozenset[str] = frozenset({"divergence", "loss", "drop"})
"""The prices that are read off the network's outputs."""

Piece = str | range
"""A layer whose kernels are composed, or the numbers of a batch of images."""
Sums = dict[str, tuple[np.ndarray, np.ndarray]]
"""What images add up to, float64, by layer. ``(candidates, 5)``: squared error of the output, half the squared change
of the log-likelihood, divergence, cross-entropy, images that are right. ``(3, T)``: number, sum and sum of squares of
the dense outputs."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Measurement:
    """Measures one piece of the work after another; pickled, it carries plain bytes, no shared memory."""

    dense: nn.Module
    layers: tuple[LayerPrices, ...]
    prepared: Mapping[tuple[str, str], Prepared]
    """Prepared tensors by layer and format."""
    images: Tensor
    """``(N, C, H, W)``."""
    labels: Tensor | None
    """``(N,)``."""
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
        return _restored, (pickle.dumps({field.name: getattr(self, field.name) for field in fields(self)}),)

    @property
    def pieces(self) -> list[Piece]:
        """All the work: layers first, since fits that they leave in the cache are read by all batches."""
        layers = [layer.name for layer in self.layers if "weight" in self.prices or (self.cache and _fits(layer))]
        count, size = len(self.images), self.batch_images
        return [*layers, *(range(start, min(start + size, count)) for start in range(0, count, size))]

    def __call__(self, piece: Piece) -> list[float] | Sums:
        """Relative squared errors of the composed kernels of a layer's candidates; or what a batch adds to the sums."""
        with reproducible(self.threads):
            return self._weights(piece) if isinstance(piece, str) else self._sums(piece)

    def _weights(self, name: str) -> list[float]:
        layer = next(layer for layer in self.layers if layer.name == name)
        weight, _ = kernel_of(self.dense.get_submodule(name))
        kernel, errors = composed((layer.conv,), (weight,)), []
        for candidate in layer.candidates:
            error = 0.0
            if not candidate.dense:
                stages = compressed_stages(FORMATS[candidate.format], layer.conv, candidate.ranks)
                error = float((composed(stages, self._kernels(layer, candidate)) - kernel).square().sum())
            errors.append(share(error, float(kernel.square().sum())))
        return errors

    def _sums(self, batch: range) -> Sums:
        part, device = slice(batch.start, batch.stop), self._device
        sums = {x.name: (np.zeros((len(x.candidates), 5)), np.zeros((3, x.conv.out_channels))) for x in self.layers}
        # A copy: the last bits depend on how operands are aligned, which is at odds where a batch begins.
        x = self.images[part].to(device, self.dtype, copy=True)
        x = x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x
        dense, gradients = self._dense(self._network, x, batch.start)
        self._add(sums, dense, gradients, None if self.labels is None else self.labels[part].to(device).long())
        return sums

    @property
    def _device(self) -> torch.device:
        return next(self.dense.parameters()).device

    @cached_property
    def _network(self) -> Downstream:
        parameter = next(self.dense.parameters())
        return opened(self.dense, [layer.name for layer in self.layers], self.images[:2].to(parameter), self.dtype)

    @cached_property
    def _chains(self) -> dict[str, list[nn.Module]]:
        """The modules of all layers' candidates, the dense ones left out."""
        return {layer.name: self._chains_of(layer) for layer in self.layers}

    def _chains_of(self, layer: LayerPrices) -> list[nn.Module]:
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
        return [rounded(kernel, candidate.bits) for kernel in found.kernels]

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
        dense: Pass,
        gradients: Mapping[str, Tensor],
        labels: Tensor | None,
    ) -> None:
        """Run every candidate on one batch."""
        local = any(p in self.prices for p in ("output", "second-order"))
        onward = bool(ONWARD & set(self.prices))
        log_p = dense.logits.double().log_softmax(1)
        for layer in self.layers:
            rows, channels = sums[layer.name]
            y = dense.outputs[layer.name]
            values = as_image(y, layer.conv).double().movedim(1, 0).flatten(1)
            count = torch.full_like(values[:, 0], values.shape[1])
            channels += torch.stack([count, values.sum(1), values.square().sum(1)]).cpu().numpy()
            for row, module in zip(rows, self._chains[layer.name], strict=False):
                output = module(dense.inputs[layer.name])
                if local:
                    change = _flat(output - y)
                    row[0] += float(torch.dot(change.flatten(), change.flatten()))
                    if gradients:
                        slopes = torch.linalg.vecdot(change, gradients[layer.name])
                        row[1] += float(slopes.double().square().sum()) / 2
                if onward:
                    row[2:] += _outcome(self._network.onward(layer.name, output, dense), log_p, labels)
            rows[-1, 2:] += _outcome(dense.logits, log_p, labels)


def _fits(layer: LayerPrices) -> bool:
    """Whether factors of a candidate have to be fitted."""
    return any(not c.dense and not FORMATS[c.format].nested for c in layer.candidates)


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


def share(error: float, whole: float) -> float:
    """``error / whole``; nothing is lost of nothing."""
    return error / whole if whole > 0 else 0.0
