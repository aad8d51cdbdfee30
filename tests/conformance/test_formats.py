"""What every format must keep, on every layer that it is for, in both kinds of factors."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from ranksearch.calibration import collect
from ranksearch.conv import Conv
from ranksearch.decompositions import (
    FORMATS,
    Prepared,
    Ranks,
    Statistics,
    chain,
    check_ranks,
    compressed_stages,
    error,
    kernels,
    max_rank,
    prepare,
    rank_grid,
    report,
)
from ranksearch.decompositions.gauge import orthonormal_gauge
from ranksearch.errors import DecompositionError, RankError, UnsupportedLayer
from ranksearch.factors import content_hash
from ranksearch.space import RanksSpec
from ranksearch.surgery import build_chain, build_layer, geometry, kernel_of
from tests import cases, oracles
from tests.cases import LAYERS, PAIRS, LayerCase, conv_like


def _each(pairs: Iterable[tuple[str, LayerCase]]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(("name", "case"), [pytest.param(n, c, id=f"{n}, {c.name}") for n, c in pairs])


def _of_kinds(pairs: Iterable[tuple[str, LayerCase]]) -> pytest.MarkDecorator:
    """In both kinds; fits, which take longer, activation-aware on every third layer only."""
    chosen = [
        pytest.param(name, case, kind, id=f"{name}, {case.name}, {kind}")
        for name, case in pairs
        for kind in ("weight-only", "activation-aware")
        if cases.FORMATS[name].nested or kind == "weight-only" or case in LAYERS[::3]
    ]
    return pytest.mark.parametrize(("name", "case", "kind"), chosen)


every_pair = _each(PAIRS)
every_pair_of_both_kinds = _of_kinds(PAIRS)
every_sliced_pair = _each(pair for pair in PAIRS if cases.FORMATS[pair[0]].nested)
every_fitted_pair_of_both_kinds = _of_kinds(pair for pair in PAIRS if not cases.FORMATS[pair[0]].nested)
both_kinds = pytest.mark.parametrize("kind", ["weight-only", "activation-aware"])
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")


class Subject:
    """A dense layer in some dtype, with images that it sees and its prepared factors."""

    def __init__(self, name: str, case: LayerCase, kind: str, dtype: torch.dtype = torch.float32) -> None:
        torch.manual_seed(len(case.name))
        self.name, self.form = name, FORMATS[name]
        self.dense = case.build().to(dtype)
        self.dense.requires_grad_(False)
        self.images = correlated(self.dense, case.shape, images=24).to(dtype)
        self.conv = geometry(self.dense, (1, *case.shape))
        self.weight, self.bias = kernel_of(self.dense)
        self.statistics = statistics_of(self.dense, self.conv, self.images) if kind == "activation-aware" else None

    @cached_property
    def prepared(self) -> Prepared:
        """In the layer's dtype."""
        return _once(
            self._content,
            lambda: prepare(self.form, self.conv, self.weight, self.statistics, self.weight.dtype),
        )

    def built(self, ranks: Ranks) -> nn.Module:
        form, conv, prepared = self.form, self.conv, self.prepared
        weights = None if form.nested else _once((*self._content, ranks), lambda: kernels(form, conv, prepared, ranks))
        return build_layer(form, conv, prepared, ranks, self.bias, self.weight.dtype, weights)

    @cached_property
    def _content(self) -> tuple[object, ...]:
        tensors = [self.weight, *(vars(self.statistics).values() if self.statistics is not None else ())]
        return self.name, self.conv, content_hash(tensors)

    def kernel(self, ranks: Ranks) -> np.ndarray:
        found = oracles.kernel(self.name, [oracles.weight(stage) for stage in self.built(ranks)], self.conv.groups)
        return found.reshape(self.weight.shape)

    def errors(self) -> np.ndarray:
        """The predicted errors, an axis a rank."""
        prepared = self.prepared
        grid = itertools.product(*(range(1, bound + 1) for bound in self.bounds))
        return np.array([error(self.form, self.conv, prepared, ranks) for ranks in grid]).reshape(self.bounds)

    @property
    def bounds(self) -> Ranks:
        return max_rank(self.form, self.conv)

    def some_ranks(self) -> Iterator[Ranks]:
        """The smallest, the largest and some in between; of fits, which take longer, fewer."""
        if self.form.nested:
            yield from itertools.product(*(sorted({1, (bound + 1) // 2, bound}) for bound in self.bounds))
        else:
            yield from dict.fromkeys([(1,) * len(self.bounds), self.halves, self.bounds])

    @property
    def halves(self) -> Ranks:
        return tuple((bound + 1) // 2 for bound in self.bounds)


_MADE: dict[tuple[object, ...], Any] = {}


def _once(key: tuple[object, ...], make: Callable[[], Any]) -> Any:
    """What was made of the same content before: many tests look at the same fits."""
    if key not in _MADE:
        _MADE[key] = make()
    return _MADE[key]


def correlated(layer: nn.Module, shape: tuple[int, ...], *, images: int) -> Tensor:
    """Rectified inputs whose channels are correlated, have unequal sizes and a mean."""
    channels = shape[-1] if isinstance(layer, nn.Linear) else shape[0]
    mix = torch.randn(channels, channels) * 0.7 ** torch.arange(channels) + 0.2 * torch.eye(channels)
    x = torch.relu(torch.randn(images, *shape[:-1], channels) @ mix + 0.3)
    if isinstance(layer, nn.Linear):
        return x
    return torch.relu(torch.einsum("ns...,sr->nr...", torch.randn(images, *shape), mix) + 0.3)


def statistics_of(layer: nn.Module, conv: Conv, images: Tensor) -> Statistics:
    return collect(nn.Sequential(layer), {"0": conv}, images.split(10))["0"]


def mean_output(output: Tensor, conv: Conv) -> Tensor:
    return output.flatten(0, -2).mean(0) if conv.linear else output.movedim(1, -1).flatten(0, -2).mean(0)


def test_every_format_is_in_the_table() -> None:
    assert cases.FORMATS.keys() == FORMATS.keys()
    assert {name for name, _ in PAIRS} == FORMATS.keys()
    assert all(name == form.name for name, form in FORMATS.items())
    assert all(cases.FORMATS[name].nested == form.nested for name, form in FORMATS.items())


@every_pair_of_both_kinds
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_at_its_largest_rank_a_format_is_exact(
    name: str, case: LayerCase, kind: str, dtype: torch.dtype, tolerance: float
) -> None:
    subject = Subject(name, case, kind, dtype)
    built = subject.built(subject.bounds)
    fresh = torch.randn(3, *case.shape, dtype=dtype)
    for images in (subject.images, fresh):
        torch.testing.assert_close(built(images), subject.dense(images), rtol=tolerance, atol=tolerance)


@every_pair_of_both_kinds
def test_a_chain_equals_the_convolution_with_the_composed_kernel(name: str, case: LayerCase, kind: str) -> None:
    subject = Subject(name, case, kind)
    images = torch.randn(3, *case.shape)
    for ranks in subject.some_ranks():
        built = subject.built(ranks)
        expected = oracles.with_kernel(subject.dense, subject.kernel(ranks), built[-1].bias)(images.double())
        # The terms of a fit that nothing stabilised cancel, and float32 loses digits by it: another test's affair.
        found = built(images).double() if subject.form.nested else built.double()(images.double())
        tolerance = 1e-5 if subject.form.nested else 1e-9
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@every_pair
def test_macs_and_params_are_those_counted(name: str, case: LayerCase) -> None:
    subject = Subject(name, case, "weight-only")
    assert subject.conv.macs == oracles.macs(subject.dense, subject.images)
    assert subject.conv.params == oracles.params(subject.dense)
    for ranks in subject.some_ranks():
        stages, built = compressed_stages(subject.form, subject.conv, ranks), subject.built(ranks)
        assert sum(stage.macs for stage in stages) == oracles.macs(built, subject.images)
        assert sum(stage.params for stage in stages) == oracles.params(built)


@every_sliced_pair
def test_weight_only_factors_have_the_error_of_the_truncated_svd(name: str, case: LayerCase) -> None:
    subject = Subject(name, case, "weight-only")
    dense = oracles.weight(subject.dense).reshape(subject.weight.shape)
    prepared, bounds = subject.prepared, subject.bounds
    for ranks in subject.some_ranks():
        groups = list(zip(*(np.split(w, case.groups) for w in (subject.kernel(ranks), dense)), strict=True))
        lost = float(sum(((ours - theirs) ** 2).sum() for ours, theirs in groups))
        if len(ranks) == 2:
            # More directions than the unfolding's rank add nothing, and tensorly gives no more.
            within = [min(r, groups[0][1].size // n) for r, n in zip(ranks, bounds, strict=True)]
            for ours, theirs in groups:
                np.testing.assert_allclose(ours, oracles.hosvd(theirs, *within), atol=2e-6)
        else:
            least = sum(oracles.truncation(oracles.unfolded(name, theirs), *ranks) for _, theirs in groups)
            assert lost == pytest.approx(least, rel=1e-4, abs=1e-9)
        assert error(subject.form, subject.conv, prepared, ranks) == pytest.approx(lost / (dense**2).sum(), abs=1e-5)


@every_sliced_pair
def test_the_activation_aware_error_is_the_share_lost_in_its_metric(name: str, case: LayerCase) -> None:
    subject = Subject(name, case, "activation-aware")
    dense, prepared = subject.weight.double().numpy(), subject.prepared
    assert subject.statistics is not None

    def blocks(matrix: Tensor) -> list[np.ndarray]:
        size = len(matrix) // case.groups
        return [matrix.numpy()[i : i + size, i : i + size] for i in range(0, len(matrix), size)]

    for ranks in subject.some_ranks():
        if name in ("svd", "channel-svd"):  # the variance of the layer's output
            spectra = [np.linalg.eigvalsh(b)[::-1] for b in blocks(subject.statistics.output_covariance)]
            total = sum(spectrum.sum() for spectrum in spectra)
            lost = sum(spectrum[ranks[0] :].sum() for spectrum in spectra)
        else:
            roots = [np.linalg.cholesky(block) for block in blocks(subject.statistics.input_moment)]

            def squared(kernel: np.ndarray, roots: list[np.ndarray] = roots) -> float:
                parts = zip(np.split(kernel, case.groups), roots, strict=True)
                return sum(float((np.einsum("ts...,sr->tr...", part, root) ** 2).sum()) for part, root in parts)

            total, lost = squared(dense), squared(subject.kernel(ranks) - dense)
        assert error(subject.form, subject.conv, prepared, ranks) == pytest.approx(lost / total, abs=1e-4)


@every_sliced_pair
@both_kinds
def test_the_error_falls_with_every_rank(name: str, case: LayerCase, kind: str) -> None:
    subject = Subject(name, case, kind)
    errors = subject.errors()
    for axis in range(errors.ndim):
        assert (np.diff(errors, axis=axis) <= 0).all()
    assert errors[(-1,) * errors.ndim] == pytest.approx(0.0, abs=1e-6)
    if kind == "weight-only":
        dense = subject.weight.double().numpy()
        line = [tuple(min(r, bound) for bound in subject.bounds) for r in range(1, max(subject.bounds) + 1)]
        found = [((subject.kernel(ranks) - dense) ** 2).sum() for ranks in line]
        assert all(after <= before + 1e-9 for before, after in itertools.pairwise(found))


@every_fitted_pair_of_both_kinds
def test_the_predicted_error_of_a_fit_falls_to_nothing(name: str, case: LayerCase, kind: str) -> None:
    subject = Subject(name, case, kind)
    line = [tuple(max(1, round(share * b)) for b in subject.bounds) for share in (0.0, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0)]
    errors = [error(subject.form, subject.conv, subject.prepared, ranks) for ranks in line]
    assert all(0 <= after <= before <= 1 for before, after in itertools.pairwise(errors))
    assert errors[-1] == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("name", [name for name, form in FORMATS.items() if not form.nested])
@both_kinds
def test_the_predicted_error_of_a_fit_is_near_that_of_the_fit(name: str, kind: str) -> None:
    case = LayerCase(name="wide", build=lambda: nn.Conv2d(14, 18, 3), shape=(14, 6, 6), family="spatial")
    subject = Subject(name, case, kind)
    subject.weight.copy_(conv_like(9, 14, 18).permute(2, 1, 0).reshape(18, 14, 3, 3))
    if subject.statistics is not None:
        subject.statistics = statistics_of(subject.dense, subject.conv, subject.images)
    ranks = rank_grid(subject.form, subject.conv, RanksSpec(ratios=[0.25, 0.5, 0.75], joint=True))
    for chosen in ranks[:: max(1, len(ranks) // 4)]:
        found = kernels(subject.form, subject.conv, subject.prepared, chosen)
        told = report(subject.form, subject.conv, chosen, subject.weight, found, subject.prepared.get("root"))
        predicted = error(subject.form, subject.conv, subject.prepared, chosen)
        assert predicted == pytest.approx(told.relative_error, rel=0.5, abs=0.03)


@every_pair
def test_activation_aware_factors_keep_the_mean_output(name: str, case: LayerCase) -> None:
    subject = Subject(name, case, "activation-aware")
    expected = mean_output(subject.dense(subject.images), subject.conv)
    for ranks in subject.some_ranks():
        found = mean_output(subject.built(ranks)(subject.images), subject.conv)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", FORMATS)
def test_on_correlated_inputs_activation_aware_factors_lose_less_of_the_output(name: str) -> None:
    case = LayerCase(
        name="wide",
        build=lambda: nn.Conv2d(12, 14, 1 if name == "svd" else 3, padding=0 if name == "svd" else 1),
        shape=(12, 8, 8),
        family="spatial",
    )
    plain, aware = (Subject(name, case, kind) for kind in ("weight-only", "activation-aware"))
    expected = plain.dense(plain.images)
    # Fits of larger shares are all but exact.
    for share in (0.25, 0.5, 0.75) if FORMATS[name].nested else (0.1, 0.15, 0.25):
        ranks = tuple(max(1, int(share * bound)) for bound in plain.bounds)
        with torch.no_grad():
            lost = [float((s.built(ranks)(s.images) - expected).square().mean()) for s in (plain, aware)]
        assert lost[1] < lost[0]


@pytest.mark.parametrize("name", FORMATS)
def test_dead_input_channels_change_nothing_of_the_rest(name: str) -> None:
    """A singular moment and covariance; on other images the dead channels may come alive."""
    size = 1 if name == "svd" else 3
    case = LayerCase(name="dead", build=lambda: nn.Conv2d(5, 60, size), shape=(5, 6, 6), family="spatial")
    subject = Subject(name, case, "activation-aware")
    subject.images[:, 1:3] = 0.0
    subject.statistics = statistics_of(subject.dense, subject.conv, subject.images)
    built = subject.built(subject.bounds)
    for images in (subject.images, torch.randn(4, 5, 6, 6)):
        torch.testing.assert_close(built(images), subject.dense(images), rtol=1e-3, atol=1e-3)
    half = subject.halves
    assert bool(torch.isfinite(subject.built(half)(torch.randn(4, 5, 6, 6))).all())


@every_pair_of_both_kinds
def test_a_kernel_of_zeros_gives_the_bias(name: str, case: LayerCase, kind: str) -> None:
    subject = Subject(name, case, kind)
    subject.dense.weight.data.zero_()
    subject.weight.zero_()  # of torch's transposed layers a copy
    if subject.statistics is not None:
        subject.statistics = statistics_of(subject.dense, subject.conv, subject.images)
    for ranks in subject.some_ranks():
        torch.testing.assert_close(subject.built(ranks)(subject.images), subject.dense(subject.images))
        assert error(subject.form, subject.conv, subject.prepared, ranks) == 0


@every_pair
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_kernel_that_is_not_finite_is_refused(name: str, case: LayerCase, value: float) -> None:
    subject = Subject(name, case, "weight-only")
    subject.weight = subject.weight.clone()
    subject.weight[-1, -1] = value
    with pytest.raises(DecompositionError, match="NaN or infinite"):
        _ = subject.prepared


@every_pair
def test_ranks_out_of_bounds_are_refused_by_name(name: str, case: LayerCase) -> None:
    subject = Subject(name, case, "weight-only")
    prepared, bounds = subject.prepared, subject.bounds
    check_ranks(subject.form, subject.conv, bounds)
    wrong = [(), (*bounds, 1), (0, *bounds[1:]), (-1, *bounds[1:]), (*bounds[:-1], bounds[-1] + 1)]
    for ranks in wrong:
        with pytest.raises(RankError) as caught:
            chain(subject.form, subject.conv, prepared, ranks, None)
        assert str(bounds) in str(caught.value)
        assert str(ranks) in str(caught.value)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("case", LAYERS, ids=lambda case: case.name)
def test_a_layer_that_a_format_is_not_for_is_refused_with_the_reason(name: str, case: LayerCase) -> None:
    conv = geometry(case.build(), (1, *case.shape))
    if (name, case) in PAIRS:
        assert all(bound >= 1 for bound in max_rank(FORMATS[name], conv))
        return
    reason = {"depthwise": "depthwise", "spatial": "1x1", "pointwise": "spatial kernel"}[case.family]
    if case.family == cases.FORMATS[name].family:
        reason = r"axes|axis"
    with pytest.raises(UnsupportedLayer, match=reason):
        max_rank(FORMATS[name], conv)


@every_pair
def test_the_dense_layer_is_untouched_and_its_dtype_kept(name: str, case: LayerCase) -> None:
    for dtype in (torch.float32, torch.float64, torch.bfloat16) if FORMATS[name].nested else (torch.bfloat16,):
        layer = case.build().to(dtype)
        before = copy.deepcopy(layer.state_dict())
        conv, (weight, bias) = geometry(layer, (1, *case.shape)), kernel_of(layer)
        prepared = prepare(FORMATS[name], conv, weight)
        built = build_layer(FORMATS[name], conv, prepared, max_rank(FORMATS[name], conv), bias, dtype)
        assert {value.dtype for value in built.state_dict().values()} == {dtype}
        with torch.no_grad():
            for parameter in built.parameters():
                parameter.add_(1)
        torch.testing.assert_close(layer.state_dict(), before, rtol=0, atol=0)


@every_pair_of_both_kinds
def test_gradients_reach_every_factor(name: str, case: LayerCase, kind: str) -> None:
    subject = Subject(name, case, kind)
    built = subject.built(subject.halves)
    built(subject.images).square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in built.parameters())


@every_pair
def test_the_state_is_loaded_into_a_chain_without_weights(name: str, case: LayerCase) -> None:
    subject = Subject(name, case, "weight-only")
    for ranks in subject.some_ranks():
        built, empty = subject.built(ranks), build_chain(compressed_stages(subject.form, subject.conv, ranks))
        assert not any(bool(value.any()) for value in empty.state_dict().values())
        empty.load_state_dict(built.state_dict())
        assert torch.equal(empty(subject.images), built(subject.images))


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec:FutureWarning")
def test_chains_are_exported_to_onnx_for_any_number_of_images(name: str) -> None:
    subjects = [Subject(name, case, "weight-only") for pair, case in PAIRS if pair == name]
    # onnxruntime refuses output paddings as large as the stride, which torch allows below the dilation.
    subjects = [s for s in subjects if all(x < n for x, n in zip(s.conv.output_padding, s.conv.stride, strict=True))]
    chains = [s.built(tuple((bound + 1) // 2 for bound in s.bounds)) for s in subjects]
    together = SideBySide(chains).eval()
    images = tuple(subject.images[:2] for subject in subjects)
    dynamic = (tuple({0: "images"} for _ in images),)
    program = torch.onnx.export(together, images, dynamo=True, verbose=False, dynamic_shapes=dynamic)
    assert program is not None
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString(), providers=["CPUExecutionProvider"])
    fresh = [torch.randn(3, *subject.images.shape[1:]) for subject in subjects]
    found = session.run(None, {i.name: x.numpy() for i, x in zip(session.get_inputs(), fresh, strict=True)})
    for ours, built, x, subject in zip(found, chains, fresh, subjects, strict=True):
        assert ours.shape == tuple(subject.dense(x).shape)
        torch.testing.assert_close(torch.from_numpy(ours), built(x), rtol=1e-4, atol=1e-4)


class SideBySide(nn.Module):
    """Chains that run each on its own input: one export for all."""

    def __init__(self, chains: list[nn.Module]) -> None:
        super().__init__()
        self.chains = nn.ModuleList(chains).requires_grad_(False)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(chain(x) for chain, x in zip(self.chains, inputs, strict=True))


ungrouped = _each((n, c) for n, c in PAIRS if c.groups == 1 and cases.FORMATS[n].nested)
"""The layers as formats that are sliced see them."""


@ungrouped
@both_kinds
def test_smaller_ranks_are_slices_of_larger_ones(name: str, case: LayerCase, kind: str) -> None:
    subject = Subject(name, case, kind)
    prepared = subject.prepared
    whole = [stage.double() for stage in subject.form.factors(prepared, subject.bounds)]
    for ranks in subject.some_ranks():
        for part, full in zip(subject.form.factors(prepared, ranks), whole, strict=True):
            assert torch.equal(part.double(), full[tuple(slice(n) for n in part.shape)])


@ungrouped
def test_the_gauge_leaves_the_kernel_and_makes_outer_factors_orthonormal(name: str, case: LayerCase) -> None:
    subject = Subject(name, case, "weight-only", torch.float64)
    for ranks in subject.some_ranks():
        # Any factors of these shapes: those of a format may be orthonormal as they come.
        raw = [torch.randn_like(stage) for stage in subject.form.factors(subject.prepared, ranks)]
        stages = orthonormal_gauge(raw)
        composed = [oracles.kernel(name, [stage.numpy() for stage in chain]) for chain in (stages, raw)]
        np.testing.assert_allclose(*composed, rtol=1e-9, atol=1e-9)
        rows, columns = stages[0].flatten(1), stages[-1].movedim(1, -1).flatten(0, -2)
        if len(stages) == 3:
            torch.testing.assert_close(rows @ rows.T, torch.eye(ranks[0], dtype=rows.dtype))
            torch.testing.assert_close(columns.T @ columns, torch.eye(ranks[-1], dtype=rows.dtype))
        else:  # both share the singular values of the product, and so have the same Gram matrix
            torch.testing.assert_close(rows @ rows.T, columns.T @ columns, rtol=1e-6, atol=1e-6)
            spectrum = torch.from_numpy(np.linalg.svd(columns @ rows, compute_uv=False)[: ranks[0]])
            torch.testing.assert_close((rows @ rows.T).diagonal(), spectrum, rtol=1e-6, atol=1e-6)
