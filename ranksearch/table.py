"""The price table: what every candidate of every layer costs, and the error it is predicted to make; no tensors.

A network's MACs are the sum over its layers, so a proposal (one candidate per searched layer) is priced by addition.
Besides its predicted error a candidate may have measured prices, and a layer the singular values of its kernel: for the
strategies that read them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import prod
from typing import Any, Final, Self

from ranksearch.conv import Conv
from ranksearch.errors import PriceError

DENSE = "dense"
"""The name of the choice that leaves a layer as it is."""

PREDICTED: Final = "predicted"
"""The price that every table has: the predicted error."""

MEASURED: Final = ("weight", "output", "divergence", "loss", "second-order", "drop")
"""Prices that are measured, of some candidates at least, with one layer replaced alone: the relative squared error of
its kernel and of its output, the divergence of the network's outputs, the rise of its loss, a second-order estimate of
that divergence, its fall in accuracy."""

UNFOLDINGS: Final = {
    "svd": ("out",),
    "channel-svd": ("out",),
    "spatial-svd": ("row",),
    "tucker2": ("in", "out"),
    "tensor-train": ("in", "row", "out"),
}
"""Formats whose every rank is that of an unfolding of the kernel, with the unfoldings in the order of the ranks."""


FLOAT_BITS: Final = 32
ROUNDING: Final = 1 + 1e-12
"""A share of the dense network's cost is multiplied with this where a cost is compared with it: 0.57 * 100 < 57."""
"""Of a weight or an activation that is not quantised."""

GATEABLE: Final = ("tucker2", "svd", "spatial-svd", "channel-svd")
"""Formats whose ranks are the channels between their stages, so that a funnel run can close them one by one."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One way to write one layer: a format at given ranks, or dense."""

    format: str
    ranks: tuple[int, ...] = ()
    macs: int
    """Multiply-accumulates per image."""
    params: int
    error: float
    """Predicted relative squared error, 0 (exact) to 1 (everything lost), in the metric of the format's factors. Close
    to the share of the output's variance lost for ``svd`` and ``channel-svd``; up to three times too high for
    ``tucker2`` and too low for ``spatial-svd``, so it compares ranks better than formats. Of formats that are fitted,
    measured by short fits at a few ranks and interpolated, before they are stabilised."""
    prices: tuple[tuple[str, float], ...] = ()
    """Losses of replacing this layer alone, by name (see ``MEASURED``), some interpolated from neighbours'."""
    latency_ms: float | None = None
    """What it adds to the latency of a network, of one batch, where latencies were measured."""
    bits: int = FLOAT_BITS
    """Of each of its weights."""

    def price(self, name: str) -> float:
        """The loss called ``name``; ``predicted`` is the error, and dense loses nothing unless it was measured.

        Raises:
            PriceError: the table was made without this price.
        """
        if name == PREDICTED:
            return self.error
        found = dict(self.prices)
        if name not in found and self.dense:
            return 0.0
        if name not in found:
            known = ", ".join((PREDICTED, *found))
            raise PriceError(
                f"$.strategy.price must be in the price table, found {name!r}; {self.format} {self.ranks} has {known}. "
                "Take one of these, or start a new search, which measures the price that the space names."
            )
        return found[name]

    @property
    def dense(self) -> bool:
        """Whether the layer is left as it is."""
        return self.format == DENSE


@dataclass(frozen=True, kw_only=True)
class Timing:
    """On what latencies were measured, and what of the network's is not the searched layers'."""

    dense_ms: float
    """Of one batch, the whole dense network."""
    other_ms: float
    """Of everything that is not searched, pinned layers as they are pinned."""
    runtime: str
    batch_images: int
    threads: int
    device: str


