"""Rank maps made by hand."""

from __future__ import annotations

from typing import Any

from torch import nn

from ranksearch.decompositions import FORMATS, compressed_stages
from ranksearch.rankmap import LayerRanks, ModelRecord, RankMap
from ranksearch.surgery import apply_rank_map, count_macs, count_params, find_layers


def rank_map_for(
    name: str, model: nn.Module, shape: tuple[int, int, int], ranks: dict[str, tuple[str, tuple[int, ...]]], **more: Any
) -> RankMap:
    """A rank map with these formats and ranks."""
    convs = {layer.name: layer.conv for layer in find_layers(model, shape)}
    layers = {}
    for layer, (form, chosen) in ranks.items():
        stages = compressed_stages(FORMATS[form], convs[layer], chosen)
        macs, params = sum(stage.macs for stage in stages), sum(stage.params for stage in stages)
        layers[layer] = LayerRanks(format=form, ranks=chosen, conv=convs[layer].to_json(), macs=macs, params=params)
    found = RankMap(
        model=ModelRecord(name=name, input_shape=shape),
        layers=layers,
        macs=1,
        params=1,
        dense_macs=count_macs(model, shape),
        dense_params=count_params(model),
        **more,
    )
    compressed = apply_rank_map(found, model)
    return found.model_copy(update={"macs": count_macs(compressed, shape), "params": count_params(compressed)})
