"""Price tables made by arithmetic, and what their rank maps score: tests of strategies and engines need no network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from itertools import pairwise
from math import exp, log10

import numpy as np
from numpy.typing import NDArray

from ranksearch.conv import Conv
from ranksearch.rankmap import LayerRanks, ModelRecord, RankMap
from ranksearch.table import DENSE, Candidate, LayerPrices, PriceTable
from ranksearch.trial import Outcome, Proposal

STEM_MACS = 442_368
STEM_PARAMS = 448
DENSE_ACCURACY = 0.92
CHANCE = 0.1


def price_table(layers: int = 18, candidates: int = 20, seed: int = 0) -> PriceTable:
    """A network of 3x3 convolutions in three widths; ``candidates`` a layer, the dense one among them.

    Each layer's spectrum falls at a rate of its own, so layers differ in how much they lose at the same MACs.
    """
    rng = np.random.default_rng([seed, layers, candidates])
    priced = []
    for i in range(layers):
        width = 16 * 2 ** (3 * i // layers)
        conv = Conv(in_channels=width, out_channels=width, kernel=(3, 3), padding=(1, 1), size=(512 // width,) * 2)
        priced.append(_layer(f"layer{i}", conv, candidates, decay=float(rng.uniform(1.5, 7.0))))
    return PriceTable(
        layers=tuple(priced),
        other_macs=STEM_MACS,
        other_params=STEM_PARAMS,
        dense_macs=STEM_MACS + sum(layer.conv.macs for layer in priced),
        dense_params=STEM_PARAMS + sum(layer.conv.params for layer in priced),
    )


def _layer(name: str, conv: Conv, candidates: int, decay: float) -> LayerPrices:
    shares = [(i + 1) / candidates for i in range(candidates - 1)]
    compressed = [
        Candidate(
            format="svd",
            ranks=(i + 1,),
            macs=int(share * conv.macs),
            params=int(share * conv.params),
            error=(exp(-decay * share) - exp(-decay)) / (1 - exp(-decay)),
        )
        for i, share in enumerate(shares)
    ]
    dense = Candidate(format=DENSE, macs=conv.macs, params=conv.params, error=0.0)
    return LayerPrices(name=name, conv=conv, candidates=(*compressed, dense))


@cache
def measured_table(layers: int = 18, candidates: int = 20, seed: int = 0) -> PriceTable:
    """:func:`price_table` with the spectra of random kernels, and what replacing one layer alone loses as prices."""
    table = price_table(layers, candidates, seed)
    dense = table_outcome(table, table.dense)
    priced = []
    for at, layer in enumerate(table.layers):
        found = []
        for i, candidate in enumerate(layer.candidates):
            outcome = table_outcome(table, (*table.dense[:at], i, *table.dense[at + 1 :]))
            loss, drop = outcome.loss - dense.loss, dense.accuracy_search - outcome.accuracy_search
            prices = (("weight", candidate.error), ("loss", loss), ("drop", drop))
            ranks = () if candidate.dense else (-(-(i + 1) * layer.conv.out_channels // candidates),)
            found.append(replace(candidate, prices=prices, ranks=ranks))
        kernel = random_kernel(layer.conv.weight_shape, rank=2 + 3 * at % 11, seed=seed + at)
        priced.append(replace(layer, candidates=tuple(found), spectra=spectra_of(kernel)))
    return replace(table, layers=tuple(priced))


def every_rank_table(channels: Sequence[int] = (8, 12, 16), seed: int = 0) -> PriceTable:
    """1x1 layers, each with every rank that costs less than dense; errors and spectra of random kernels."""
    layers = []
    for i, width in enumerate(channels):
        conv = Conv(in_channels=width, out_channels=3 * width, size=(16 >> i, 16 >> i), bias=False)
        kernel = random_kernel(conv.weight_shape, rank=3 + i, seed=seed + i)
        squares = np.square(np.linalg.svd(kernel[:, :, 0, 0], compute_uv=False))
        unit, parameters = conv.macs // (3 * width**2) * 4 * width, 4 * width
        found = [
            Candidate(
                format="svd",
                ranks=(r,),
                macs=r * unit,
                params=r * parameters,
                error=float(squares[r:].sum() / squares.sum()),
            )
            for r in range(1, width)
            if r * unit < conv.macs
        ]
        dense = Candidate(format=DENSE, macs=conv.macs, params=conv.params, error=0.0)
        layers.append(LayerPrices(name=f"fc{i}", conv=conv, candidates=(*found, dense), spectra=spectra_of(kernel)))
    macs, params = (sum(getattr(layer.conv, name) for layer in layers) for name in ("macs", "params"))
    return PriceTable(layers=tuple(layers), other_macs=0, other_params=0, dense_macs=macs, dense_params=params)


def rank_map(table: PriceTable, choices: Sequence[int], model: str, shape: tuple[int, ...]) -> RankMap:
    """The rank map of these choices, of the model called ``model`` on inputs of one shape."""
    layers = {
        name: LayerRanks(format=c.format, ranks=c.ranks, conv=table.convs[name].to_json(), macs=c.macs, params=c.params)
        for name, c in table.picked(choices).items()
        if not c.dense
    }
    return RankMap(
        model=ModelRecord(name=model, input_shape=shape),
        layers=layers,
        macs=table.macs(choices),
        params=table.params(choices),
        dense_macs=table.dense_macs,
        dense_params=table.dense_params,
    )


def random_kernel(shape: tuple[int, ...], *, rank: int, noise: float = 0.1, seed: int = 0) -> NDArray[np.float64]:
    """A kernel whose channel modes have some ``rank``, with Gaussian noise on it."""
    rng = np.random.default_rng([seed, rank])
    t, s, h, w = shape
    core = rng.standard_normal((rank, rank, h, w)) * 0.8 ** np.arange(rank)[:, None, None, None]
    outer, inner = rng.standard_normal((t, rank)), rng.standard_normal((s, rank))
    kernel: NDArray[np.float64] = np.einsum("ta,sb,abhw->tshw", outer, inner, core) / rank
    return kernel + noise * rng.standard_normal(shape)


def spectra_of(kernel: NDArray[np.float64]) -> tuple[tuple[str, tuple[float, ...]], ...]:
    """The spectra of a kernel ``(T, S, h, w)`` as the price table has them."""
    t, s, h, w = kernel.shape
    matrices = {
        "in": [kernel.transpose(1, 0, 2, 3).reshape(s, -1)],
        "out": [kernel.reshape(t, -1)],
        "row": [kernel.transpose(1, 2, 0, 3).reshape(s * h, t * w)],
    }
    for k in (1, 2, 4):
        matrices[f"columns-{k}"] = [part.reshape(t, -1) for part in np.split(kernel, k, axis=1)]
    found = {name: [np.linalg.svd(m, compute_uv=False) for m in each] for name, each in matrices.items()}
    return tuple((name, tuple(np.max(values, axis=0).tolist())) for name, values in found.items())


def proposal_outcome(table: PriceTable, proposal: Proposal) -> Outcome:
    """What a proposal scores: a rank map as :func:`table_outcome` has it, a funnel run what its settings make of it.

    It ends in the candidates of its format within one share of each layer's MACs, the target or what the strength
    leaves; training mends half of the damage at the best strength, 0.02, and the less the further from it.
    """
    if not proposal.funnel:
        return table_outcome(table, proposal.choices)
    target, strength = proposal.settings["target"], proposal.settings["strength"]
    assert isinstance(strength, float)
    share = target if isinstance(target, float) else 1 / (1 + 50 * strength)
    ended, layers = [], {}
    for layer, start in zip(table.layers, proposal.choices, strict=True):
        form = layer.candidates[start].format
        within = [i for i, c in enumerate(layer.candidates) if c.format == form and c.macs <= share * layer.conv.macs]
        ended.append(max(within, default=start if form == DENSE else 0))
        found = layer.candidates[ended[-1]]
        if not found.dense:
            kept = {"format": found.format, "ranks": found.ranks, "macs": found.macs, "params": found.params}
            layers[layer.name] = LayerRanks(**kept, conv=layer.conv.to_json()).model_dump(mode="json")
    raw = table_outcome(table, ended)
    mended = 0.5 * exp(-(log10(strength / 0.02) ** 2))
    accuracy = raw.accuracy_search + mended * (DENSE_ACCURACY - raw.accuracy_search)
    loss = raw.loss * (1 - mended)
    return replace(raw, accuracy_search=accuracy, accuracy=accuracy, loss=loss, layers=layers)


def table_outcome(table: PriceTable, choices: Sequence[int]) -> Outcome:
    """What a rank map scores: accuracy falls with the layers' weighted errors and with those of neighbours together.

    The weights are not in the table, so the predicted errors alone do not give the best rank maps.
    """
    errors = [layer.candidates[i].error for layer, i in zip(table.layers, choices, strict=True)]
    weights = [0.1 + 1.5 * ((7 * i + 3) % 10 / 10) ** 2 for i in range(len(errors))]
    damage = sum(weight * error for weight, error in zip(weights, errors, strict=True))
    damage += sum(2.0 * a * b for a, b in pairwise(errors))
    accuracy = CHANCE + (DENSE_ACCURACY - CHANCE) * exp(-damage)
    return Outcome(
        accuracy_search=accuracy,
        loss=0.3 + damage,
        macs=table.macs(choices),
        params=table.params(choices),
        seconds=0.0,
        accuracy=accuracy,
        report_images=1000,
    )