@dataclass(frozen=True, kw_only=True)
class LayerPrices:
    """The candidates of one searched layer, by increasing MACs, the dense one last."""

    name: str
    conv: Conv
    candidates: tuple[Candidate, ...]
    spectra: tuple[tuple[str, tuple[float, ...]], ...] = ()
    """Singular values, largest first, of the kernel's unfoldings by name: ``in``, ``out``, ``row`` (see
    :func:`unfolding_shape`); ``columns-k``: of its k groups of input channels, each a T x (S/k h w) matrix, the largest
    among the groups at every place. Of grouped layers likewise the largest among their groups."""

    def __post_init__(self) -> None:
        costs = [candidate.macs for candidate in self.candidates]
        if not self.candidates or not self.candidates[-1].dense or costs != sorted(costs):
            raise ValueError(f"candidates of {self.name} must rise in MACs and end with dense")

    def within(self, macs_limit: float) -> int:
        """Index of the candidate of least error that costs at most ``macs_limit`` MACs; the cheapest if none does."""
        affordable = [i for i, candidate in enumerate(self.candidates) if candidate.macs <= macs_limit]
        return min(affordable, key=lambda i: (self.candidates[i].error, self.candidates[i].macs), default=0)

    def spectrum(self, name: str) -> tuple[float, ...]:
        """Singular values of the unfolding ``name``, largest first.

        Raises:
            PriceError: the table was made without them.
        """
        found = dict(self.spectra)
        if name not in found:
            raise PriceError(
                f"{self.name} must have the spectrum {name!r} in the price table, found: {', '.join(found) or 'none'}. "
                "Start a new search, whose table has them, or take a strategy that needs none, such as `knapsack`."
            )
        return found[name]

    def cheapest(self, error_limit: float) -> int:
        """Index of the cheapest candidate whose error is at most ``error_limit``; dense is always one."""
        return next(i for i, c in enumerate(self.candidates) if c.dense or c.error <= error_limit)


