"""Price tables: sums over layers and choices within limits, against counting by hand."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ranksearch.table import LayerPrices, PriceTable
from tests.tables import STEM_MACS, STEM_PARAMS, price_table

tables = st.builds(price_table, st.integers(1, 6), st.integers(1, 6), st.integers(0, 3))


@st.composite
def tables_and_choices(draw: st.DrawFn) -> tuple[PriceTable, tuple[int, ...]]:
    table = draw(tables)
    return table, tuple(draw(st.integers(0, len(layer.candidates) - 1)) for layer in table.layers)


@given(tables_and_choices())
def test_a_rank_map_costs_the_sum_of_its_layers(drawn: tuple[PriceTable, tuple[int, ...]]) -> None:
    table, choices = drawn
    picked = table.picked(choices)
    assert list(picked) == [f"layer{i}" for i in range(len(table.layers))]
    assert table.macs(choices) == STEM_MACS + sum(candidate.macs for candidate in picked.values())
    assert table.params(choices) == STEM_PARAMS + sum(candidate.params for candidate in picked.values())
    assert table.least_macs <= table.macs(choices) <= table.dense_macs == table.macs(table.dense)


@given(tables)
def test_json_gives_the_table_back(table: PriceTable) -> None:
    assert PriceTable.from_json(json.loads(json.dumps(table.to_json()))) == table


@given(tables, st.floats(0, 1))
def test_within_a_limit_no_affordable_candidate_errs_less(table: PriceTable, share: float) -> None:
    for layer in table.layers:
        limit = share * layer.conv.macs
        affordable = [candidate for candidate in layer.candidates if candidate.macs <= limit]
        chosen = layer.candidates[layer.within(limit)]
        if affordable:
            assert chosen in affordable
            assert chosen.error == min(candidate.error for candidate in affordable)
        else:
            assert chosen == layer.candidates[0]


@given(tables, st.floats(0, 1))
def test_no_candidate_within_the_error_is_cheaper_than_the_cheapest(table: PriceTable, error: float) -> None:
    for layer in table.layers:
        chosen = layer.candidates[layer.cheapest(error)]
        assert chosen.error <= error
        assert chosen.macs == min(candidate.macs for candidate in layer.candidates if candidate.error <= error)


@given(tables)
def test_a_layer_must_end_with_dense_and_rise_in_macs(table: PriceTable) -> None:
    layer = table.layers[0]
    for wrong in ((), layer.candidates[:-1], layer.candidates[::-1]):
        if wrong != layer.candidates:
            with pytest.raises(ValueError, match=layer.name):
                LayerPrices(name=layer.name, conv=layer.conv, candidates=wrong)
