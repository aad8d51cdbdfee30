"""Funnel regularisation: the penalty and when a gate dies, gated chains and their folding, and whole runs."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import brentq
from torch import Tensor, nn

from ranksearch.calibration import collect
from ranksearch.data import Data, Split, to_input
from ranksearch.decompositions import FORMATS, Prepared, prepare
from ranksearch.errors import BudgetError, ModelError, UnsupportedLayer
from ranksearch.funnel import Funnel, Funnelled, FunnelSpec
from ranksearch.funnel.gates import GatedNetwork
from ranksearch.funnel.penalty import Penalty, decayed, implicit_step, penalty
from ranksearch.funnel.steering import threshold_for
from ranksearch.models.digits_cnn import digits_cnn, train_digits_cnn
from ranksearch.rankmap import ModelRecord, RankMap
from ranksearch.space import AugmentSpec, FineTuneSpec
from ranksearch.surgery import count_macs, count_params, find_layers, kernel_of, skeleton
from tests.digits import digits
from tests.networks import SharedNet, SmallNet, small_images, small_net

PENALTIES: tuple[Penalty, ...] = ("funnel", "l1", "l2")
TUNE = FineTuneSpec(steps=3, batch_images=16, weight_decay=0.0)


@pytest.mark.parametrize("kind", PENALTIES)
@pytest.mark.parametrize("c", [1e-4, 0.03, 1.0, 10.0])
def test_the_slope_of_the_penalty(kind: Penalty, c: float) -> None:
    """Autograd's against finite differences and against the published derivative."""
    x = torch.tensor([-2.0, -0.3, -1e-3, 2e-4, 0.05, 1.0], dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(lambda y: penalty(y, c, kind), x, eps=1e-9, atol=1e-4, rtol=1e-4)
    (slope,) = torch.autograd.grad(penalty(x, c, kind).sum(), x)
    at = x.detach().numpy()
    published = {"funnel": np.sign(at) * c / (np.abs(at) + c) ** 2, "l1": np.sign(at), "l2": 2 * at}
    np.testing.assert_allclose(slope, published[kind], rtol=1e-9)


def test_the_funnel_counts_gates_as_c_vanishes_and_is_half_at_c() -> None:
    x = torch.tensor([0.0, 0.5, -2.0, 30.0], dtype=torch.float64)
    assert float(penalty(x, 1e-12).sum()) == pytest.approx(3.0)
    assert penalty(x, 0.5).tolist() == pytest.approx([0.0, 0.5, 0.8, 60 / 61])


@pytest.mark.parametrize("kind", PENALTIES)
def test_a_step_is_implicit_in_the_gradient(kind: Penalty) -> None:
    """Where it comes to rest above zero, step plus size times autograd's slope there is the gate it was."""
    x = torch.linspace(-3, 3, 61, dtype=torch.float64)
    rested = 0
    for c in (1e-4, 1e-2, 1.0, 10.0):
        for size in (1e-5, 1e-2, 1.0):
            moved = implicit_step(x, size, c, kind).requires_grad_(True)
            (slope,) = torch.autograd.grad(penalty(moved, c, kind).sum(), moved)
            at_rest = moved.detach() != 0
            back = moved.detach() + size * slope
            np.testing.assert_allclose(back[at_rest], x[at_rest], rtol=1e-6, atol=1e-9)
            assert bool((moved.abs() <= x.abs()).all())
            assert bool((moved * x >= 0).all())
            rested += int(at_rest.sum())
    assert rested > 300


def test_a_step_takes_the_first_point_of_rest() -> None:
    for v in (0.02, 0.1, 0.3, 1.0, 2.5):
        for c in (1e-3, 0.05, 0.5, 4.0):
            for size in (1e-4, 3e-3, 0.1, 1.0):
                found = float(implicit_step(torch.tensor([v], dtype=torch.float64), size, c)[0])
                # Down from v, the balance v - r - size F'(r) changes sign at the largest root.
                grid = np.linspace(v, 0, 20_001)
                balance = v - grid - size * c / (grid + c) ** 2
                above = np.flatnonzero(balance >= 0)
                if len(above) == 0:
                    assert found == pytest.approx(0.0, abs=v * 1e-3)
                    continue
                first = above[0]
                root = brentq(
                    lambda r, v=v, c=c, size=size: v - r - size * c / (r + c) ** 2, grid[first], grid[first - 1]
                )
                assert found == pytest.approx(root, abs=1e-8)


def survivors(start: Tensor, strength: float, c: Tensor, curvature: float) -> np.ndarray:
    """Gates left by descent on ``curvature / 2 (gate - start)²`` plus the penalty, from ``start``; a row for each c."""
    gates, rate = start.expand(len(c), -1), 0.2 / curvature
    for _ in range(1500):
        gates = implicit_step(gates - rate * curvature * (gates - start), rate * strength, c[:, None])
    found: np.ndarray = gates.numpy() > 1e-9
    return found


@pytest.mark.parametrize(("strength", "curvature"), [(0.005, 1.0), (0.02, 0.5), (0.1, 8.0)])
def test_when_a_gate_dies(strength: float, curvature: float) -> None:
    """The closed forms of both regimes, and pruning that is strongest at half the root of strength over curvature."""
    strongest = math.sqrt(strength / curvature)
    ratios = np.array([0.02, 0.1, 0.25, 0.5, 1.0, 1.3, 1.6, 3.0, 10.0])
    starts = np.linspace(0.02, 2.0, 199) * strongest
    alive = survivors(torch.tensor(starts), strength, torch.tensor(ratios * strongest), curvature)
    largest_lost = []
    for c, row in zip(ratios * strongest, alive, strict=True):
        if c < math.sqrt(2 * strength / curvature):
            law = (27 * strength * c / (4 * curvature)) ** (1 / 3) - c
        else:
            law = strength / (c * curvature)
        clear = np.abs(starts / law - 1) > 0.02  # at the very edge, descent takes for ever
        np.testing.assert_array_equal(row[clear], (starts > law)[clear])
        largest_lost.append(starts[~row].max(initial=0.0) / strongest)
    assert ratios[int(np.argmax(largest_lost))] == 0.5
    assert max(largest_lost) == pytest.approx(1.0, rel=0.02)
    assert largest_lost[0] < 0.6  # not monotone: less on either side
    assert largest_lost[-1] < 0.2


def test_c_falls_as_published() -> None:
    exponential = [decayed(1.0, 1e-4, p, "exponential") for p in (0.0, 0.25, 0.5, 1.0)]
    assert exponential == pytest.approx([1.0, 0.1, 0.01, 1e-4])
    linear = [decayed(10.0, 1e-3, p, "linear") for p in (0.0, 0.5, 1.0)]
    assert linear == pytest.approx([10.0, 5.0005, 1e-3])
    assert decayed(2.0, 0.02, 0.5, "per-gate") == pytest.approx(0.2)


LAYERS = {"body.plain": "tucker2", "body.strided": "tucker2", "body.point": "svd", "tokens": "svd"}


def prepared_of(
    net: nn.Module, formats: dict[str, str], shape: tuple[int, int, int], images: Tensor | None = None
) -> dict[str, Prepared]:
    convs = {layer.name: layer.conv for layer in find_layers(net, shape)}
    known = {} if images is None else collect(net, {name: convs[name] for name in formats}, [images])
    return {
        name: prepare(FORMATS[form], convs[name], kernel_of(net.get_submodule(name))[0], known.get(name))
        for name, form in formats.items()
    }


def gated(net: nn.Module, images: Tensor | None = None, formats: dict[str, str] = LAYERS) -> GatedNetwork:
    return GatedNetwork(net, formats, prepared_of(net, formats, SmallNet.shape, images), SmallNet.shape)


@pytest.mark.parametrize("aware", [False, True])
def test_at_full_rank_a_gated_network_is_the_dense_one(aware: bool) -> None:
    net, images = small_net(), small_images(64)
    before = copy.deepcopy(net.state_dict())
    network = gated(net, images if aware else None)
    with torch.no_grad():
        torch.testing.assert_close(network.model.eval()(images), net(images), rtol=1e-4, atol=1e-4 if aware else 1e-5)
    torch.testing.assert_close(net.state_dict(), before, rtol=0, atol=0)
    assert [gate.numel() for gate in network.gates()] == [8, 8, 8, 12, 10, 10]
    assert network.dense_macs == count_macs(net, SmallNet.shape)
    assert network.ratio([layer.bounds for layer in network.layers]) == 1.0


def test_gates_start_at_the_root_of_the_singular_values() -> None:
    net = small_net()
    network = gated(net)
    kernels = {name: kernel_of(net.get_submodule(name))[0].double().numpy() for name in LAYERS}
    expected = []
    for name, form in LAYERS.items():
        kernel = kernels[name]
        unfoldings = [kernel.swapaxes(0, 1).reshape(kernel.shape[1], -1), kernel.reshape(len(kernel), -1)]
        for matrix in unfoldings if form == "tucker2" else unfoldings[1:]:
            expected.append(np.sqrt(np.linalg.svd(matrix, compute_uv=False)))
    np.testing.assert_allclose(network.magnitudes(), np.concatenate(expected), rtol=5e-3)


def test_gates_are_the_norms_of_the_filters() -> None:
    network = gated(small_net())
    network.set_magnitudes(torch.linspace(0.1, 2.0, len(network.magnitudes())))
    found = []
    for name in LAYERS:
        *stages, _ = network.model.get_submodule(name)  # type: ignore[misc]
        found += [kernel_of(stage)[0].flatten(1).norm(dim=1) for stage in stages]
    torch.testing.assert_close(torch.cat(found).double(), network.magnitudes(), rtol=1e-5, atol=1e-6)
    assert len(network.others()) + len(network.gates()) == sum(p.requires_grad for p in network.model.parameters())


def test_filters_of_zeros_have_gates() -> None:
    net = small_net()
    with torch.no_grad():
        net.body["plain"].weight[:, 2:] = 0
        net.tokens.weight[:] = 0
    network = gated(net)
    images = small_images(8)
    out = network.model.eval()(images)
    torch.testing.assert_close(out, net(images), rtol=1e-4, atol=1e-5)
    out.sum().backward()
    assert all(p.grad is None or bool(torch.isfinite(p.grad).all()) for p in network.model.parameters())
    assert bool((network.magnitudes() > 0).all())


@pytest.mark.parametrize("aware", [False, True])
def test_folding_is_exact(aware: bool) -> None:
    """The plain network of the gates that are alive is the gated one with the others at zero; in float64 to 1e-6."""
    net, images = small_net(torch.float64), small_images(16, dtype=torch.float64)
    network = gated(net, images if aware else None)
    generator = torch.Generator().manual_seed(0)
    sizes = torch.rand(len(network.magnitudes()), generator=generator, dtype=torch.float64)
    # The strided layer keeps all gates, so it reverts; the others lose more than half.
    sizes[16:36] += 1
    sizes[36:] -= 0.2
    network.set_magnitudes(torch.where(sizes > 0.6, sizes, 0.0))
    plain, ranks = network.fold(network.alive(sizes, 0.6))
    assert set(ranks) == {"body.plain", "body.point", "tokens"}
    assert isinstance(plain.get_submodule("body.strided"), nn.Conv2d)
    assert not any("parametrizations" in name for name, _ in plain.named_parameters())
    with torch.no_grad():
        expected = network.model.eval()(images)
        torch.testing.assert_close(plain.eval()(images), expected, rtol=0, atol=1e-6)
        assert float((expected - net(images)).abs().max()) > 1e-2
    ratio = network.ratio(network.ranks(sizes, 0.6))
    assert ratio == pytest.approx(count_macs(plain, SmallNet.shape) / count_macs(net, SmallNet.shape))


def test_a_layer_that_reverts_keeps_its_closed_gates_and_its_structure() -> None:
    net, images = small_net(), small_images(16)
    network = gated(net)
    values = network.magnitudes()
    values[:16] *= 1.5
    values[0] = 1e-3
    network.set_magnitudes(values)
    expected = network.model.eval()(images)
    plain, ranks = network.fold(network.alive(network.magnitudes(), 1e-2))
    assert ranks == {}
    torch.testing.assert_close(plain.eval()(images), expected, rtol=1e-4, atol=1e-5)
    assert {k: v.shape for k, v in plain.state_dict().items()} == {k: v.shape for k, v in net.state_dict().items()}
    zeros = network.skeleton(ranks)
    zeros.load_state_dict(net.state_dict())
    torch.testing.assert_close(zeros.eval()(images), net(images), rtol=1e-4, atol=1e-5)


def test_at_least_one_gate_of_every_stage_stays() -> None:
    network = gated(small_net())
    sizes = network.magnitudes()
    plain, ranks = network.fold(network.alive(sizes, 1e9))
    assert ranks == {"body.plain": (1, 1), "body.strided": (1, 1), "body.point": (1,), "tokens": (1,)}
    kept = [int(chosen) for stages in network.alive(sizes, 1e9) for chosen in stages]
    parts = sizes.split([8, 8, 8, 12, 10, 10])
    assert kept == [int(part.argmax()) for part in parts]
    assert bool(torch.isfinite(plain.eval()(small_images(4))).all())


def test_costs_are_differences_of_counted_macs() -> None:
    net = small_net()
    network = gated(net)
    sizes = torch.ones(len(network.magnitudes()), dtype=torch.float64)
    found, expected = network.costs(), []
    for start in (0, 8, 16, 24, 36, 46):
        counts = []
        for closed in (1, 2):  # reverting needs several to be closed, so the chains' own counts are compared
            less = sizes.clone()
            less[start : start + closed] = 0
            counts.append(network.ratio(network.ranks(less, 0.5), revert=False))
        expected.append((counts[0] - counts[1]) * network.dense_macs)
        if start in (0, 8):  # body.plain, by hand: 9x9 pixels, 8 channels, 3x3
            assert expected[-1] == pytest.approx(81 * (8 + 9 * 8))
    groups = torch.stack([part[0] for part in found.split([8, 8, 8, 12, 10, 10])]).numpy()
    np.testing.assert_allclose(groups / groups[0], np.array(expected) / expected[0], rtol=1e-9)
    assert float(found.mean()) == pytest.approx(1.0)


def test_the_scale_of_the_last_stage_is_seen() -> None:
    network = gated(small_net())
    before = network.column_norms()
    assert bool((before[:8] == 1).all())  # the core comes next, not the last stage
    stage, gates = network.model.get_submodule("body.plain")[2], network.magnitudes()  # type: ignore[index]
    product = gates * before
    with torch.no_grad():
        stage.weight[:, 3] *= 5
    gates[8 + 3] /= 5
    network.set_magnitudes(gates)
    torch.testing.assert_close(network.magnitudes() * network.column_norms(), product)


def test_thresholds_meet_any_target() -> None:
    net = digits_cnn()
    formats = formats_of(net)
    network = GatedNetwork(net, formats, prepared_of(net, formats, (1, 8, 8)), (1, 8, 8))
    sizes = network.magnitudes()
    for target in (1.0, 0.8, 0.5, 0.2):
        threshold = threshold_for(network, sizes, target)
        ratio = network.ratio(network.ranks(sizes, threshold))
        assert ratio == pytest.approx(target, abs=0.01)
        assert ratio <= target
        others = [network.ratio(network.ranks(sizes, t)) for t in sizes.sort().values[::7].tolist()]
        assert all(other <= ratio or other > target for other in others)


def test_layers_that_cannot_be_gated() -> None:
    net = small_net()
    with pytest.raises(ModelError, match=r"found no\.such among them"):
        GatedNetwork(net, {"no.such": "svd"}, {}, SmallNet.shape)
    shared = SharedNet().eval()
    with pytest.raises(UnsupportedLayer, match="shared is run 3 times"):
        GatedNetwork(shared, {"shared": "tucker2"}, {}, SharedNet.shape)
    with pytest.raises(UnsupportedLayer):
        gated(net, formats={"body.depthwise": "svd"})


def formats_of(net: nn.Module) -> dict[str, str]:
    """Tucker-2 and svd on all layers of the digits network but the stem and the classifier."""
    inner = find_layers(net, (1, 8, 8))[1:-1]
    return {layer.name: "svd" if layer.conv.pointwise else "tucker2" for layer in inner}


def data_of(splits: dict[str, tuple[np.ndarray, np.ndarray]], **changes: Any) -> Data:
    made = {name: Split(images=images, labels=labels) for name, (images, labels) in splits.items()}
    return Data(**made, augment=AugmentSpec(crop_px=1), calibration_images=64, **changes)


def digits_data(train: int, report: int) -> Data:
    return data_of(digits(train, 50, report), classes=10, mean=(0.3053,), std=(0.3763,))


Made = Callable[..., Funnel]


@pytest.fixture(scope="module")
def made() -> Made:
    """Funnel runs of a small network on noise, 21 steps each: the machinery does not mind."""
    generator = np.random.default_rng(0)
    splits = {
        name: (generator.integers(0, 256, (count, 9, 9, 3), dtype=np.uint8), generator.integers(0, 4, count))
        for name, count in (("train", 70), ("search", 10), ("report", 10))
    }
    data = data_of(splits, classes=4, mean=(0.5,) * 3, std=(0.3,) * 3)
    net = small_net()
    kept = prepared_of(net, LAYERS, SmallNet.shape, to_input(data.calibration, data))
    default = {"settle_steps": 2, "penalty_steps": 16, "fine_tune": TUNE, "record_steps": 4}

    def make(seed: int = 0, **changes: Any) -> Funnel:
        return Funnel(net, LAYERS, kept, data, FunnelSpec(**default | changes), seed=seed)

    return make


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"penalty": "l1", "decay": "linear"},
        {"penalty": "l2", "mac_weighted": False},
        {"decay": "per-gate", "scale_free": True, "strength": 1.0, "gain": 1000.0},
        {"target": 0.3, "strength": 50.0, "c_start": 10.0, "decay": "linear", "c_end": 1e-3},
    ],
    ids=["funnel", "l1", "l2", "per-gate", "far too strong"],
)
def test_runs_of_the_digits_network_meet_their_target(changes: dict[str, Any]) -> None:
    data, net = digits_data(100, 50), digits_cnn().eval()
    formats, shape = formats_of(net), data.input_shape
    spec = FunnelSpec(settle_steps=1, penalty_steps=8, fine_tune=TUNE, record_steps=4, **changes)
    run = Funnel(net, formats, prepared_of(net, formats, shape), data, spec, seed=0)
    result = run.run()
    target = changes.get("target", 0.5)
    assert 0.99 * target < result.macs_ratio <= target
    gated = [entry["macs_ratio"] for entry in result.history if "macs_ratio" in entry]
    assert min(gated) >= target - 0.01  # the penalty never goes below; the training might, by a gate
    assert result.macs_ratio == count_macs(result.model, shape) / count_macs(run.dense, shape)
    assert not result.model.training
    for name, layer in result.layers.items():
        chain = result.model.get_submodule(name)
        assert layer.params == count_params(chain)
        assert layer.macs < layer.geometry.macs
        assert tuple(stage.weight.shape[0] for stage in list(chain)[:-1]) == layer.ranks  # type: ignore[call-overload]


