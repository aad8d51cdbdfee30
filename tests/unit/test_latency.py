"""Latencies of candidates: what is added up, written, brought along, refused; and what a search makes of them."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import onnxruntime
import pytest
import torch
from torch import nn

from ranksearch.config import load_space
from ranksearch.conv import Conv
from ranksearch.errors import BudgetError, LatencyError, SpaceError
from ranksearch.latency import RUNTIMES, LatencyTable, checked, latencies, rank_multiple, runner, with_latencies
from ranksearch.latency.measured import timed
from ranksearch.latency.multiple import MULTIPLES, largest_free
from ranksearch.pricing import check_reachable
from ranksearch.space import BudgetSpec, LatencySpec, StrategySpec
from ranksearch.strategies import Terms, build_strategy
from ranksearch.strategies.hull import layer_costs, layer_losses
from ranksearch.strategies.knapsack import Knapsack
from ranksearch.surgery import find_layers
from ranksearch.table import PREDICTED, Candidate, LayerPrices, PriceTable
from ranksearch.trial import Proposal, Trial

SHAPE = (3, 16, 16)


@pytest.fixture(scope="module")
def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Conv2d(32, 48, 3, padding=1, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(48 * 64, 10),
    ).eval()  # fmt: skip


@pytest.fixture(scope="module")
def table(network: nn.Module) -> PriceTable:
    found = {layer.name: layer.conv for layer in find_layers(network, SHAPE)}
    conv, linear = found["3"], found["6"]
    return PriceTable(
        layers=(
            LayerPrices(
                name="3",
                conv=conv,
                candidates=(
                    Candidate(format="tucker2", ranks=(4, 4), macs=10, params=10, error=0.5),
                    Candidate(format="tucker2", ranks=(16, 16), macs=50, params=50, error=0.2),
                    Candidate(format="dense", macs=100, params=100, error=0.0),
                ),
            ),
            LayerPrices(
                name="6",
                conv=linear,
                candidates=(
                    Candidate(format="svd", ranks=(2,), macs=10, params=10, error=0.3),
                    Candidate(format="dense", macs=100, params=100, error=0.0),
                ),
            ),
        ),
        other_macs=50,
        other_params=50,
        dense_macs=250,
        dense_params=250,
    )


def given(table: PriceTable, ms: Callable[[Candidate], float], scale: float = 1.0) -> LatencyTable:
    """Latencies that no clock measured."""
    rows = {(x.conv, c.format, c.ranks): ms(c) for x in table.layers for c in x.candidates}
    return LatencyTable(
        runtime="eager", batch_images=1, threads=1, device="a board", dense_ms=10.0, scale=scale, layers_ms=rows,
        checks=(), versions={"torch": "2"},
    )  # fmt: skip


@pytest.mark.parametrize("runtime", sorted({*RUNTIMES} - {"compile"}))
def test_every_runtime_times_candidates_and_networks(network: nn.Module, table: PriceTable, runtime: Any) -> None:
    depends = {"torch": "2"}
    if runtime == "onnxruntime":
        depends[runtime] = onnxruntime.__version__
    told: list[str] = []
    found = latencies(
        network, SHAPE, table, LatencySpec(runtime=runtime), threads=1, versions={"torch": "2", "mlflow": "3"},
        progress=lambda what, *_: told.append(what),
    )  # fmt: skip
    assert {"timing candidates", "timing networks"} <= set(told)
    assert found.versions == depends, "only what latencies depend on"
    assert len(found.layers_ms) == 5
    assert all(0 < ms < 1000 for ms in found.layers_ms.values())
    ratio, predicted, measured = found.checks[0]
    assert (ratio, predicted) == (1.0, measured)
    timed_table = with_latencies(table, found, faster=False)
    (network_check,) = checked(network, SHAPE, table, found, [(0, 0)])
    assert network_check[0] == table.macs_ratio((0, 0))
    assert network_check[1] == pytest.approx(timed_table.latency_ms((0, 0)))
    assert timed_table.latency_ms(table.dense) == pytest.approx(found.dense_ms)


@pytest.mark.slow
def test_compiled_networks_are_timed() -> None:
    run = runner(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), torch.randn(1, 3, 8, 8), "compile")
    assert 0 < timed([run])[0] < 1000


class Silent(nn.Module):
    """Refuses every input without a word."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise AssertionError


@pytest.mark.slow
def test_a_network_that_fails_without_a_word_is_refused() -> None:
    with pytest.raises(LatencyError, match="AssertionError"):
        runner(Silent(), torch.randn(1, 3, 8, 8), "compile")


def test_the_clock_ranks_what_takes_longer() -> None:
    # Sleep is the oracle: no machine sleeps less than asked for.
    naps = (0.012, 0.004)
    slow, fast = timed([lambda s=s: time.sleep(s) for s in naps])
    assert slow >= 12.0
    assert 4.0 <= fast < slow


