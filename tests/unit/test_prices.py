"""Measured prices against the plain way: exchange the layer, run the whole network; and the network downstream."""

from __future__ import annotations

import copy
import pickle
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load
from scipy.stats import entropy
from sklearn.metrics import accuracy_score, log_loss
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from ranksearch import measurement
from ranksearch.calibration import collect
from ranksearch.config import parse_space
from ranksearch.decompositions import FORMATS, Kind, chain
from ranksearch.downstream import Traced, Whole, opened
from ranksearch.engine.pool import over_processes
from ranksearch.errors import DataError, ModelError
from ranksearch.factors import cached
from ranksearch.interpolation import sampled
from ranksearch.models.cifar_resnet import CifarResNet
from ranksearch.models.digits_cnn import digits_cnn
from ranksearch.prices import PRICES, measure
from ranksearch.pricing import Factors, decompose, kinds, price, select
from ranksearch.surgery import build_layer, find_layers, kernel_of, replaced
from ranksearch.table import Candidate, PriceTable
from tests import oracles
from tests.networks import SharedNet, SmallNet, small_images, small_net


class BranchingNet(nn.Module):
    """Goes one of two ways by what it sees, which no graph can hold."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.body = nn.Conv2d(6, 8, 3, stride=2)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = self.body(x) if float(x.detach().mean()) > 0 else -self.body(x)
        out: Tensor = self.head(F.relu(x).mean((2, 3)))
        return out


class OverwritingNet(nn.Module):
    """Works in place: everywhere harmlessly, but where ``again`` reads an activation that was overwritten."""

    def __init__(self, again: bool) -> None:
        super().__init__()
        self.again = again
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)
        self.one = nn.Conv2d(6, 6, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(6)
        self.two = nn.Conv2d(6, 6, 3, padding=1)
        self.head = nn.Conv2d(6, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.stem(x))
        y = self.norm(self.one(x))
        y += x
        z = self.two(self.relu(y))
        z = z.mul_(0.5)
        if self.again:
            w = self.relu(z)
            z = w + z  # ``z`` is what ``w`` is
        return F.relu(self.head(z), inplace=True).mean((2, 3))


@dataclass(frozen=True, kw_only=True)
class Priced:
    net: nn.Module
    images: Tensor
    labels: Tensor
    table: PriceTable
    factors: Factors
    kind: Kind

    def measured(self, **options: Any) -> dict[str, list[dict[str, float]]]:
        options = {"batch_images": 5, **options}
        found = measure(self.net, self.table, self.factors, self.images, self.labels, kind=self.kind, **options)
        return {name: [dict(row) for row in rows] for name, rows in found.prices.items()}


def randomised(net: nn.Module) -> nn.Module:
    """``net`` in evaluation mode, with batch norms that do something."""
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.uniform_(-0.3, 0.3)  # type: ignore[union-attr]
                module.running_var.uniform_(0.5, 2.0)  # type: ignore[union-attr]
                module.weight.uniform_(0.5, 1.5)
                module.bias.uniform_(-0.3, 0.3)
    return net.eval()


def priced(
    net: nn.Module,
    images: Tensor,
    cache: Path,
    *,
    factors: str = "activation-aware",
    ratios: tuple[float, ...] = (0.4,),
) -> Priced:
    space = parse_space(
        {
            "model": {"name": "net"},
            "formats": ["tucker2", "svd", "spatial-svd", "channel-svd"],
            "layers": {"include": ["*"]},
            "ranks": {"ratios": list(ratios), "joint": True},
            "evaluation": {"factors": factors},
        }
    )
    shape = (images.shape[1], images.shape[2], images.shape[3])
    selection = select(space, net, shape)
    statistics = collect(net, selection.convs(), [images])
    found, _ = decompose(space, selection, net, statistics, cache=cache)
    table, _ = price(space, selection, found)
    with torch.no_grad():
        classes = net(images).shape[1]
    labels = torch.randint(classes, (len(images),), generator=torch.Generator().manual_seed(3))
    return Priced(net=net, images=images, labels=labels, table=table, factors=found, kind=kinds(space)[-1])


def images_of(count: int, *shape: int) -> Tensor:
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(5))


def network(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    if name == "small":
        return small_net(), small_images(25)
    if name == "digits-cnn":
        return randomised(digits_cnn()), images_of(25, 1, 8, 8)
    if name.startswith("resnet"):
        net = CifarResNet(1, num_classes=7, shortcut=name[-1])
        return randomised(net), images_of(25, 3, 12, 12)
    if name == "branching":
        return BranchingNet().eval(), images_of(25, 3, 7, 7)
    return randomised(OverwritingNet(again=name == "overwriting-again")), images_of(25, 3, 6, 6)


NETWORKS = {
    "small": Traced,
    "digits-cnn": Traced,
    "resnet-A": Traced,
    "resnet-B": Traced,
    "overwriting": Traced,
    "overwriting-again": Whole,
    "branching": Whole,
}


def swapped(case: Priced, name: str, candidate: Candidate) -> nn.Module:
    conv = case.table.convs[name]
    weight, bias = kernel_of(case.net.get_submodule(name))
    prepared = case.factors[name, candidate.format, case.kind]
    module = build_layer(FORMATS[candidate.format], conv, prepared, candidate.ranks, bias, weight.dtype)
    return replaced(case.net, {name: module})


def output_of(model: nn.Module, name: str, images: Tensor) -> np.ndarray:
    """Output of the layer, which later layers may overwrite."""
    seen: list[Tensor] = []
    handle = model.get_submodule(name).register_forward_hook(lambda *given: seen.append(given[2].clone()))
    model(images)
    handle.remove()
    return seen[0].double().numpy()


@torch.no_grad()
def plain(case: Priced, name: str, candidate: Candidate) -> dict[str, float]:
    """The prices by the long way, in float64 NumPy and by scipy and scikit-learn."""
    model, conv = swapped(case, name, candidate), case.table.convs[name]
    before, after = (m(case.images).double().softmax(1).numpy() for m in (case.net, model))
    y, found = output_of(case.net, name, case.images), output_of(model, name, case.images)
    channel = -1 if conv.linear else 1
    centred = y - y.mean(axis=tuple(i for i in range(y.ndim) if i != channel % y.ndim), keepdims=True)
    weight, bias = kernel_of(case.net.get_submodule(name))
    factors, _ = chain(
        FORMATS[candidate.format], conv, case.factors[name, candidate.format, case.kind], candidate.ranks, bias
    )
    kernel = weight.double().numpy()
    composed = oracles.kernel(candidate.format, [factor.double().numpy() for factor in factors], conv.groups)
    labels, classes = case.labels.numpy(), list(range(before.shape[1]))
    return {
        "weight": float(((composed.reshape(kernel.shape) - kernel) ** 2).sum() / (kernel**2).sum()),
        "output": float(((found - y) ** 2).sum() / (centred**2).sum()),
        "divergence": float(np.mean(entropy(before, after, axis=1))),
        "loss": float(log_loss(labels, after, labels=classes) - log_loss(labels, before, labels=classes)),
        "drop": float(accuracy_score(labels, before.argmax(1)) - accuracy_score(labels, after.argmax(1))),
    }


@pytest.mark.parametrize(("name", "factors"), [*((n, "activation-aware") for n in NETWORKS), ("small", "weight-only")])
def test_prices_are_those_of_exchanging_the_layer_and_running_the_whole_network(
    name: str, factors: str, tmp_path: Path
) -> None:
    net, images = network(name)
    case = priced(net, images, tmp_path, factors=factors)
    state = copy.deepcopy(net.state_dict())
    found = case.measured()
    assert list(found) == [layer.name for layer in case.table.layers]
    for layer in case.table.layers:
        for candidate, prices in zip(layer.candidates, found[layer.name], strict=True):
            assert list(prices) == list(PRICES)
            if candidate.dense:
                assert set(prices.values()) == {0.0}
                continue
            for key, value in plain(case, layer.name, candidate).items():
                assert prices[key] == pytest.approx(value, rel=2e-4, abs=2e-6), (layer.name, candidate, key)
    assert all(torch.equal(value, state[key]) for key, value in net.state_dict().items())


@pytest.mark.parametrize(("name", "kind"), NETWORKS.items())
def test_only_a_network_that_no_graph_holds_is_run_whole(name: str, kind: type) -> None:
    net, images = network(name)
    names = [key for key, module in net.named_modules() if isinstance(module, nn.Conv2d)]
    downstream = opened(net, names, images[:2], torch.float32)
    assert type(downstream) is kind
    with torch.no_grad():
        dense = downstream.run(images)
        torch.testing.assert_close(dense.logits, net(images))
        for key in names:
            doubled = downstream.onward(key, 2 * dense.outputs[key], dense)
            handle = net.get_submodule(key).register_forward_hook(lambda module, given, output: 2 * output)
            torch.testing.assert_close(doubled, net(images), rtol=1e-4, atol=1e-5)
            handle.remove()


def test_only_what_a_layer_reaches_runs_again() -> None:
    net, images = network("resnet-A")
    downstream = Traced(net, ["layer2.0.conv2"])
    counter = FlopCounterMode(display=False)
    with torch.no_grad():
        dense = downstream.run(images[:1])
        with counter:
            downstream.onward("layer2.0.conv2", dense.outputs["layer2.0.conv2"], dense)
    layers = {layer.name: layer.conv.macs for layer in find_layers(net, (3, 12, 12))}
    after = [name for name in layers if name.startswith(("layer3", "linear"))]
    assert counter.get_total_flops() // 2 == sum(layers[name] for name in after)
    assert len(after) == 3


def test_second_order_estimates_the_divergence_of_small_changes(tmp_path: Path) -> None:
    torch.manual_seed(1)
    case = priced(randomised(digits_cnn()), images_of(600, 1, 8, 8), tmp_path, ratios=(0.85,))
    prices: tuple[Any, ...] = ("divergence", "second-order")
    found = case.measured(batch_images=100, prices=prices)
    rows = [row for rows in found.values() for row in rows if row["divergence"] > 0]
    assert len(rows) >= 5
    for row in rows:
        assert row["second-order"] == pytest.approx(row["divergence"], rel=0.15)


def test_prices_may_be_chosen_and_need_labels_only_where_they_say_so(tmp_path: Path) -> None:
    net, images = network("small")
    case = priced(net, images, tmp_path)
    everything = case.measured()
    some = case.measured(prices=["output", "weight"])
    for name, rows in some.items():
        assert rows == [{key: row[key] for key in ("weight", "output")} for row in everything[name]]
    unlabelled = measure(net, case.table, case.factors, images.numpy(), kind=case.kind, batch_images=5)
    for name, rows in unlabelled.prices.items():
        keys = [key for key in PRICES if key not in ("loss", "drop")]
        assert rows == [{key: row[key] for key in keys} for row in everything[name]]
    with pytest.raises(DataError, match=r"loss and drop need labels.*Give labels"):
        measure(net, case.table, case.factors, images, kind=case.kind, prices=["loss", "drop"])
    with pytest.raises(DataError, match="25 images and 24 labels"):
        measure(net, case.table, case.factors, images, case.labels[:24], kind=case.kind)
    with pytest.raises(DataError, match="at least one image"):
        measure(net, case.table, case.factors, images[:0], kind=case.kind)


def test_fewer_candidates_have_the_prices_they_have_among_all(tmp_path: Path) -> None:
    net, images = network("small")
    case = priced(net, images, tmp_path, ratios=(0.1, 0.2, 0.3, 0.4))
    some = replace(case, table=sampled(case.table, 2))
    everything, found = case.measured(), some.measured()
    assert sum(map(len, found.values())) < sum(map(len, everything.values()))
    for layer, kept in zip(case.table.layers, some.table.layers, strict=True):
        measured = dict(zip(layer.candidates, everything[layer.name], strict=True))
        assert found[layer.name] == [measured[candidate] for candidate in kept.candidates]


def test_batches_change_no_more_than_rounding(tmp_path: Path) -> None:
    net, images = network("resnet-B")
    case = priced(net, images, tmp_path)
    prices: tuple[Any, ...] = tuple(p for p in PRICES if p != "second-order")
    one, other = case.measured(prices=prices), case.measured(prices=prices, batch_images=25)
    for name, rows in one.items():
        for row, again in zip(rows, other[name], strict=True):
            assert row == pytest.approx(again, rel=1e-4, abs=1e-6)


def through_pickle(work: Callable[[Any], Any], items: Iterable[Any]) -> list[Any]:
    """A map that works from the last item to the first, on copies."""
    pickled = [pickle.dumps((work, item)) for item in items]
    results = []
    for content in reversed(pickled):
        other, item = pickle.loads(content)
        results.append(other(item))
    return results[::-1]


def test_numbers_are_the_same_for_any_map(tmp_path: Path) -> None:
    net, images = network("small")
    case = priced(net, images, tmp_path)
    assert case.measured(map=through_pickle) == case.measured()


@pytest.mark.slow
def test_numbers_are_the_same_from_other_processes(tmp_path: Path) -> None:
    net, images = network("resnet-A")
    case = priced(net, images, tmp_path)
    assert case.measured(map=over_processes(2)) == case.measured()


def test_what_a_map_calls_keeps_network_and_candidates_for_its_next_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    net, images = network("small")
    case = priced(net, images, tmp_path)
    made: list[Any] = []
    build = measurement.build_layer
    monkeypatch.setattr(measurement, "build_layer", lambda *given: (made.append(given), build(*given))[1])
    case.measured()
    assert len(made) == sum(not c.dense for layer in case.table.layers for c in layer.candidates)


def test_an_error_ends_the_other_workers_before_it_is_raised(tmp_path: Path) -> None:
    net, images = network("small")
    case, told = priced(net, images, tmp_path), []

    def noting(work: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
        try:
            yield from map(work, items)
        finally:
            told.append("ended")

    def interrupted(done: int, total: int) -> None:
        told.append(f"{done} of {total}")
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as caught:
        case.measured(map=noting, progress=interrupted)
    total = len(case.table.layers) + 5
    assert (told, caught.type) == ([f"1 of {total}", f"2 of {total}", "ended"], KeyboardInterrupt)


def test_a_damaged_entry_of_the_shared_cache_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANKSEARCH_CACHE", str(tmp_path / "shared"))
    net, images = network("small")
    case = priced(net, images, tmp_path / "decompositions")
    first = case.measured(cache=tmp_path / "one")
    damaged = sorted((tmp_path / "shared" / "prices").iterdir())[0]
    whole = damaged.read_bytes()
    damaged.write_bytes(whole[:20])
    assert case.measured(cache=tmp_path / "two") == first
    anew = cached(damaged)
    assert anew is not None
    assert torch.equal(anew["prices"], load(whole)["prices"])


def test_the_cache_spares_all_work_and_survives_damage(tmp_path: Path) -> None:
    net, images = network("small")
    case = priced(net, images, tmp_path)
    units: list[Any] = []

    def counted(work: Callable[[Any], Any], items: Iterable[Any]) -> list[Any]:
        found = list(items)
        units.extend(found)
        return [work(item) for item in found]

    first = case.measured(cache=tmp_path, map=counted)
    assert first == case.measured()
    assert units
    units.clear()
    assert case.measured(cache=tmp_path, map=counted) == first
    assert not units
    broken = sorted((tmp_path / "prices").iterdir())[0]
    broken.write_bytes(b"not safetensors")
    assert case.measured(cache=tmp_path, map=counted) == first
    assert len(units) == 1 + 5  # one layer's kernels, five batches of images
    units.clear()
    case.measured(cache=tmp_path, map=counted, seed=1)
    relabelled = replace(case, labels=case.labels.roll(1))
    assert relabelled.measured(cache=tmp_path, map=counted)["head"] != first["head"]
    assert len(units) == 2 * (len(case.table.layers) + 5)


def test_prices_from_the_cache_took_what_they_took_when_they_were_measured(tmp_path: Path) -> None:
    net, images = network("small")
    case = priced(net, images, tmp_path)

    def slowly(work: Callable[[Any], Any], items: Iterable[Any]) -> list[Any]:
        time.sleep(0.5)
        return [work(item) for item in items]

    first = measure(net, case.table, case.factors, images, kind=case.kind, cache=tmp_path, map=slowly)
    again = measure(net, case.table, case.factors, images, kind=case.kind, cache=tmp_path)
    assert first.seconds >= 0.5
    assert again == first


def test_bfloat16_prices_are_close_to_those_of_float32(tmp_path: Path) -> None:
    net, images = network("resnet-A")
    case = priced(net, images, tmp_path, ratios=(0.2,))
    case = replace(case, table=replace(case.table, layers=case.table.layers[1:3]))
    exact, rough = case.measured(), case.measured(dtype=torch.bfloat16)
    for name, rows in exact.items():
        assert rough[name][0]["output"] == pytest.approx(rows[0]["output"], rel=0.05)
        assert rough[name][0]["divergence"] == pytest.approx(rows[0]["divergence"], rel=0.3)
        assert rough[name][0]["output"] != rows[0]["output"]


def test_a_layer_that_runs_more_than_once_is_refused() -> None:
    torch.manual_seed(0)
    net = SharedNet().eval()
    with pytest.raises(ModelError, match="shared runs more often"):
        opened(net, ["shared"], torch.randn(2, *SharedNet.shape), torch.float32).run(torch.randn(2, *SharedNet.shape))


def test_outputs_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    net, images = network("small")
    case = priced(net, images, tmp_path)
    with pytest.raises(FloatingPointError, match="not finite"):
        replace(case, images=images * float("inf")).measured()


def test_small_net_has_layers_of_all_kinds(tmp_path: Path) -> None:
    net, images = network("small")
    assert isinstance(net, SmallNet)
    names = [layer.name for layer in priced(net, images, tmp_path).table.layers]
    assert {"stem", "body.strided", "body.point", "tokens"} <= set(names)
