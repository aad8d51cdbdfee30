"""Sequential regression against NumPy's least squares, recalibration against torch's own training mode."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ranksearch import reconstruction
from ranksearch.calibration import sample_outputs
from ranksearch.decompositions import FORMATS, max_rank, prepare
from ranksearch.refit import recalibrate, regauge, sensitivity_of, sequential_regression
from ranksearch.surgery import build_layer, find_layers, geometry, kernel_of
from tests import oracles
from tests.cases import PAIRS, LayerCase
from tests.networks import SmallNet, small_images, small_net
from tests.unit.test_surgery import RANKS, rank_map

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
RIDGE = 1e-3


def ridge(features: np.ndarray, targets: np.ndarray, start: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Weights and bias of least squares, pulled towards ``start``, as one augmented least-squares problem."""
    centred = features - features.mean(0)
    pull = np.sqrt(RIDGE * (centred**2).sum() / features.shape[1])
    left = np.vstack([centred, pull * np.eye(features.shape[1])])
    right = np.vstack([targets - targets.mean(0), pull * start])
    weights = np.linalg.lstsq(left, right, rcond=None)[0]
    return weights, targets.mean(0) - features.mean(0) @ weights


def features_of(stage: nn.Module, x: Tensor) -> np.ndarray:
    """``(N P, S, kernel)``."""
    found = x.flatten(0, -2) if isinstance(stage, nn.Linear) else oracles.patches(stage, x)
    return found.double().numpy().reshape(*found.shape[:2], -1)