def test_latencies_add_up_to_the_network(table: PriceTable) -> None:
    ms = {(): 4.0, (4, 4): 1.0, (16, 16): 5.0, (2,): 3.0}
    found = with_latencies(table, given(table, lambda c: ms[c.ranks], scale=0.5), faster=False)
    assert found.latency_ms((0, 0)) == pytest.approx(10 - 0.5 * (4 - 1) - 0.5 * (4 - 3))
    assert found.latency_ms((1, 1)) == pytest.approx(10 + 0.5 * (5 - 4))
    assert found.latency_ms(table.dense) == pytest.approx(10)
    assert table.latency_ms(table.dense) is None
    assert PriceTable.from_json(json.loads(json.dumps(found.to_json()))) == found


def test_pinned_layers_count_as_they_are_pinned(table: PriceTable) -> None:
    first, second = table.layers
    pinned = replace(table, layers=(first,), pinned=((second.name, second.conv, second.candidates[0]),))
    ms = {(): 4.0, (4, 4): 1.0, (16, 16): 5.0, (2,): 3.0}
    found = with_latencies(pinned, given(table, lambda c: ms[c.ranks]), faster=False)
    assert found.latency_ms((2,)) == pytest.approx(10 - (4 - 3))
    assert found.latency_ms((0,)) == pytest.approx(10 - (4 - 3) - (4 - 1))


def test_candidates_slower_than_dense_are_left_out(table: PriceTable) -> None:
    ms = {(): 4.0, (4, 4): 1.0, (16, 16): 5.0, (2,): 4.0}
    found = with_latencies(table, given(table, lambda c: ms[c.ranks]), faster=True)
    assert [[c.ranks for c in layer.candidates] for layer in found.layers] == [[(4, 4), ()], [()]]
    # Limits that could be kept with them cannot any more.
    for limit, of, least in (("max_macs_ratio", "MACs", 160 / 250), ("max_latency_ratio", "latency", 0.7)):
        check_reachable(table, BudgetSpec(**{limit: least - 0.01}))
        check_reachable(found, BudgetSpec(**{limit: least + 1e-9}))
        with pytest.raises(BudgetError, match=rf"\$\.budget\.{limit} must be reachable.*{least:.3f} of the {of}"):
            check_reachable(found, BudgetSpec(**{limit: least - 0.01}))


def test_a_knapsack_over_latencies_takes_what_is_fast_for_its_error(table: PriceTable) -> None:
    ms = {(): 4.0, (4, 4): 3.9, (16, 16): 1.0, (2,): 0.5}  # the rank map of least MACs is not the fastest
    found = with_latencies(table, given(table, lambda c: ms[c.ranks]), faster=False)
    maps = Knapsack(cost="latency").maps(found)
    errors = layer_losses(found, "predicted")
    points = {
        (a, b): (cast(float, found.latency_ms((a, b))), errors[0][a] + errors[1][b]) for a in range(3) for b in range(2)
    }

    def beaten(t: float, e: float) -> bool:
        return any(x <= t and y <= e and (x, y) != (t, e) for x, y in points.values())

    best = {choices for choices, point in points.items() if not beaten(*point)}
    assert set(maps) == best
    assert layer_costs(found, "latency")[0] == [3_900_000, 1_000_000, 4_000_000]


@pytest.mark.parametrize("strategy", ["knapsack", "greedy", "uniform", "auto"])
def test_a_limit_on_the_latency_is_kept_by_what_is_proposed(table: PriceTable, strategy: str) -> None:
    ms = {(): 4.0, (4, 4): 3.9, (16, 16): 1.0, (2,): 0.5}
    found = with_latencies(table, given(table, lambda c: ms[c.ranks]), faster=False)
    spec = StrategySpec(name=strategy, price=PREDICTED)
    made = build_strategy(spec, Terms(seed=0, objectives=("accuracy", "macs"), max_latency_ratio=0.7))
    trials: list[Trial] = []
    while isinstance(proposal := made.propose(found, trials), Proposal):
        assert found.latency_ratio(proposal.choices) <= 0.7
        trials.append(Trial(number=len(trials), index=len(trials), proposal=proposal, state="RUNNING"))
    assert trials


