"""Measured prices: what replacing one layer alone, by each of its candidates, costs on calibration images.

For every batch the dense network runs once; each candidate then runs on its layer's stored input, and only the network
downstream of the layer runs again. The prices, per candidate:

* ``weight``: squared error of the composed kernel, relative to the dense kernel's squared norm.
* ``output``: squared error of the layer's output, relative to the variance of the dense output (about channel means).
* ``divergence``: Kullback-Leibler divergence of the network's outputs from the dense ones, nats per image; no labels.
* ``loss``: increase of the cross-entropy with the labels, nats per image.
* ``drop``: fall of the top-1 accuracy, as a share of the images.
* ``second-order``: estimate of ``divergence``, half the Fisher quadratic form of the output's change, from one backward
  pass for all candidates of all layers; no labels, and nothing downstream of a layer runs again.

The Fisher matrix ``sum_c p_c (grad log p_c) (grad log p_c)^T`` is sampled by ``v = sum_c s_c sqrt(p_c) grad log p_c``
with random signs ``s_c``: ``E[v v^T]`` is that matrix, as it is with ``v = grad log p_c`` of a label ``c`` drawn from
the outputs; yet where the network is sure of a class, a drawn label nearly always gives next to nothing and rarely a
huge value, the signs always a moderate one (ours).
"""

from __future__ import annotations

import builtins
import math
import pickle
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast, get_args

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from ranksearch.calibration import as_image
from ranksearch.conv import Conv
from ranksearch.decompositions import FORMATS, Kind, Prepared, chain, compressed_stages
from ranksearch.downstream import Downstream, Pass, opened
from ranksearch.errors import DataError
from ranksearch.evaluation import reproducible
from ranksearch.pricing import Factors, content_hash, store
from ranksearch.surgery import build_layer, channels_last, evaluating, kernel_of
from ranksearch.table import LayerPrices, PriceTable

Price = Literal["weight", "output", "divergence", "loss", "drop", "second-order"]
PRICES: tuple[Price, ...] = get_args(Price)
WITH_LABELS: tuple[Price, ...] = ("loss", "drop")
"""The prices that need labels."""
_DOWNSTREAM = ("divergence", "loss", "drop")

Map = Callable[[Callable[[Any], Any], Iterable[Any]], Iterable[Any]]
"""Like the builtin ``map``: results in the order of the items."""
Unit = tuple[int, np.ndarray, "np.ndarray | None"]
"""One piece of work: the number of its first image, images ``(N, C, H, W)`` and labels ``(N,)``."""
Sums = dict[str, tuple[np.ndarray, np.ndarray]]
"""What images add up to, float64, by layer. ``(candidates, 5)``: squared error of the output, half the squared change
of the log-likelihood, divergence, cross-entropy, images that are right. ``(3, T)``: number, sum and sum of squares of
the dense outputs."""

_CACHE_VERSION = "1"


def measure(
    dense: nn.Module,
    table: PriceTable,
    factors: Factors,
    images: Tensor | np.ndarray,
    labels: Tensor | np.ndarray | None = None,
    *,
    kind: Kind,
    prices: Sequence[Price] | None = None,
    batch_images: int = 32,
    unit_images: int = 128,
    dtype: torch.dtype = torch.float32,
    threads: int = 1,
    seed: int = 0,
    cache: Path | None = None,
    map: Map = builtins.map,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, list[dict[str, float]]]:
    """Prices of every candidate of every searched layer, in the order of the table; zero for the dense candidate.

    The work is split by images, not by layers: the dense pass is shared by all layers, no piece of work is much longer
    than another, and every image is sent once. The numbers do not depend on ``map``.

    Args:
        dense: the dense network, in float32, on the device to measure on; it is not changed.
        table: the layers and their candidates.
        factors: prepared tensors of these layers' formats, of ``kind``.
        images: network inputs ``(N, C, H, W)``.
        labels: ``(N,)``; only ``loss`` and ``drop`` need them.
        kind: kind of the factors that candidates are built of, with the bias that goes with it.
        prices: which prices; without, all that can be had (with or without labels).
        batch_images: images that run at a time; all activations of these are held.
        unit_images: images of one piece of work for ``map``.
        dtype: of weights and activations, float32 or bfloat16.
        threads: CPU threads of one piece of work; the last bits depend on them.
        seed: of the signs of ``second-order``.
        cache: folder where prices are kept by a hash of all they depend on; without, none are kept.
        map: runs the pieces of work, which can be pickled: the builtin, a process pool's, or a cluster's.
        progress: called with the pieces of work done and their total.

    Raises:
        DataError: no images, or labels that are needed and missing or of another number.
        ModelError: the network runs a layer of the table more than once.
    """
    images = torch.as_tensor(images)
    labels = None if labels is None else torch.as_tensor(labels)
    chosen = _chosen(prices, images, labels)
    keys = {}
    if cache is not None:
        about = _about(dense, images, labels, f"{chosen} {kind} {dtype} {batch_images} {unit_images} {threads} {seed}")
        keys = {x.name: cache / "prices" / f"{_key(x, factors, kind, about)}.safetensors" for x in table.layers}
    found = {x.name: _read(keys.get(x.name), len(x.candidates), len(chosen)) for x in table.layers}
    missing = [layer for layer in table.layers if found[layer.name] is None]
    if missing:
        work = Measurement(
            dense=dense,
            layers=tuple(missing),
            prepared={k[:2]: v for k, v in factors.items() if k[2] == kind and k[0] in {x.name for x in missing}},
            prices=chosen,
            batch_images=batch_images,
            dtype=dtype,
            threads=threads,
            seed=seed,
        )
        for layer, values in _measured(work, images, labels, unit_images, map, progress).items():
            found[layer] = values
            if layer in keys:
                store({"prices": values}, keys[layer])
    return {
        name: [dict(zip(chosen, row, strict=True)) for row in cast(Tensor, values).tolist()]
        for name, values in found.items()
    }