def test_the_history_is_plain_and_whole(made: Made) -> None:
    run = made()
    history = json.loads(json.dumps(run.run().history))
    assert [entry["step"] for entry in history] == [4, 8, 12, 16, 18, 20, 21]
    assert [entry["phase"] for entry in history] == ["penalty"] * 5 + ["fine-tune"] * 2
    assert [len(entry["alive"]) for entry in history[:5]] == [4] * 5
    assert history[4]["c"] == pytest.approx(run.spec.c_end)


def test_the_result_is_a_rank_map_s_network(made: Made) -> None:
    run = made()
    result = run.run()
    shape = run.data.input_shape
    found = RankMap(
        model=ModelRecord(name="digits-cnn", input_shape=shape),
        layers=result.layers,
        macs=count_macs(result.model, shape),
        params=count_params(result.model),
        dense_macs=count_macs(run.dense, shape),
        dense_params=count_params(run.dense),
    )
    rebuilt = skeleton(found, run.dense)
    rebuilt.load_state_dict(result.model.state_dict())
    x = to_input(run.data.search.images, run.data)
    torch.testing.assert_close(rebuilt(x), result.model(x), rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def interrupted(made: Made) -> tuple[Funnelled, dict[int, dict[str, Any]]]:
    """The result of a run, and its states at each step."""
    run, states = made(decay="per-gate"), {}
    while run.steps < run.total:
        run.step()
        states[run.steps] = run.state_dict()
    return run.result(), states


@pytest.mark.parametrize("stop", [1, 9, 18, 20, 21], ids=["settling", "penalty", "folded", "fine-tuning", "ended"])
def test_a_run_goes_on_bit_for_bit(
    made: Made, interrupted: tuple[Funnelled, dict[int, dict[str, Any]]], tmp_path: Path, stop: int
) -> None:
    whole, states = interrupted
    torch.save(states[stop], tmp_path / "checkpoint.pt")
    second = made(decay="per-gate").run(checkpoint=tmp_path / "checkpoint.pt")
    assert second.layers == whole.layers
    assert second.history == whole.history
    assert second.threshold == whole.threshold
    torch.testing.assert_close(second.model.state_dict(), whole.model.state_dict(), rtol=0, atol=0)


def test_checkpoints_on_disk(made: Made, tmp_path: Path) -> None:
    path = tmp_path / "runs" / "run.pt"
    done: list[int] = []

    def interrupt(steps: int, total: int) -> None:
        done.append(steps)
        if steps == 13:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        made().run(checkpoint=path, checkpoint_steps=5, progress=interrupt)
    assert [file.name for file in path.parent.iterdir()] == ["run.pt"]
    resumed = made().run(checkpoint=path, checkpoint_steps=5, progress=lambda steps, total: done.append(steps))
    assert done == [*range(1, 14), *range(11, 22)]
    torch.testing.assert_close(resumed.model.state_dict(), made().run().model.state_dict(), rtol=0, atol=0)
    with pytest.raises(ModelError, match="own checkpoint only"):
        made(seed=1).run(checkpoint=path)
    path.write_bytes(b"no checkpoint")
    with pytest.raises(ModelError, match=r"cannot read the checkpoint.*Remove it to start afresh"):
        made().run(checkpoint=path)
    path.unlink()
    path.mkdir()
    with pytest.raises(ModelError, match=r"cannot read the checkpoint.*Check the file"):
        made().run(checkpoint=path)


def test_settling_alone_leaves_all_gates_and_a_fixed_strength_ends_where_it_ends(made: Made) -> None:
    gentle = made(target=None, strength=1e-9).run()
    assert (gentle.layers, gentle.macs_ratio, gentle.threshold) == ({}, 1.0, 1e-2)
    harsh = made(target=None, strength=1e3, c_end=1.0).run()
    assert {ranks for layer in harsh.layers.values() for ranks in layer.ranks} == {1}
    assert len(harsh.layers) == len(LAYERS)


def test_the_dense_network_stays_as_it_is(made: Made) -> None:
    run = made()
    before = copy.deepcopy(run.dense.state_dict())
    state = torch.get_rng_state()
    run.run()
    torch.testing.assert_close(run.dense.state_dict(), before, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), state)
    assert not run.dense.training


