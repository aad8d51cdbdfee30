"""Prices of all candidates from those of some: against SciPy's interpolation, and what holds whatever the prices."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from math import inf, isinf

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.interpolate import make_interp_spline

from ranksearch.interpolation import interpolated, sampled
from ranksearch.table import Candidate, LayerPrices, PriceTable
from tests.tables import price_table

Found = dict[str, list[dict[str, float]]]


def table(candidates: int = 20) -> PriceTable:
    """Two layers in two formats, one of them in two widths; the formats' errors differ by a factor."""

    def more(layer: LayerPrices) -> LayerPrices:
        own, dense = layer.candidates[:-1], layer.candidates[-1]
        other = [replace(c, format="tucker2", ranks=c.ranks * 2, macs=c.macs + 1, error=c.error / 3) for c in own[::2]]
        narrow = [replace(c, bits=4, error=c.error + 0.02) for c in own[::3]]
        return replace(layer, candidates=(*sorted((*own, *other, *narrow), key=lambda c: c.macs), dense))

    made = price_table(2, candidates)
    return replace(made, layers=tuple(more(layer) for layer in made.layers))


def priced(some: PriceTable, price: dict[str, float]) -> Found:
    """Of every candidate ``scale * error ** power``, of the loss a tenth less."""

    def of(candidate: Candidate) -> dict[str, float]:
        value = price["scale"] * candidate.error ** price["power"]
        return {"divergence": value, "loss": 0.0 if candidate.dense else value - price["scale"] / 10}

    return {layer.name: [of(candidate) for candidate in layer.candidates] for layer in some.layers}


def series(layer: LayerPrices) -> Counter[tuple[str, int]]:
    return Counter((c.format, c.bits) for c in layer.candidates if not c.dense)


@given(st.integers(2, 9), st.integers(2, 25))
def test_each_format_and_width_keeps_so_many_candidates_with_both_ends(points: int, candidates: int) -> None:
    whole = table(candidates)
    some = sampled(whole, points)
    for layer, kept in zip(whole.layers, some.layers, strict=True):
        assert kept.candidates[-1].dense
        assert set(kept.candidates) <= set(layer.candidates)
        assert series(kept) == {key: min(points, count) for key, count in series(layer).items()}
        for form, bits in series(layer):
            alike = [[c.error for c in x.candidates if (c.format, c.bits) == (form, bits)] for x in (layer, kept)]
            assert min(alike[0]) == min(alike[1])
            assert max(alike[0]) == max(alike[1])


def test_none_measures_all() -> None:
    whole = table()
    assert sampled(whole, None) == whole
    found = priced(whole, {"scale": 2.0, "power": 1.3})
    assert interpolated(whole, None, found) == found


@given(st.integers(2, 9), st.floats(0.3, 1.5), st.floats(1.0, 50.0))
def test_a_power_of_the_error_is_found_again(points: int, power: float, scale: float) -> None:
    whole, price = table(), {"scale": scale, "power": power}
    found = interpolated(whole, points, priced(sampled(whole, points), price))
    for name, rows in priced(whole, price).items():
        assert [row["divergence"] for row in found[name]] == pytest.approx([row["divergence"] for row in rows])
        assert found[name][-1] == rows[-1]


@given(st.integers(2, 9), st.integers(0, 2**32 - 1))
def test_prices_lie_on_lines_and_the_measured_ones_are_kept(points: int, seed: int) -> None:
    whole, rng = table(), np.random.default_rng(seed)
    some = sampled(whole, points)
    prices = {
        layer.name: [
            {"divergence": rng.lognormal(), "drop": rng.normal()} if not c.dense else {"divergence": 0.0, "drop": 0.0}
            for c in layer.candidates
        ]
        for layer in some.layers
    }
    found = interpolated(whole, points, prices)
    for layer, kept in zip(whole.layers, some.layers, strict=True):
        measured = dict(zip(kept.candidates, prices[layer.name], strict=True))
        for form, bits in series(layer):
            known = sorted((c for c in measured if (c.format, c.bits) == (form, bits)), key=lambda c: c.error)
            x = np.log([c.error for c in known])
            lines = {
                "divergence": make_interp_spline(x, np.log([measured[c]["divergence"] for c in known]), k=1),
                "drop": make_interp_spline(x, [measured[c]["drop"] for c in known], k=1),
            }
            for candidate, row in zip(layer.candidates, found[layer.name], strict=True):
                if (candidate.format, candidate.bits) == (form, bits):
                    assert np.log(row["divergence"]) == pytest.approx(lines["divergence"](np.log(candidate.error)))
                    assert row["drop"] == pytest.approx(lines["drop"](np.log(candidate.error)))
        for candidate, row in zip(layer.candidates, found[layer.name], strict=True):
            assert candidate not in measured or row == measured[candidate]


def test_between_one_that_broke_the_network_and_another_all_break_it() -> None:
    whole = table()
    some = sampled(whole, 3)
    prices = priced(some, {"scale": 1.0, "power": 1.0})
    first = some.layers[0]
    worst = max((c for c in first.candidates if c.format == "svd" and c.bits == 32), key=lambda c: c.error)
    prices[first.name][first.candidates.index(worst)] = {"divergence": inf, "loss": inf}
    found = interpolated(whole, 3, prices)
    known = sorted(c.error for c in first.candidates if c.format == "svd" and c.bits == 32)
    for candidate, row in zip(whole.layers[0].candidates, found[first.name], strict=True):
        broken = candidate.format == "svd" and candidate.bits == 32 and candidate.error > known[1]
        assert isinf(row["divergence"]) == isinf(row["loss"]) == broken
    assert not any(isinf(row["divergence"]) for row in found[whole.layers[1].name])


def test_nothing_lost_has_a_price() -> None:
    """Factors that are exact have no error, and their divergence is nothing, or rounding."""
    whole = table()
    exact = replace(
        whole,
        layers=tuple(
            replace(layer, candidates=tuple(replace(c, error=0.0) for c in layer.candidates)) for layer in whole.layers
        ),
    )
    found = interpolated(exact, 4, priced(sampled(exact, 4), {"scale": 1.0, "power": 1.0}))
    assert all(0 <= row["divergence"] <= 1e-8 for rows in found.values() for row in rows)
