"""Prices of all candidates from those of some: of functions that are known, and what holds whatever the prices."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from math import inf, isfinite, log, prod

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ranksearch.interpolation import interpolated, sampled
from ranksearch.table import Candidate, LayerPrices, PriceTable
from tests.tables import price_table

Found = dict[str, list[dict[str, float]]]
RANKS = {"svd": 1, "tucker2": 2, "tensor-train": 3}


def table(most: int = 12) -> PriceTable:
    """Two layers in formats of one to three ranks, one of them in two widths; errors fall as ranks rise."""

    def of(layer: LayerPrices) -> LayerPrices:
        found = []
        for form, count in RANKS.items():
            for ranks in np.ndindex(*[most if count == 1 else max(2, most // (2 * count))] * count):
                own = tuple(4 * (r + 1) for r in ranks)
                error = sum(1 / (1 + r) for r in own) / count
                macs = 10 * prod(own)
                found += [
                    Candidate(format=form, ranks=own, macs=macs + bits, params=prod(own), error=error, bits=bits)
                    for bits in ((32, 8) if form == "svd" else (32,))
                ]
        found.sort(key=lambda c: c.macs)
        dense = replace(layer.candidates[-1], macs=found[-1].macs + 1)
        return replace(layer, candidates=(*found, dense))

    made = price_table(2, 3)
    return replace(made, layers=tuple(of(layer) for layer in made.layers))


def priced(some: PriceTable, price: Callable[[Candidate], float], name: str = "divergence") -> Found:
    return {layer.name: [{name: 0.0 if c.dense else price(c)} for c in layer.candidates] for layer in some.layers}


def series(layer: LayerPrices) -> Counter[tuple[str, int]]:
    return Counter((c.format, c.bits) for c in layer.candidates if not c.dense)


@given(st.integers(2, 9), st.integers(1, 14))
def test_each_format_and_width_keeps_so_many_candidates_a_rank_with_both_ends(points: int, most: int) -> None:
    whole = table(most)
    some = sampled(whole, points)
    for layer, kept in zip(whole.layers, some.layers, strict=True):
        assert kept.candidates[-1].dense
        assert set(kept.candidates) <= set(layer.candidates)
        assert series(kept) == {(f, b): min(points * RANKS[f], count) for (f, b), count in series(layer).items()}
        for form, bits in series(layer):
            alike = [[c.error for c in x.candidates if (c.format, c.bits) == (form, bits)] for x in (layer, kept)]
            assert min(alike[0]) == min(alike[1])
            assert max(alike[0]) == max(alike[1])


def test_the_candidates_of_two_ranks_are_spread_over_both() -> None:
    """By the error alone those of one rank could all be left out."""
    whole = table(40)
    for layer in sampled(whole, 6).layers:
        kept = np.log([c.ranks for c in layer.candidates if c.format == "tucker2"])
        every = np.log([c.ranks for c in whole.layers[0].candidates if c.format == "tucker2"])
        far = np.linalg.norm(every[:, None] - kept[None], axis=2).min(1)
        assert far.max() < 0.35 * np.ptp(every)


def test_none_measures_all() -> None:
    whole = table()
    assert sampled(whole, None) == whole
    found = priced(whole, lambda c: 2 * c.error**1.3)
    assert interpolated(whole, None, found) == found


PRICES: dict[str, Callable[[Candidate], float]] = {
    "a power of the error": lambda c: 3 * c.error**1.4,
    "one rank alone": lambda c: 0.5 / c.ranks[0] ** 1.2,
    "both, unlike": lambda c: 0.3 * c.error * c.ranks[-1] ** -0.7,
    "a rank that is too small": lambda c: 0.02 + 1.5 / c.ranks[0] ** 2,
}


@pytest.mark.parametrize("price", PRICES.values(), ids=PRICES)
def test_smooth_prices_are_found_again(price: Callable[[Candidate], float]) -> None:
    whole = table(24)

    def off(points: int) -> float:
        found = interpolated(whole, points, priced(sampled(whole, points), price))
        exact = priced(whole, price)
        pairs = [(a["divergence"], b["divergence"]) for n in exact for a, b in zip(found[n], exact[n], strict=True)]
        return float(np.sqrt(np.mean([log(a / b) ** 2 for a, b in pairs if b])))

    # What is taken from the nearest measured candidate instead is off by 0.10 to 0.25.
    assert off(6) < 0.08
    assert off(12) < off(3)


def test_a_price_falls_where_the_error_falls() -> None:
    """A kernel of few large singular values, whose ranks alone do not say where those end."""
    whole = table(40)

    def cliff(candidate: Candidate) -> Candidate:
        rank = candidate.ranks[0] if candidate.ranks else 0
        return replace(candidate, error=0.9 - rank / 1000 if rank < 50 else 0.01 + 0.1 / rank) if rank else candidate

    whole = replace(
        whole,
        layers=tuple(replace(x, candidates=tuple(cliff(c) for c in x.candidates)) for x in whole.layers),
    )
    found = interpolated(whole, 6, priced(sampled(whole, 6), lambda c: c.error))
    for layer in whole.layers:
        for candidate, row in zip(layer.candidates, found[layer.name], strict=True):
            if candidate.format == "svd":
                assert row["divergence"] == pytest.approx(candidate.error, rel=0.5)


def test_losses_may_fall_below_nothing() -> None:
    whole = table(24)
    exact = priced(whole, lambda c: 0.4 * (c.error - 0.05), "loss")
    found = interpolated(whole, 6, priced(sampled(whole, 6), lambda c: 0.4 * (c.error - 0.05), "loss"))
    for name, rows in exact.items():
        pairs = [(a["loss"], b["loss"]) for a, b in zip(found[name], rows, strict=True)]
        assert min(b for _, b in pairs) < 0 < max(b for _, b in pairs)
        assert max(abs(a - b) for a, b in pairs) < 0.01


@given(st.integers(2, 9), st.integers(0, 2**32 - 1))
def test_measured_prices_are_kept_and_the_others_lie_between_them(points: int, seed: int) -> None:
    whole, rng = table(), np.random.default_rng(seed)
    some = sampled(whole, points)
    prices = {
        layer.name: [{"divergence": float(rng.lognormal()), "drop": float(rng.normal())} for _ in layer.candidates]
        for layer in some.layers
    }
    found = interpolated(whole, points, prices)
    for layer, kept in zip(whole.layers, some.layers, strict=True):
        measured = dict(zip(kept.candidates, prices[layer.name], strict=True))
        for candidate, row in zip(layer.candidates, found[layer.name], strict=True):
            assert candidate not in measured or row == measured[candidate]
            alike = [c for c in measured if (c.format, c.bits) == (candidate.format, candidate.bits)]
            for name, value in row.items():
                known = [measured[c][name] for c in alike]
                assert min(known) <= value <= max(known), "a divergence is never negative"
            assert list(row) == ["divergence", "drop"]


def test_what_lies_nearest_to_one_that_broke_the_network_breaks_it_too() -> None:
    whole = table(24)
    some = sampled(whole, 6)
    smallest = 4  # a rank this small breaks the network

    def price(candidate: Candidate) -> float:
        return inf if candidate.format == "tucker2" and candidate.ranks[0] == smallest else candidate.error

    found = interpolated(whole, 6, priced(some, price))
    for layer in whole.layers:
        rows = [row["divergence"] for row in found[layer.name]]
        broken = [c for c, value in zip(layer.candidates, rows, strict=True) if not isfinite(value)]
        assert {c.format for c in broken} == {"tucker2"}
        assert {c.ranks[0] for c in broken} <= {smallest, 2 * smallest}
        assert {c for c in layer.candidates if c.format == "tucker2" and c.ranks[0] == smallest} <= set(broken)
    all_broken = interpolated(whole, 2, priced(sampled(whole, 2), lambda c: inf))
    assert all(row["divergence"] == inf for rows in all_broken.values() for row in rows[:-1])


def test_exact_factors_cost_nothing() -> None:
    """They have no error, and their divergence is nothing, or rounding, of either sign."""
    whole = table()
    exact = replace(
        whole,
        layers=tuple(
            replace(layer, candidates=tuple(replace(c, error=0.0) for c in layer.candidates)) for layer in whole.layers
        ),
    )
    found = interpolated(exact, 2, priced(sampled(exact, 2), lambda c: 1e-12 if c.ranks[0] % 8 else -1e-12))
    assert all(abs(row["divergence"]) < 1e-11 for rows in found.values() for row in rows)