def _chosen(prices: Sequence[Price] | None, images: Tensor, labels: Tensor | None) -> tuple[Price, ...]:
    """The prices to measure, in their usual order."""
    if not len(images):
        raise DataError("prices are measured on at least one image, found none. Check data.train.")
    if labels is not None and len(labels) != len(images):
        raise DataError(f"every image needs one label, found {len(images)} images and {len(labels)} labels.")
    if prices is None:
        return tuple(p for p in PRICES if labels is not None or p not in WITH_LABELS)
    unknown = [p for p in prices if p not in PRICES]
    if unknown:
        raise ValueError(f"prices must be among {', '.join(PRICES)}, found {', '.join(unknown)}")
    needing = [p for p in prices if p in WITH_LABELS]
    if needing and labels is None:
        raise DataError(f"the prices {' and '.join(needing)} need labels, found none. Give labels, or take divergence.")
    return tuple(p for p in PRICES if p in prices)


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

    def __reduce__(self) -> tuple[Callable[[bytes], Measurement], tuple[bytes]]:
        return _restored, (pickle.dumps(self.__dict__),)

    def weights(self, layer: LayerPrices) -> list[float]:
        """Relative squared errors of the composed kernels of one layer's candidates."""
        kernel, bias = kernel_of(self.dense.get_submodule(layer.name))
        kernel, errors = kernel.double(), []
        for candidate in layer.candidates:
            error = 0.0
            if not candidate.dense:
                form = FORMATS[candidate.format]
                prepared = self.prepared[layer.name, candidate.format]
                made, _ = chain(form, layer.conv, prepared, candidate.ranks, bias)
                found = composed(compressed_stages(form, layer.conv, candidate.ranks), made)
                error = float((found - kernel).square().sum())
            errors.append(_share(error, float(kernel.square().sum())))
        return errors

    def __call__(self, unit: Unit) -> Sums:
        """What one unit of images adds to every layer's sums."""
        first, *arrays = unit
        device = next(self.dense.parameters()).device
        images, labels = (None if a is None else torch.as_tensor(a).to(device) for a in arrays)
        assert images is not None
        sums = {x.name: (np.zeros((len(x.candidates), 5)), np.zeros((3, x.conv.out_channels))) for x in self.layers}
        with reproducible(self.threads):
            network = opened(self.dense, list(sums), images[:2], self.dtype)
            chains = {layer.name: self._chains(layer) for layer in self.layers}
            for start in range(0, len(images), self.batch_images):
                part = slice(start, start + self.batch_images)
                x = images[part].to(self.dtype).contiguous(memory_format=torch.channels_last)
                dense, gradients = self._dense(network, x, first + start)
                self._add(sums, network, chains, dense, gradients, None if labels is None else labels[part])
        return sums

    def _chains(self, layer: LayerPrices) -> list[nn.Module]:
        """The modules of one layer's candidates, the dense one left out."""
        kernel, bias = kernel_of(self.dense.get_submodule(layer.name))
        built = []
        for c in layer.candidates:
            if not c.dense:
                prepared = self.prepared[layer.name, c.format]
                module = build_layer(FORMATS[c.format], layer.conv, prepared, c.ranks, bias, kernel.dtype)
                built.append(channels_last(module.to(self.dtype)))
        return built

    def _dense(self, network: Downstream, images: Tensor, first: int) -> tuple[Pass, dict[str, Tensor]]:
        """The dense pass over one batch, and the gradients of a random log-likelihood at the outputs of the layers."""
        second = "second-order" in self.prices
        with torch.set_grad_enabled(second):
            dense = network.run(images.requires_grad_(second))
        logits = dense.logits.detach().double()
        if not bool(torch.isfinite(logits).all()):
            raise FloatingPointError("the dense network's outputs are not finite. Check its weights and the images.")
        if not second:
            return dense, {}
        generator = torch.Generator().manual_seed((self.seed << 32) + first)
        signs = torch.randint(2, logits.shape, generator=generator).to(logits) * 2 - 1
        p = logits.softmax(1)
        weighted = signs * p.sqrt()
        # The gradient of sum_c a_c log p_c with respect to the logits is a - p sum_c a_c.
        direction = weighted - p * weighted.sum(1, keepdim=True)
        gradients = dense.gradients(direction.to(dense.logits.dtype))
        return dense.detached(), gradients

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
        onward = any(p in self.prices for p in _DOWNSTREAM)
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
                    change = (output - y).float()
                    row[0] += float(change.square().sum())
                    if gradients:
                        slopes = (change * gradients[layer.name]).flatten(1).sum(1)
                        row[1] += float(slopes.double().square().sum()) / 2
                if onward:
                    row[2:] += _outcome(network.onward(layer.name, output, dense), log_p, labels)
            rows[-1, 2:] += _outcome(dense.logits, log_p, labels)


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
    """The one kernel ``(T, S, *kernel)``, float64, that a chain of stages without groups in the dense layer applies."""
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