@pytest.mark.parametrize(("name", "case"), [pytest.param(n, c, id=f"{n}, {c.name}") for n, c in PAIRS])
def test_one_layer_equals_ridge_regression_and_is_never_worse(name: str, case: LayerCase) -> None:
    torch.manual_seed(2)
    dense = nn.Sequential(case.build()).requires_grad_(False)
    x = torch.randn(40, *case.shape)
    conv = geometry(dense[0], (1, *case.shape))
    samples = sample_outputs(dense, {"0": conv}, [x], pixels=10_000, seed=0)
    weight, bias = kernel_of(dense[0])
    ranks = tuple((bound + 1) // 2 for bound in max_rank(FORMATS[name], conv))
    chain = build_layer(FORMATS[name], conv, prepare(FORMATS[name], conv, weight), ranks, bias, weight.dtype)
    before = nn.Sequential(chain).requires_grad_(False)
    after = copy.deepcopy(before)
    sequential_regression(after, ["0"], samples, x, ridge=RIDGE)
    last = before[0][-1]
    hidden = before[0][:-1](x)
    y = dense(x)
    targets = y.flatten(0, -2) if isinstance(last, nn.Linear) else y.movedim(1, -1).flatten(0, -2)
    kernels = [oracles.weight(net[0][-1]) for net in (before, after)]
    parts = [*kernels, after[0][-1].bias.numpy(), features_of(last, hidden), targets.double().numpy()]
    split = [np.split(part, case.groups, axis) for part, axis in zip(parts, (0, 0, 0, 1, 1), strict=True)]
    for start, found, bias, features, outputs in zip(*split, strict=True):
        flat = start.reshape(len(start), -1).T
        weights, constant = ridge(features.reshape(len(features), -1), outputs, flat)
        np.testing.assert_allclose(found.reshape(len(found), -1).T, weights, rtol=1e-3, atol=2e-4)
        np.testing.assert_allclose(bias, constant, rtol=1e-3, atol=2e-4)
    errors = [float((net(x) - y).square().mean()) for net in (before, after)]
    assert errors[1] <= errors[0] * (1 + 1e-5) + 1e-10
    for old, new in zip(before[0][:-1], after[0][:-1], strict=True):
        assert torch.equal(old.weight, new.weight)


OF_EACH_KIND = [(n, c) for n, c in PAIRS if n in ("tucker2", "spatial-svd", "svd", "cp", "tensor-chain")]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "case"), [pytest.param(n, c, id=f"{n}, {c.name}") for n, c in OF_EACH_KIND])
def test_all_stages_of_a_layer_fit_no_worse_than_the_last_alone(name: str, case: LayerCase) -> None:
    torch.manual_seed(2)
    dense = nn.Sequential(case.build()).requires_grad_(False)
    x = torch.randn(40, *case.shape)
    conv = geometry(dense[0], (1, *case.shape))
    samples = sample_outputs(dense, {"0": conv}, [x], pixels=10_000, seed=0)
    weight, bias = kernel_of(dense[0])
    form = FORMATS[name]
    ranks = tuple((bound + 1) // 2 for bound in max_rank(form, conv))
    chain = build_layer(form, conv, prepare(form, conv, weight), ranks, bias, weight.dtype)
    # Away from the decomposition, so that there is something to fit whatever the format.
    for parameter in chain.parameters():
        parameter.data += 0.3 * parameter.data.abs().mean() * torch.randn_like(parameter)
    last = nn.Sequential(chain).requires_grad_(False)
    every = copy.deepcopy(last)
    sequential_regression(last, ["0"], samples, x)
    sequential_regression(every, ["0"], samples, x, chains={"0": (name, conv, ranks)})
    errors = [float((net(x) - dense(x)).square().mean()) for net in (last, every)]
    assert errors[1] <= errors[0] * (1 + 1e-3) + 1e-10
    if len(chain) > 1 and errors[0] > 1e-3 * float(dense(x).var()):
        assert errors[1] < errors[0]


def test_patches_beyond_the_largest_are_left_to_the_last_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    net, images = small_net().requires_grad_(False), small_images(64)
    convs = {layer.name: layer.conv for layer in find_layers(net, SmallNet.shape) if layer.name in RANKS}
    samples = sample_outputs(net, convs, images.split(16), pixels=10_000, seed=0)
    made = rank_map(net, RANKS, SmallNet.shape)
    chains = {name: (made.layers[name].format, convs[name], made.layers[name].ranks) for name in RANKS}
    last, every = (made.apply(net).requires_grad_(False) for _ in range(2))
    sequential_regression(last, RANKS, samples, images)
    monkeypatch.setattr(reconstruction, "LARGEST", 1)
    sequential_regression(every, RANKS, samples, images, chains=chains)
    torch.testing.assert_close(every.state_dict(), last.state_dict(), rtol=0, atol=0)


def test_a_network_is_refitted_layer_by_layer_from_its_own_activations() -> None:
    """What the layers before hand down is absorbed: the last compressed layer is nearer to the dense one's output."""
    net, images = small_net().requires_grad_(False), small_images(64)
    convs = {layer.name: layer.conv for layer in find_layers(net, SmallNet.shape) if layer.name in RANKS}
    samples = sample_outputs(net, convs, images.split(16), pixels=10_000, seed=0)
    before = rank_map(net, RANKS, SmallNet.shape).apply(net).requires_grad_(False)
    after = copy.deepcopy(before).train()
    sequential_regression(after, RANKS, samples, images)
    assert all(module.training for module in after.modules())
    assert not any(module._forward_pre_hooks for module in after.modules())
    changed = {k for k, v in after.state_dict().items() if not torch.equal(v, before.state_dict()[k])}
    lasts = {"body.plain": 2, "body.strided": 1, "body.point": 1}
    assert changed == {f"{name}.{i}.{part}" for name, i in lasts.items() for part in ("weight", "bias")}
    for name in RANKS:
        one = {name: convs[name]}
        outputs = [sample_outputs(n, one, [images], pixels=10_000, seed=0)[name] for n in (before, after)]
        errors = [float((found.outputs - samples[name].outputs).square().mean()) for found in outputs]
        assert errors[1] < errors[0]


def test_a_network_in_double_precision_is_refitted_as_one_in_single() -> None:
    found = []
    for dtype in (torch.float32, torch.float64):
        net, images = small_net(dtype).requires_grad_(False), small_images(64, dtype=dtype)
        convs = {layer.name: layer.conv for layer in find_layers(net, SmallNet.shape) if layer.name in RANKS}
        samples = sample_outputs(net, convs, [images], pixels=10_000, seed=0)
        refitted = rank_map(net, RANKS, SmallNet.shape).apply(net).requires_grad_(False)
        sequential_regression(refitted, RANKS, samples, images)
        assert {parameter.dtype for parameter in refitted.parameters()} == {dtype}
        found.append(refitted(images).double())
    torch.testing.assert_close(*found, rtol=2e-2, atol=5e-3)


def test_activations_that_cannot_be_regressed_on_leave_the_factors() -> None:
    net, images = small_net().requires_grad_(False), small_images(8)
    convs = {layer.name: layer.conv for layer in find_layers(net, SmallNet.shape) if layer.name in RANKS}
    samples = sample_outputs(net, convs, [images], pixels=9, seed=0)
    built = rank_map(net, RANKS, SmallNet.shape).apply(net)
    before = copy.deepcopy(built.state_dict())
    sequential_regression(built, RANKS, samples, images * float("inf"))
    torch.testing.assert_close(built.state_dict(), before, rtol=0, atol=0)


def test_recalibration_is_the_mean_over_batches_of_training_mode() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3),
        nn.BatchNorm2d(6, momentum=0.3),
        nn.ReLU(),
        nn.Conv2d(6, 4, 3),
        nn.BatchNorm2d(4),
        nn.Dropout(),
        nn.BatchNorm2d(4, track_running_stats=False),
    )
    net[1].requires_grad_(False)
    net.eval()
    net[5].train()
    batches = (torch.randn(30, 3, 8, 8) * 2 + 1).split(10)
    ours, theirs = copy.deepcopy(net), copy.deepcopy(net)
    recalibrate(ours, batches)
    theirs.train()
    theirs[5].eval()
    for i in (1, 4):
        theirs[i].reset_running_stats()
        theirs[i].momentum = None
    with torch.no_grad():
        for images in batches:
            theirs(images)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict())
    assert [m.training for m in ours.modules()] == [m.training for m in net.modules()]
    assert (ours[1].momentum, ours[4].momentum) == (0.3, 0.1)