def test_the_temperature_of_the_last_training_is_not_that_of_the_gates(made: Made) -> None:
    def losses(**changes: Any) -> tuple[list[float], list[float]]:
        run = made(record_steps=1, **changes)
        found = [entry["loss"] for entry in run.run().history]
        return found[: run.gated_steps], found[run.gated_steps :]

    (gated, tuned), (alike, others) = losses(), losses(fine_tune=TUNE.model_copy(update={"temperature": 3.0}))
    assert gated == alike
    assert set(tuned).isdisjoint(others)
    assert set(gated).isdisjoint(losses(temperature=3.0)[0])


def test_specs_that_cannot_be() -> None:
    wrong = {"target": 0.0, "strength": 0.0, "c_start": 1e-5, "penalty_steps": 0, "threshold": -1.0, "temperature": 0.0}
    for changes in ({name: value} for name, value in wrong.items()):
        with pytest.raises(ValueError, match="found "):
            FunnelSpec(**changes)


def test_targets_out_of_reach(made: Made) -> None:
    with pytest.raises(BudgetError, match=r"target must be reachable: it is 0\.01"):
        made(target=0.01)


def test_results_are_of_runs_that_ended(made: Made) -> None:
    with pytest.raises(ValueError, match="this is 0 of 21"):
        made().result()


def test_losses_that_are_not_finite_are_errors(made: Made) -> None:
    run = made(weight_rate=1e9)
    with pytest.raises(FloatingPointError, match="diverged"):
        run.run()
    assert not run.training.model.training


@pytest.mark.slow
def test_a_trained_network_keeps_its_accuracy_at_half_the_macs() -> None:
    data = digits_data(900, 300)
    net = train_digits_cnn(data)
    formats = formats_of(net)
    kept = prepared_of(net, formats, data.input_shape, to_input(data.calibration, data))
    tune = TUNE.model_copy(update={"steps": 80, "batch_images": 64})
    spec = FunnelSpec(settle_steps=10, penalty_steps=120, fine_tune=tune)
    result = Funnel(net, formats, kept, data, spec, seed=0).run()
    x, labels = to_input(data.report.images, data), torch.as_tensor(data.report.labels)
    with torch.no_grad():
        dense, found = (float((model(x).argmax(1) == labels).float().mean()) for model in (net, result.model))
    assert 0.495 < result.macs_ratio <= 0.5
    assert found > dense - 0.03