def _measured(
    work: Measurement,
    images: Tensor,
    labels: Tensor | None,
    unit_images: int,
    run: Map,
    progress: Callable[[int, int], None] | None,
) -> dict[str, Tensor]:
    """Prices ``(candidates, prices)`` of the layers of ``work``, float64."""
    n = len(images)
    pixels, truth = images.cpu().numpy(), None if labels is None else labels.cpu().numpy()
    pieces = [slice(i, i + unit_images) for i in range(0, n, unit_images)]
    units = [(piece.start, pixels[piece], None if truth is None else truth[piece]) for piece in pieces]
    layers = {layer.name: layer for layer in work.layers}
    zeros = {name: [0.0] * len(layer.candidates) for name, layer in layers.items()}
    weight = dict(zip(layers, run(work.weights, work.layers), strict=True)) if "weight" in work.prices else zeros
    total: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for done, sums in enumerate(run(work, units)):
        if progress is not None:
            progress(done + 1, len(units))
        for name, (rows, channels) in sums.items():
            known = total.get(name, (0.0, 0.0))
            total[name] = (known[0] + rows, known[1] + channels)
    return {name: _priced(work.prices, weight[name], *total[name], n) for name in layers}


def _priced(prices: Sequence[Price], weight: Sequence[float], rows: np.ndarray, channels: np.ndarray, n: int) -> Tensor:
    """Prices ``(candidates, prices)`` of one layer out of its sums over ``n`` images; infinite where not a number."""
    count, total, squares = channels
    variance = float((squares - total**2 / count).sum())
    divergence, loss, right = (rows[:, 2:] / n).T
    found: dict[str, Any] = {
        "weight": np.array(weight),
        "output": np.array([_share(error, variance) for error in rows[:, 0]]),
        "second-order": rows[:, 1] / n,
        "divergence": divergence.clip(0),  # rounding
        "loss": loss - loss[-1],
        "drop": right[-1] - right,
    }
    values = np.stack([found[price] for price in prices], axis=1)
    return torch.from_numpy(np.where(np.isfinite(values), values, math.inf))


def _share(error: float, whole: float) -> float:
    """``error / whole``; nothing is lost of nothing."""
    return error / whole if whole > 0 else 0.0


def _about(dense: nn.Module, images: Tensor, labels: Tensor | None, text: str) -> str:
    """Hash of what all prices depend on; equal weights may stand in another forward pass: the outputs tell."""
    parameter = next(dense.parameters())
    with torch.no_grad(), evaluating(dense), reproducible(1):
        outputs = dense(images[:2].to(parameter))
    tensors = [outputs, images, *dense.state_dict().values(), *([] if labels is None else [labels])]
    return content_hash(tensors, f"{_CACHE_VERSION} {text} {dense}")


def _key(layer: LayerPrices, factors: Factors, kind: Kind, about: str) -> str:
    """Hash of all that the prices of one layer depend on."""
    forms = sorted({c.format for c in layer.candidates if not c.dense})
    prepared = [(form, factors[layer.name, form, kind]) for form in forms]
    names = [(form, *sorted(tensors)) for form, tensors in prepared]
    values = [tensors[key] for _, tensors in prepared for key in sorted(tensors)]
    return content_hash(values, f"{about} {names} {layer}")


def _read(path: Path | None, candidates: int, prices: int) -> Tensor | None:
    """Prices ``(candidates, prices)`` from the cache, or None; an unreadable entry is removed."""
    if path is None or not path.exists():
        return None
    try:
        values = load_file(path)["prices"]
        if values.shape == (candidates, prices) and values.dtype == torch.float64:
            return values
    except (SafetensorError, OSError, KeyError):
        pass
    path.unlink(missing_ok=True)
    return None