@dataclass(frozen=True, kw_only=True)
class PriceTable:
    """All searched layers with their candidates, and the cost of what stays as it is."""

    layers: tuple[LayerPrices, ...]
    other_macs: int
    """MACs per image of everything that is not searched, pinned layers at their pinned cost."""
    other_params: int
    dense_macs: int
    """MACs per image of the whole dense network."""
    dense_params: int
    pinned: tuple[tuple[str, Conv, Candidate], ...] = ()
    """Layers fixed by the user, with their geometry and one candidate; their cost is part of ``other_macs``."""
    timing: Timing | None = None
    """None where no latencies were measured."""
    other_bits: int = FLOAT_BITS
    """Of each weight of what is not searched."""
    activation_bits: int = FLOAT_BITS

    def __hash__(self) -> int:
        # Strategies look up at every proposal what they worked out for a table: hashing all its numbers takes longer.
        return hash((self.dense_macs, self.other_macs, *((layer.name, len(layer.candidates)) for layer in self.layers)))

    @property
    def size(self) -> int:
        """How many different rank maps the table spans."""
        return prod(len(layer.candidates) for layer in self.layers)

    @property
    def dense(self) -> tuple[int, ...]:
        """The choices that leave every searched layer dense."""
        return tuple(len(layer.candidates) - 1 for layer in self.layers)

    def gated(self, formats: Sequence[str] = GATEABLE) -> tuple[int, ...]:
        """What a funnel run starts from: of each layer the dearest candidate of the first of the formats that it has.

        Layers that have none, and grouped ones, whose gates would differ from group to group, are left dense.
        """
        choices = []
        for layer in self.layers:
            last = {candidate.format: i for i, candidate in enumerate(layer.candidates)}
            found = [last[name] for name in formats if name in last and name in GATEABLE]
            choices.append(found[0] if found and layer.conv.groups == 1 else len(layer.candidates) - 1)
        return tuple(choices)

    def picked(self, choices: Sequence[int]) -> dict[str, Candidate]:
        """Layer name to candidate, pinned layers included."""
        named = {layer.name: layer.candidates[i] for layer, i in zip(self.layers, choices, strict=True)}
        return named | {name: candidate for name, _, candidate in self.pinned}

    @property
    def convs(self) -> dict[str, Conv]:
        """Geometry of the searched and the pinned layers."""
        return {layer.name: layer.conv for layer in self.layers} | {name: conv for name, conv, _ in self.pinned}

    def macs(self, choices: Sequence[int]) -> int:
        """MACs per image of the whole network under these choices."""
        return self.other_macs + sum(layer.candidates[i].macs for layer, i in zip(self.layers, choices, strict=True))

    def params(self, choices: Sequence[int]) -> int:
        """Parameters of the whole network under these choices."""
        return self.other_params + sum(
            layer.candidates[i].params for layer, i in zip(self.layers, choices, strict=True)
        )

    def bit_operations(self, choices: Sequence[int]) -> int:
        """Over the whole network, per image: MACs times the bits of their weight times those of their activation.

        A quantised network is ``dense_bit_operations`` before it is compressed, in float32.
        """
        picked = (layer.candidates[i] for layer, i in zip(self.layers, choices, strict=True))
        return self.activation_bits * (self.other_macs * self.other_bits + sum(c.macs * c.bits for c in picked))

    @property
    def dense_bit_operations(self) -> int:
        """Of the whole dense network in float32."""
        return self.dense_macs * FLOAT_BITS**2

    def latency_ms(self, choices: Sequence[int]) -> float | None:
        """Predicted milliseconds of one batch under these choices; None where no latencies were measured."""
        if self.timing is None:
            return None
        picked = [layer.candidates[i].latency_ms or 0.0 for layer, i in zip(self.layers, choices, strict=True)]
        return self.timing.other_ms + sum(picked)

    def latency_ratio(self, choices: Sequence[int]) -> float:
        """Predicted latency under these choices, as a share of the dense network's; 0 where none was measured."""
        return 0.0 if self.timing is None else (self.latency_ms(choices) or 0.0) / self.timing.dense_ms

    @property
    def fastest(self) -> tuple[int, ...]:
        """The rank map of least predicted latency; the cheapest where none was measured."""
        return tuple(
            min(range(len(x.candidates)), key=lambda i: x.candidates[i].latency_ms or 0.0) for x in self.layers
        )

    @property
    def least_latency_ratio(self) -> float:
        """Of the fastest rank map; 0 where none was measured."""
        return self.latency_ratio(self.fastest)

    def macs_ratio(self, choices: Sequence[int]) -> float:
        """MACs under these choices, as a share of the dense network's."""
        return self.macs(choices) / self.dense_macs

    @property
    def least_macs(self) -> int:
        """MACs of the cheapest rank map."""
        return self.macs([0] * len(self.layers))

    def to_json(self) -> dict[str, Any]:
        """A dict of JSON types; ``from_json`` reads it back."""
        return {
            "layers": [
                {
                    "name": x.name,
                    "conv": x.conv.to_json(),
                    "candidates": [asdict(c) for c in x.candidates],
                    "spectra": [[name, list(values)] for name, values in x.spectra],
                }
                for x in self.layers
            ],
            "other_macs": self.other_macs,
            "other_params": self.other_params,
            "dense_macs": self.dense_macs,
            "dense_params": self.dense_params,
            "pinned": [[name, conv.to_json(), asdict(candidate)] for name, conv, candidate in self.pinned],
            "timing": None if self.timing is None else asdict(self.timing),
            "other_bits": self.other_bits,
            "activation_bits": self.activation_bits,
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Self:
        """The table written by ``to_json``, also where prices, spectra and latencies were not known of yet."""
        timing = data.get("timing")
        return cls(
            layers=tuple(
                LayerPrices(
                    name=x["name"],
                    conv=Conv.from_json(x["conv"]),
                    candidates=tuple(_candidate(c) for c in x["candidates"]),
                    spectra=tuple((name, tuple(values)) for name, values in x.get("spectra", ())),
                )
                for x in data["layers"]
            ),
            other_macs=data["other_macs"],
            other_params=data["other_params"],
            dense_macs=data["dense_macs"],
            dense_params=data["dense_params"],
            pinned=tuple((name, Conv.from_json(conv), _candidate(c)) for name, conv, c in data["pinned"]),
            timing=None if timing is None else Timing(**timing),
            other_bits=data.get("other_bits", FLOAT_BITS),
            activation_bits=data.get("activation_bits", FLOAT_BITS),
        )


def unfolding_shape(conv: Conv, name: str) -> tuple[int, int]:
    """Rows and columns of an unfolding of the kernel ``(T, S, h, w)`` of each group.

    ``in``: S x (T h w). ``out``: T x (S h w). ``row``: (S h) x (T w), as ``spatial-svd`` splits it.
    """
    t, s, h, *rest = conv.group.weight_shape
    w = prod(rest)
    return {"in": (s, t * h * w), "out": (t, s * h * w), "row": (s * h, t * w)}[name]


def _candidate(data: dict[str, Any]) -> Candidate:
    prices = tuple((name, price) for name, price in data.get("prices", ()))
    return Candidate(**{**data, "ranks": tuple(data["ranks"]), "prices": prices})