def test_a_table_travels_as_a_file(table: PriceTable, network: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "there" / "latencies.json"
    made = given(table, lambda c: 1.0 + len(c.ranks))
    made.save(path)
    brought = latencies(network, SHAPE, table, LatencySpec(table=str(path)), threads=7, versions={})
    assert brought.to_json() == made.to_json()
    with pytest.raises(
        LatencyError, match=r"\$\.latency\.batch_images must be what .* was measured with, found 16 here"
    ):
        latencies(network, SHAPE, table, LatencySpec(table=str(path), batch_images=16), threads=1, versions={})
    rows = dict(list(made.layers_ms.items())[:-1])
    with pytest.raises(LatencyError, match="every candidate of the space, found none of 1 of 5"):
        with_latencies(table, replace(made, layers_ms=rows), faster=False)


@pytest.mark.parametrize(
    "content", ["", "{}", "[1]", '{"latency_table": 9}', '{"latency_table": 1, "layers_ms": [[]]}']
)
def test_what_is_no_latency_table_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(LatencyError, match="must be a file that `ranksearch latency` wrote"):
        LatencyTable.load(tmp_path / "x.json")
    with pytest.raises(LatencyError, match="must be a file"):
        LatencyTable.load(tmp_path / "none.json")


def test_measured_once_a_machine(network: nn.Module, table: PriceTable, tmp_path: Path) -> None:
    def measure(**changes: Any) -> LatencyTable:
        return latencies(network, SHAPE, table, LatencySpec(**changes), threads=1, versions={}, cache=tmp_path)

    first = measure()
    assert measure().to_json() == first.to_json(), "measured again, clocks differ in the last digits"
    assert len(list((tmp_path / "latencies").iterdir())) == 1
    measure(batch_images=2)
    assert len(list((tmp_path / "latencies").iterdir())) == 2
    next((tmp_path / "latencies").iterdir()).write_text("{")
    assert measure().dense_ms > 0
    assert math.isfinite(measure(batch_images=2).dense_ms)


class _Busy(nn.Sequential):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(500):
            x = x.sin()
        return super().forward(x)


def test_layers_alike_in_another_network_are_timed_in_that(
    network: nn.Module, table: PriceTable, tmp_path: Path
) -> None:
    found = [
        latencies(model, SHAPE, table, LatencySpec(), threads=1, versions={}, cache=tmp_path)
        for model in (network, _Busy(*network))
    ]
    assert found[1].dense_ms > found[0].dense_ms
    assert len(list((tmp_path / "latencies").iterdir())) == 2


def test_what_asks_for_latencies(tmp_path: Path) -> None:
    space = tmp_path / "space.yaml"
    space.write_text("model: {name: digits-cnn}\n")
    assert load_space(space).latencies is None
    assert load_space(space, ["objectives=[accuracy,latency]"]).latencies == LatencySpec()
    assert load_space(space, ["budget.max_latency_ratio=0.5"]).latencies == LatencySpec()
    assert load_space(space, ["latency.runtime=onnxruntime"]).latencies == LatencySpec(runtime="onnxruntime")
    with pytest.raises(SpaceError, match="no latency was measured for"):
        load_space(space, ["objectives=[accuracy,latency]", "strategy.name=funnel"])


@pytest.mark.parametrize("block", [1, 2, 4, 8, 16, 32])
def test_the_rank_multiple_is_the_block_that_a_device_works_in(block: int) -> None:
    """On a device whose kernels take as long for any part of a block as for the whole."""
    ranks = (9, 21, 35, 43, 59, 61, 87, 101)
    times = {q: [math.ceil(math.ceil(r / q) * q / block) * 1.5 for r in ranks] for q in MULTIPLES}
    assert largest_free(times) == block


def test_the_rank_multiple_is_the_one_that_spares_slow_ranks() -> None:
    """Of a device that is slow at all but multiples of 4: 8 and 16 are faster than 1 as well, but slower than 4."""
    rounded = {q: [math.ceil(r / q) * q for r in (9, 21, 35, 43)] for q in MULTIPLES}
    times = {q: [r * (1.0 if r % 4 == 0 else 1.6) for r in found] for q, found in rounded.items()}
    assert sum(times[4]) < sum(times[16]) < sum(times[1])
    assert largest_free(times) == 4


def square(channels: int, size: int = 8) -> Conv:
    return Conv(
        in_channels=channels, out_channels=channels, kernel=(3, 3), padding=(1, 1), bias=True, size=(size, size)
    )


def test_a_measured_rank_multiple_is_kept_and_leaves_ranks_to_choose_from(tmp_path: Path) -> None:
    spec, told = LatencySpec(), []
    arguments: dict[str, Any] = {"threads": 1, "device": torch.device("cpu"), "versions": {"torch": "2"}}

    def measured(*channels: int) -> int:
        return rank_multiple(
            [(square(c), "tucker2") for c in channels], spec, cache=tmp_path,
            progress=lambda what, done, total: told.append(what), **arguments,
        )  # fmt: skip

    found = measured(64, 64)
    assert found in MULTIPLES
    assert found <= 16, "four of them in 64 channels"
    assert set(told) == {"timing rank multiples"}
    told.clear()
    assert measured(64, 64) == found
    assert not told, "measured once"
    (entry,) = (tmp_path / "latencies").iterdir()
    entry.write_bytes(entry.read_bytes()[:5])
    assert measured(64, 64) in MULTIPLES
    assert told, "a damaged entry is measured again"
    assert measured(3) == 1, "too few channels to choose from"
