"""Which layers are searched, what their candidates cost, and the cache of factors."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from ranksearch.calibration import collect
from ranksearch.config import parse_space
from ranksearch.conv import Conv
from ranksearch.decompositions import FORMATS, Statistics, error, max_rank, stages
from ranksearch.errors import BudgetError, DecompositionError, RankMapError, SpaceError
from ranksearch.factors import store
from ranksearch.models.cifar_resnet import resnet20
from ranksearch.pricing import Factors, Selection, decompose, price, select
from ranksearch.rankmap import LayerRanks
from ranksearch.space import Space
from ranksearch.surgery import apply_rank_map, skeleton
from ranksearch.table import DENSE, PriceTable
from tests import oracles
from tests.networks import SharedNet, SmallNet, small_images, small_net
from tests.tables import rank_map

WEIGHTS_ONLY = {"factors": "weight-only"}
ALL = ["tucker2", "svd", "spatial-svd", "channel-svd"]
FEW = {"ratios": [0.25, 0.5, 0.75]}


def space_of(**sections: object) -> Space:
    return parse_space({"model": {"name": "net"}, "evaluation": WEIGHTS_ONLY, "formats": ALL, "ranks": FEW, **sections})


def priced(
    space: Space,
    net: nn.Module,
    shape: tuple[int, int, int],
    cache: Path,
    statistics: dict[str, Statistics] | None = None,
) -> tuple[PriceTable, Selection, Factors]:
    selection = select(space, net, shape)
    factors, failed = decompose(space, selection, net, statistics or {}, cache=cache)
    assert not failed
    return price(space, selection, factors)[0], selection, factors


def random_choices(table: PriceTable, count: int) -> Iterator[tuple[int, ...]]:
    rng = np.random.default_rng(0)
    yield table.dense
    yield (0,) * len(table.layers)
    for _ in range(count):
        yield tuple(int(rng.integers(len(layer.candidates))) for layer in table.layers)


@pytest.mark.parametrize("shortcut", ["A", "B"])
def test_the_macs_of_a_proposal_are_those_counted_on_resnet20(tmp_path: Path, shortcut: str) -> None:
    net, shape = resnet20(shortcut=shortcut).eval(), (3, 32, 32)
    pin = {"layer2.0.conv2": {"format": "channel-svd", "ranks": [7]}, "layer1.0.*": "dense"}
    table, _, _ = priced(space_of(fix=pin, layers={"min_share": 0}), net, shape, tmp_path)
    assert len(table.layers) == 15 + 2 * (shortcut == "B")
    images = torch.randn(1, *shape)
    assert table.dense_macs == table.macs(table.dense) + oracles.macs(
        net.layer2[0].conv2, torch.zeros(1, 32, 16, 16)
    ) - (table.pinned[0][2].macs)
    for choices in random_choices(table, 6):
        chosen = rank_map(table, choices, "net", shape)
        for built in (skeleton(chosen, net), apply_rank_map(chosen, net)):
            assert table.macs(choices) == oracles.macs(built, images)
            assert table.params(choices) == sum(p.numel() for p in built.parameters())


def test_the_macs_of_a_proposal_are_those_counted_on_every_kind_of_layer(tmp_path: Path) -> None:
    net = small_net()
    space = space_of(layers={"include": ["*"], "exclude": ["head"]})
    table, _, _ = priced(space, net, SmallNet.shape, tmp_path)
    for choices in random_choices(table, 10):
        built = skeleton(rank_map(table, choices, "net", SmallNet.shape), net)
        assert table.macs(choices) == oracles.macs(built, small_images(1))
        assert table.params(choices) == sum(p.numel() for p in built.parameters())


def test_layers_stay_dense_for_a_reason() -> None:
    selection = select(space_of(), small_net(), SmallNet.shape)
    assert selection.searched == {
        "body.plain": ("tucker2", "spatial-svd", "channel-svd"),
        "body.strided": ("tucker2", "spatial-svd", "channel-svd"),
        "body.point": ("svd",),
        "body.grouped": ("tucker2", "spatial-svd", "channel-svd"),
        "tokens": ("svd",),
    }
    reasons = {"stem": "stem", "head": "classifier", "body.depthwise": "depthwise"}
    assert selection.dense.keys() == reasons.keys()
    assert all(word in selection.dense[name] for name, word in reasons.items())
    assert selection.macs == oracles.macs(small_net(), small_images(1))


def test_patterns_choose_the_layers() -> None:
    layers = {"include": ["stem", "body.*"], "exclude": ["*.point"], "min_share": 0.9}
    selection = select(space_of(layers=layers, fix={"body.plain": "dense"}), small_net(), SmallNet.shape)
    assert list(selection.searched) == ["stem", "body.strided", "body.grouped"]
    assert selection.dense["body.point"] == "excluded"
    assert selection.dense["body.plain"] == "pinned to dense"
    assert selection.dense["tokens"] == "not included"


def test_small_and_shared_layers_are_left_out() -> None:
    shares = select(space_of(layers={"min_share": 0.1}), small_net(), SmallNet.shape)
    assert "under layers.min_share" in shares.dense["tokens"]
    shared = select(space_of(layers={"include": ["*"]}), SharedNet(), SharedNet.shape)
    assert "run 3 times" in shared.dense["shared"]
    assert list(shared.searched) == ["first", "last"]


@pytest.mark.parametrize(
    ("sections", "address", "message"),
    [
        ({"layers": {"include": ["nothing.*"]}}, "$.layers.include[0]", "must match at least one layer"),
        ({"layers": {"exclude": ["body.*", "x"]}}, "$.layers.exclude[1]", "must match at least one layer"),
        ({"fix": {"x.*": "dense"}}, "$.fix.x.*", "must match at least one layer"),
        ({"formats": ["tucker2", "cpd"]}, "$.formats[1]", "Take one of tucker2"),
        ({"fix": {"stem": {"format": "x", "ranks": [1]}}}, "$.fix.stem.format", "must be known"),
        ({"fix": {"stem": {"format": "tucker2", "ranks": [4, 8]}}}, "$.fix (stem)", r"to (3, 8)"),
        ({"fix": {"body.*": {"format": "svd", "ranks": [1]}}}, "$.fix (body.plain)", "svd is for 1x1"),
        ({"layers": {"include": ["body.depthwise"]}}, "$.layers", "at least one layer must be searched"),
        ({"formats": ["svd"], "layers": {"exclude": ["body.*", "tokens"]}}, "$.layers", "excluded"),
    ],
)
def test_a_space_that_does_not_fit_the_network_is_refused(
    sections: dict[str, object], address: str, message: str
) -> None:
    with pytest.raises(SpaceError) as caught:
        select(space_of(**sections), small_net(), SmallNet.shape)
    found = {problem.address: str(problem) for problem in caught.value.problems}
    assert message in found[address]


def test_a_pin_on_a_shared_layer_is_refused() -> None:
    with pytest.raises(SpaceError, match="run 3 times"):
        select(space_of(fix={"shared": {"format": "tucker2", "ranks": [2, 2]}}), SharedNet(), SharedNet.shape)


def test_candidates_are_those_that_no_other_of_their_format_beats(tmp_path: Path) -> None:
    net = small_net()
    space = space_of(ranks={"ratios": [0.2, 0.4, 0.6, 0.8, 1.0]})
    table, selection, factors = priced(space, net, SmallNet.shape, tmp_path)
    for layer in table.layers:
        expected = [(float(layer.conv.macs), 0.0, DENSE)]
        for form in selection.searched[layer.name]:
            prepared = factors[layer.name, form, "weight-only"]
            bounds = max_rank(FORMATS[form], layer.conv)
            offered = set()
            for ratios in itertools.product(space.ranks.ratios, repeat=len(bounds)):
                ranks = tuple(int(np.ceil(round(r * b, 6))) for r, b in zip(ratios, bounds, strict=True))
                macs = sum(stage.macs for stage in stages(FORMATS[form], layer.conv, ranks))
                offered.add((float(macs), error(FORMATS[form], layer.conv, prepared, ranks)))
            cheaper = oracles.unbeaten([point for point in offered if point[0] < layer.conv.macs])
            expected += [(*point, form) for point in cheaper]
        assert sorted((c.macs, c.error, c.format) for c in layer.candidates) == sorted(expected)
        assert [c.macs for c in layer.candidates] == sorted(c.macs for c in layer.candidates)


def test_the_ranks_of_a_users_map_are_candidates_beside_all_others(tmp_path: Path) -> None:
    net = small_net()
    table, selection, factors = priced(space_of(), net, SmallNet.shape, tmp_path)
    name, conv = next((layer.name, layer.conv) for layer in table.layers if conv_takes_tucker2(layer.conv))
    given = (max_rank(FORMATS["tucker2"], conv)[0], 1)  # one channel out: any other candidate beats it
    known = next(layer.candidates for layer in table.layers if layer.name == name)
    assert given not in {c.ranks for c in known if c.format == "tucker2"}
    theirs = rank_map(table, table.dense, "net", SmallNet.shape)
    layer = LayerRanks(format="tucker2", ranks=given, conv=conv.to_json(), macs=1, params=1)
    wider, _ = price(space_of(), selection, factors, [theirs.model_copy(update={"layers": {name: layer}})])
    for before, after in zip(table.layers, wider.layers, strict=True):
        fresh = [c for c in after.candidates if c not in before.candidates]
        assert [(c.format, c.ranks) for c in fresh] == ([("tucker2", given)] if before.name == name else [])
        assert [c for c in after.candidates if c not in fresh] == list(before.candidates)
    dear = layer.model_copy(update={"ranks": max_rank(FORMATS["tucker2"], conv)})
    with pytest.raises(RankMapError, match=rf"less than dense, found tucker2 .* for {name} at .*Leave the layer out"):
        price(space_of(), selection, factors, [theirs.model_copy(update={"layers": {name: dear}})])
    impossible = layer.model_copy(update={"ranks": (1000, 1)})
    with pytest.raises(RankMapError, match=rf"tucker2 \(1000, 1\) for {name}.*Remove the map"):
        price(space_of(), selection, factors, [theirs.model_copy(update={"layers": {name: impossible}})])


def conv_takes_tucker2(conv: Conv) -> bool:
    return not conv.linear and conv.kernel != (1, 1) and conv.groups == 1


def test_ranks_are_rounded_up_to_a_multiple_within_the_bound(tmp_path: Path) -> None:
    spec = {"ratios": [1e-9, 0.3, 0.6, 0.95], "rank_multiple": 8}
    net, shape = resnet20().eval(), (3, 32, 32)
    table, _, _ = priced(space_of(ranks=spec, formats=["tucker2"]), net, shape, tmp_path)
    ranks = {(rank, bound) for layer in table.layers for c in layer.candidates[:-1] for rank, bound in
             zip(c.ranks, FORMATS["tucker2"].max_rank(layer.conv), strict=True)}  # fmt: skip
    assert {rank for rank, bound in ranks if bound == 64} == {8, 24, 40, 64}
    assert all(rank % 8 == 0 for rank, _ in ranks)


def test_joint_ranks_follow_one_ratio(tmp_path: Path) -> None:
    ratios = [0.25, 0.5, 0.75]
    net = resnet20().eval()
    space = space_of(ranks={"ratios": ratios, "joint": True}, formats=["tucker2"])
    table, _, _ = priced(space, net, (3, 32, 32), tmp_path)
    for layer in table.layers:
        sizes = np.array([layer.conv.in_channels, layer.conv.out_channels])
        expected = [tuple(int(r) for r in np.ceil(ratio * sizes)) for ratio in ratios]
        offered = [c.ranks for c in layer.candidates[:-1]]
        assert offered == expected[: len(offered)]
        assert len(offered) >= 2


def test_a_budget_that_no_rank_map_meets_names_the_least(tmp_path: Path) -> None:
    net = small_net()
    table, selection, factors = priced(space_of(), net, SmallNet.shape, tmp_path)
    least = min(
        oracles.macs(skeleton(rank_map(table, c, "net", SmallNet.shape), net), small_images(1))
        for c in [(0,) * len(table.layers), *random_choices(table, 20)]
    )
    share = least / table.dense_macs
    price(space_of(budget={"max_macs_ratio": share + 1e-9}), selection, factors)
    with pytest.raises(BudgetError, match=f"{share:.3f} of the MACs"):
        price(space_of(budget={"max_macs_ratio": share - 1e-3}), selection, factors)


def test_factors_come_from_the_cache_and_broken_entries_are_made_again(tmp_path: Path) -> None:
    net = small_net()
    space = space_of(
        evaluation={"factors": "auto"}, layers={"include": ["body.plain", "body.point"]}, formats=["tucker2", "svd"]
    )
    selection = select(space, net, SmallNet.shape)
    statistics = collect(net, selection.convs(), [small_images()])
    first, _ = decompose(space, selection, net, statistics, cache=tmp_path)
    entries = sorted((tmp_path / "factors").iterdir())
    assert len(entries) == 4
    stamps = [entry.stat().st_mtime_ns for entry in entries]
    progress: list[tuple[int, int]] = []
    decompose(space, selection, net, statistics, cache=tmp_path, progress=lambda i, n: progress.append((i, n)))
    assert progress == [(0, 2), (1, 2)]
    assert [entry.stat().st_mtime_ns for entry in entries] == stamps
    for entry, content in zip(entries, (b"", b"garbage", entries[2].read_bytes()[:-7], None), strict=True):
        if content is not None:
            entry.write_bytes(content)
    again, _ = decompose(space, selection, net, statistics, cache=tmp_path)
    assert again.keys() == first.keys()
    for key in first:
        torch.testing.assert_close(again[key], first[key], rtol=0, atol=0)
    assert sorted((tmp_path / "factors").iterdir()) == entries


def test_the_cache_tells_weights_and_statistics_apart(tmp_path: Path) -> None:
    space = space_of(
        evaluation={"factors": "activation-aware"}, layers={"include": ["body.plain"]}, formats=["tucker2"]
    )
    net = small_net()
    selection = select(space, net, SmallNet.shape)
    found = []
    for seed in (1, 2):
        statistics = collect(net, selection.convs(), [small_images(seed=seed)])
        found.append(decompose(space, selection, net, statistics, cache=tmp_path)[0])
    net.body["plain"].weight.data *= 2.0  # type: ignore[operator]
    found.append(decompose(space, selection, net, statistics, cache=tmp_path)[0])
    cores = [factors["body.plain", "tucker2", "activation-aware"]["core"] for factors in found]
    assert not torch.allclose(cores[0], cores[1])
    assert not torch.allclose(cores[1], cores[2])
    assert len(list((tmp_path / "factors").iterdir())) == 3


def test_a_layer_with_broken_weights_is_left_dense_with_the_reason(tmp_path: Path) -> None:
    net = small_net()
    net.body["plain"].weight.data[0, 0] = float("nan")
    space = space_of()
    selection = select(space, net, SmallNet.shape)
    factors, failed = decompose(space, selection, net, {}, cache=tmp_path)
    assert failed.keys() == {"body.plain"}
    assert "NaN" in failed["body.plain"]
    table, _ = price(space, selection, factors)
    assert "body.plain" not in {layer.name for layer in table.layers}
    assert table.macs(table.dense) == table.dense_macs


def test_a_pinned_layer_that_cannot_be_decomposed_stops_the_search(tmp_path: Path) -> None:
    net = small_net()
    net.body["plain"].weight.data[0, 0] = float("nan")
    space = space_of(fix={"body.plain": {"format": "tucker2", "ranks": [2, 2]}})
    with pytest.raises(DecompositionError, match=r"body\.plain, which is pinned"):
        decompose(space, select(space, net, SmallNet.shape), net, {}, cache=tmp_path)


def test_layers_whose_candidates_all_cost_more_stay_dense(tmp_path: Path) -> None:
    net = small_net()
    space = space_of(ranks={"ratios": [1.0]}, layers={"include": ["body.plain", "body.point", "tokens"]})
    selection = select(space, net, SmallNet.shape)
    factors, _ = decompose(space, selection, net, {}, cache=tmp_path)
    with pytest.raises(SpaceError, match="costs less than dense"):
        price(space, selection, factors)
    space = space_of(ranks={"values": [1, 10]}, formats=["svd", "tucker2"], layers=space.layers.model_dump())
    table, dear = price(space, selection, decompose(space, selection, net, {}, cache=tmp_path)[0])
    assert not dear
    assert {c.ranks for layer in table.layers for c in layer.candidates if c.format == "svd"} == {(1,)}


def test_ranks_may_be_given_as_numbers(tmp_path: Path) -> None:
    space = space_of(ranks={"values": [3, 1, 100]}, formats=["tucker2"], layers={"include": ["body.plain"]})
    table, *_ = priced(space, small_net(), SmallNet.shape, tmp_path)
    offered = {c.ranks for c in table.layers[0].candidates if not c.dense}
    assert offered <= {(i, j) for i in (1, 3, 8) for j in (1, 3, 8)}
    assert (1, 1) in offered


def test_tensors_under_two_names_are_stored(tmp_path: Path) -> None:
    shared = torch.arange(6.0)
    store({"a": shared, "b": shared, "c": shared[:3]}, tmp_path / "shared.safetensors")
    found = load_file(tmp_path / "shared.safetensors")
    assert torch.equal(found["a"], shared)
    assert torch.equal(found["b"], shared)
    assert torch.equal(found["c"], shared[:3])
