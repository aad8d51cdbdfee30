"""Spectra of kernels against NumPy's SVD of the unfoldings."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from ranksearch.space import StrategySpec
from ranksearch.spectra import spectra, with_spectra
from ranksearch.stages import geometry, kernel_of
from ranksearch.strategies import READ_SPECTRA, STRATEGIES, Terms, build_strategy
from ranksearch.table import LayerPrices, PriceTable, unfolding_shape
from ranksearch.trial import Proposal
from tests.tables import price_table, spectra_of


@pytest.mark.parametrize("layer", [nn.Conv2d(8, 12, 3), nn.Conv2d(8, 6, (1, 5)), nn.Linear(16, 10)])
def test_spectra_are_those_of_the_unfoldings(layer: nn.Module) -> None:
    shape = (1, 16) if isinstance(layer, nn.Linear) else (1, 8, 9, 9)
    conv, (weight, _) = geometry(layer, shape), kernel_of(layer)
    found = dict(spectra(conv, weight))
    for name, values in spectra_of(weight.double().numpy()):
        np.testing.assert_allclose(found[name], values, rtol=1e-9, atol=1e-9)
    for name in ("in", "out", "row"):
        assert len(found[name]) == min(unfolding_shape(conv, name))


def test_of_groups_the_largest_values_are_given() -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(8, 12, 3, groups=2)
    conv, (weight, _) = geometry(layer, (1, 8, 9, 9)), kernel_of(layer)
    halves = [dict(spectra_of(half.double().numpy())) for half in weight.chunk(2)]
    for name, values in spectra(conv, weight):
        np.testing.assert_allclose(values, np.maximum(*(half[name] for half in halves)), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", sorted(READ_SPECTRA))
def test_the_strategies_that_read_them_propose(name: str) -> None:
    assert name in STRATEGIES
    torch.manual_seed(0)
    priced = price_table(3, 6)
    layers = tuple(LayerPrices(name=str(i), conv=x.conv, candidates=x.candidates) for i, x in enumerate(priced.layers))
    model = nn.Sequential(*(nn.Conv2d(x.conv.in_channels, x.conv.out_channels, 3, padding=1) for x in layers))
    bare = PriceTable(
        layers=layers,
        other_macs=priced.other_macs,
        other_params=priced.other_params,
        dense_macs=priced.dense_macs,
        dense_params=priced.dense_params,
    )
    table = with_spectra(bare, model)
    assert PriceTable.from_json(table.to_json()) == table
    strategy = build_strategy(StrategySpec(name=name), Terms(seed=0, objectives=("accuracy", "macs")))
    assert isinstance(strategy.propose(table, ()), Proposal)