def test_modes_and_momenta_are_restored_after_an_error() -> None:
    net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6))
    with pytest.raises(RuntimeError):
        recalibrate(net.eval(), [torch.zeros(2, 5, 8, 8)])
    assert (net[1].momentum, net.training, net[1].training) == (0.1, False, False)


LOOPED = [("tensor-chain", (2, 4, 5)), ("cp", (9,)), ("cp4", (9,))]


@pytest.mark.parametrize(("name", "ranks"), LOOPED)
@pytest.mark.parametrize("groups", [1, 2])
def test_another_gauge_is_the_same_network(name: str, ranks: tuple[int, ...], groups: int) -> None:
    torch.manual_seed(0)
    dense = nn.Conv2d(8 * groups, 10 * groups, 3, padding=1, groups=groups)
    conv, (weight, bias) = geometry(dense, (1, 8 * groups, 7, 7)), kernel_of(dense)
    layer = build_layer(FORMATS[name], conv, prepare(FORMATS[name], conv, weight), ranks, bias, torch.float32)
    model = nn.Sequential(layer)
    with torch.no_grad():  # scales that leave the network as it is, as training drifts along them
        for stage, scale in zip(layer, [30.0] + [1 / 30.0] + [1.0] * (len(layer) - 2), strict=True):
            stage.weight.mul_(scale)
    chains = {"0": (name, conv, ranks)}
    images = torch.randn(4, 8 * groups, 7, 7)
    before, sensitive = model(images), sensitivity_of(model, chains)
    regauge(model, chains)
    torch.testing.assert_close(model(images), before, rtol=1e-4, atol=1e-4)
    assert sensitivity_of(model, chains) < 0.2 * sensitive


def test_formats_without_a_gauge_of_their_own_are_left_alone() -> None:
    torch.manual_seed(0)
    dense = nn.Conv2d(8, 10, 3)
    conv, (weight, bias) = geometry(dense, (1, 8, 7, 7)), kernel_of(dense)
    form = FORMATS["tucker2"]
    model = nn.Sequential(build_layer(form, conv, prepare(form, conv, weight), (4, 5), bias, torch.float32))
    before = copy.deepcopy(model.state_dict())
    regauge(model, {"0": ("tucker2", conv, (4, 5))})
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
