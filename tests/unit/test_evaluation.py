"""From choices to a scored network: what is built, which images it sees, and how it is trained."""

from __future__ import annotations

import base64
import contextlib
import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from scipy.special import log_softmax
from torch import nn

from ranksearch import preparation
from ranksearch.config import parse_space
from ranksearch.data import Data, to_input
from ranksearch.data.splits import without_duplicates
from ranksearch.errors import StudyError
from ranksearch.evaluation import Bench, Evaluator
from ranksearch.factors import threads
from ranksearch.interpolation import interpolated, sampled
from ranksearch.models import build_model
from ranksearch.preparation import Network, factorise, make_bench, read_network, settle, silent, statistics_of
from ranksearch.prices import with_prices
from ranksearch.scoring import score
from ranksearch.space import AugmentSpec, BudgetSpec, FineTuneSpec
from ranksearch.table import PriceTable
from ranksearch.training import fine_tune, steps_of
from ranksearch.trial import Task

SPACE: dict[str, Any] = {
    "model": {"name": "digits-cnn"},
    "data": {
        "source": "tests.digits:digits",
        "options": {"train": 300, "search": 100, "report": 100},
        "calibration_images": 100,
        "mean": [0.3053],
        "std": [0.3763],
    },
    "ranks": {"ratios": [0.3, 0.6, 1.0]},
    "evaluation": {"refit_images": 60, "select_images": 40, "batch_images": 64},
}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Network, Bench]:
    folder = tmp_path_factory.mktemp("bench")
    network = read_network(parse_space(SPACE), folder / "cache")
    factors, failed = factorise(network, folder / "cache")
    setting = settle(network, factors, failed, folder / "cache")
    assert not failed
    return network, make_bench(network, factors, setting, folder / "weights", folder / "cache", silent)


@pytest.fixture
def bench(prepared: tuple[Network, Bench], tmp_path: Path) -> Bench:
    return replace(prepared[1], weights_folder=tmp_path / "weights")


def under(bench: Bench, **evaluation: Any) -> Bench:
    """The bench with a changed ``evaluation`` section."""
    space = parse_space(SPACE | {"evaluation": SPACE["evaluation"] | evaluation})
    return replace(bench, space=space)


def cheapest(bench: Bench) -> tuple[int, ...]:
    return (0,) * len(bench.table.layers)


def plain_outputs(model: nn.Module, images: np.ndarray) -> np.ndarray:
    """Outputs for uint8 images ``(N, 8, 8, 1)``, normalised by hand."""
    x = (torch.as_tensor(images).permute(0, 3, 1, 2).double() / 255 - 0.3053) / 0.3763
    with torch.no_grad():
        return model.double()(x).numpy()


def test_score_by_hand(prepared: tuple[Network, Bench]) -> None:
    network, _ = prepared
    split = network.data.search
    found = score(network.model, split, network.data, batch_images=33, device=torch.device("cpu"))
    outputs = plain_outputs(build_copy(network), split.images)
    assert found.accuracy == np.mean(outputs.argmax(1) == split.labels)
    assert found.loss == pytest.approx(-log_softmax(outputs, 1)[np.arange(100), split.labels].mean(), rel=1e-5)
    assert found.images == 100


def build_copy(network: Network) -> nn.Module:
    model = build_model(network.space.model, weights=None)
    model.load_state_dict(network.model.state_dict())
    return model


def test_dense_choices_are_the_dense_network(prepared: tuple[Network, Bench], bench: Bench) -> None:
    network, _ = prepared
    outcome = Evaluator(under(bench, recalibrate="never"))(Task(number=0, choices=bench.table.dense, seed=0))
    dense = score(network.model, network.data.search, network.data, batch_images=64, device=torch.device("cpu"))
    assert (outcome.accuracy_search, outcome.loss) == (dense.accuracy, dense.loss)
    assert (outcome.macs, outcome.params) == (bench.table.dense_macs, bench.table.dense_params)
    assert outcome.details["divergence"] == pytest.approx(0.0, abs=1e-9)
    assert outcome.seconds > 0


def test_the_kind_nearest_to_dense_is_taken(bench: Bench) -> None:
    choices = cheapest(bench)
    picked = {name: c for name, c in bench.table.picked(choices).items() if not c.dense}
    kinds = ("weight-only", "activation-aware")
    divergences = {
        (kind, recalibrate): Evaluator(under(bench, factors=kind, recalibrate=recalibrate)).build(picked).divergence
        for kind in kinds
        for recalibrate in ("always", "never")
    }
    best = min(divergences, key=lambda key: divergences[key])
    built = Evaluator(bench).build(picked)
    assert len(set(divergences.values())) == 4
    assert (built.kind, "always" if built.recalibrated else "never") == best
    assert built.divergence == divergences[best]
    dense = build_model(bench.space.model, weights=None)
    dense.load_state_dict({key: torch.tensor(value) for key, value in bench.state.items()})
    images = bench.data.calibration[-40:]
    p, q = (log_softmax(plain_outputs(model, images), 1) for model in (dense, built.model))
    assert built.divergence == pytest.approx((np.exp(p) * (p - q)).sum(1).mean(), rel=1e-3)


def test_weights_and_report_score_only_of_what_may_be_on_the_front(bench: Bench) -> None:
    evaluate = Evaluator(bench)
    task = Task(number=3, choices=cheapest(bench), seed=0)
    first = evaluate(task)
    point = (-first.accuracy_search, float(first.macs))
    equal, better = evaluate(replace(task, number=4, incumbents=(point,))), (point[0] - 0.01, point[1] + 1)
    assert (equal.accuracy, equal.weights, equal.report_images) == (None, None, 0)
    third = evaluate(replace(task, number=5, incumbents=(better,)))
    assert third.weights == "trial-00005.safetensors"
    assert (first.accuracy, first.report_images) == (third.accuracy, 100)
    assert sorted(path.name for path in bench.weights_folder.iterdir()) == [first.weights, third.weights]


def test_a_space_may_ask_for_the_report_score_of_every_trial(bench: Bench) -> None:
    task = Task(number=3, choices=cheapest(bench), seed=0)
    first = Evaluator(bench)(task)
    beaten = replace(task, number=4, incumbents=((-first.accuracy_search, float(first.macs)),))
    outcome = Evaluator(under(bench, report="all"))(beaten)
    assert (outcome.accuracy, outcome.report_images, outcome.weights) == (first.accuracy, 100, None)
    assert [path.name for path in bench.weights_folder.iterdir()] == [first.weights]


def test_an_outcome_says_which_report_images_were_classified_rightly(bench: Bench) -> None:
    evaluate = Evaluator(under(bench, report="all"))
    outcome = evaluate(Task(number=3, choices=cheapest(bench), seed=0))
    picked = {k: c for k, c in bench.table.picked(cheapest(bench)).items() if not c.dense}
    report = bench.data.report
    right = plain_outputs(evaluate.build(picked).model, report.images).argmax(1) == report.labels
    assert outcome.report_right is not None
    told = "".join(f"{byte:08b}" for byte in base64.b64decode(outcome.report_right))
    assert told[:100] == "".join("1" if one else "0" for one in right)
    assert 0 < right.sum() < 100


def test_an_evaluator_carries_nothing_from_task_to_task(bench: Bench) -> None:
    tuned = under(bench, fine_tune={"steps": 4, "batch_images": 32})
    warm, fresh = Evaluator(tuned), Evaluator(tuned)
    tasks = [Task(number=i, choices=c, seed=i) for i, c in enumerate((cheapest(bench), bench.table.dense))]
    forward = [warm(task) for task in tasks]
    backward = [fresh(task) for task in reversed(tasks)][::-1]
    assert [replace(o, seconds=0.0) for o in forward] == [replace(o, seconds=0.0) for o in backward]
    other = warm(replace(tasks[0], seed=99))
    assert other.loss != forward[0].loss, "another seed draws other batches"


def test_threads_are_given_back() -> None:
    before = torch.get_num_threads()
    with contextlib.suppress(ZeroDivisionError), threads(before + 1):
        assert torch.get_num_threads() == before + 1
        raise ZeroDivisionError
    assert torch.get_num_threads() == before


@pytest.fixture
def training(prepared: tuple[Network, Bench]) -> tuple[nn.Module, nn.Module, Data]:
    """A network spoilt by noise, the dense one, and the data."""
    network, _ = prepared
    spoilt = build_copy(network)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in spoilt.parameters():
            p += 0.3 * p.std(correction=0) * torch.randn(p.shape, generator=generator)
    return spoilt, build_copy(network), network.data


def tuned(model: nn.Module, dense: nn.Module, data: Data, spec: FineTuneSpec, seed: int = 0) -> float:
    return fine_tune(
        model,
        dense,
        data.train,
        lambda split, index: to_input(split.images[index.numpy()], data),
        spec,
        AugmentSpec(),
        seed=seed,
        dtype=torch.float32,
    )


@pytest.mark.parametrize("distill", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("recipe", [{"optimiser": "sgd", "batch_norm": "batch"}, {"learning_rate": 0.001}], ids=str)
def test_fine_tuning_restores(
    recipe: dict[str, Any], distill: float, training: tuple[nn.Module, nn.Module, Data]
) -> None:
    model, dense, data = training
    before = score(model, data.search, data, batch_images=64, device=torch.device("cpu"))
    kept = {key: value.clone() for key, value in dense.state_dict().items()}
    spec = FineTuneSpec(steps=30, batch_images=32, distill=distill, **recipe)
    last = tuned(model, dense, data, spec)
    after = score(model, data.search, data, batch_images=64, device=torch.device("cpu"))
    assert after.loss < 0.7 * before.loss
    assert np.isfinite(last)
    assert not model.training
    assert all(torch.equal(value, kept[key]) for key, value in dense.state_dict().items()), "the teacher is not taught"


def test_fine_tuning_is_stochastic_gradient_descent(training: tuple[nn.Module, nn.Module, Data]) -> None:
    """One step over all images, without momentum and decay, is one step down the gradient of the mean loss."""
    model, dense, data = training
    few = replace(data, train=data.train[:32], calibration_images=32)
    plain: dict[str, Any] = {"optimiser": "sgd", "batch_norm": "batch", "momentum": 0, "weight_decay": 0}
    spec = FineTuneSpec(steps=1, batch_images=32, distill=0, learning_rate=0.1, **plain)
    theirs = build_model(parse_space(SPACE).model, weights=None)
    theirs.load_state_dict(model.state_dict())
    theirs.train()
    loss = nn.functional.cross_entropy(theirs(to_input(few.train.images, few)), torch.as_tensor(few.train.labels))
    loss.backward()
    assert tuned(model, dense, few, spec) == pytest.approx(float(loss.detach()), rel=1e-5)
    for (name, ours), p in zip(model.named_parameters(), theirs.parameters(), strict=True):
        assert p.grad is not None
        torch.testing.assert_close(ours, p - 0.1 * p.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_adam_with_frozen_batch_norms(training: tuple[nn.Module, nn.Module, Data]) -> None:
    """Its first step moves every parameter by the learning rate against its gradient, whose statistics are the model's.

    The oracle differentiates the network in evaluation mode.
    """
    model, dense, data = training
    few = replace(data, train=data.train[:32], calibration_images=32)
    spec = FineTuneSpec(steps=1, batch_images=32, distill=0, learning_rate=0.001, weight_decay=0)
    theirs = build_model(parse_space(SPACE).model, weights=None)
    theirs.load_state_dict(model.state_dict())
    kept = {name: value.clone() for name, value in model.named_buffers()}
    assert kept, "the network has batch norms"
    theirs.eval()
    loss = nn.functional.cross_entropy(theirs(to_input(few.train.images, few)), torch.as_tensor(few.train.labels))
    loss.backward()
    assert tuned(model, dense, few, spec) == pytest.approx(float(loss.detach()), rel=1e-5)
    for (name, ours), p in zip(model.named_parameters(), theirs.parameters(), strict=True):
        assert p.grad is not None
        sure = p.grad.abs() > 1e-5  # below that the sign may be rounding's, and Adam's epsilon counts
        torch.testing.assert_close(ours[sure], (p - 0.001 * p.grad.sign())[sure], rtol=1e-4, atol=2e-6, msg=name)
    assert all(torch.equal(value, kept[name]) for name, value in model.named_buffers())


def test_what_layers_draw_follows_from_the_seed_alone(training: tuple[nn.Module, nn.Module, Data]) -> None:
    model, dense, data = training
    spec = FineTuneSpec(steps=2, batch_images=32)
    dropping = nn.Sequential(model, nn.Dropout(0.5))
    losses = []
    for seed, before in ((0, 1), (0, 2), (5, 2)):
        torch.manual_seed(before)
        losses.append(tuned(copy.deepcopy(dropping), dense, data, spec, seed))
    assert losses[0] == losses[1] != losses[2]


def test_divergence_is_an_error(training: tuple[nn.Module, nn.Module, Data]) -> None:
    model, dense, data = training
    with pytest.raises(FloatingPointError, match=r"fine-tuning diverged: the loss is (nan|inf) at step \d+ of 50"):
        tuned(model, dense, data, FineTuneSpec(steps=50, batch_images=32, learning_rate=1e6, distill=0.0))
    assert not model.training


def test_steps_of_epochs() -> None:
    assert steps_of(FineTuneSpec(epochs=2.0, batch_images=128), 1000) == 14, "7 whole batches an epoch"
    assert steps_of(FineTuneSpec(epochs=3, batch_images=128), 100) == 3
    assert steps_of(FineTuneSpec(epochs=0.001, batch_images=128), 1000) == 1
    assert steps_of(FineTuneSpec(steps=7), 1000) == 7


def test_fewer_images_than_a_batch(training: tuple[nn.Module, nn.Module, Data]) -> None:
    model, dense, data = training
    few = replace(data, train=data.train[:5], calibration_images=5)
    assert np.isfinite(tuned(model, dense, few, FineTuneSpec(steps=3, batch_images=128)))


def test_stored_weights_are_the_whole_network(bench: Bench) -> None:
    outcome = Evaluator(bench)(Task(number=1, choices=cheapest(bench), seed=0))
    assert outcome.weights is not None
    state = load_file(bench.weights_folder / outcome.weights)
    buffers = ("running_mean", "running_var", "num_batches_tracked")
    assert sum(value.numel() for key, value in state.items() if not key.endswith(buffers)) == outcome.params


def test_trials_beyond_the_limits_are_not_scored_on_the_report_images(bench: Bench) -> None:
    task = Task(number=3, choices=cheapest(bench), seed=0)
    space = bench.space.model_copy(update={"budget": BudgetSpec(max_drop=0.0)})
    limited = Evaluator(replace(bench, space=space, dense={**bench.dense, "accuracy_search": 2.0}))
    outcome = limited(task)
    assert (outcome.accuracy, outcome.weights) == (None, None)
    assert not list(bench.weights_folder.glob("*"))
    kept = limited(replace(task, keep=True))
    assert kept.accuracy is not None
    assert [file.name for file in bench.weights_folder.iterdir()] == [kept.weights]


def test_prices_are_measured_by_the_map_where_that_takes_long(
    prepared: tuple[Network, Bench], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = replace(prepared[0], space=parse_space(SPACE | {"strategy": {"name": "greedy", "price": "loss"}}))
    factors, failed = factorise(network, tmp_path / "cache")
    sent: list[Any] = []

    def counted(work: Any, items: Any) -> list[Any]:
        sent.extend(items)
        return [work(item) for item in sent]

    here = settle(network, factors, failed, tmp_path / "here", map=counted)
    assert not sent, "as long as other workers would take to start"
    assert all(dict(c.prices).keys() == {"loss"} for layer in here.table.layers for c in layer.candidates)
    monkeypatch.setattr(preparation, "_PARALLEL_MACS", 1.0)
    assert settle(network, factors, failed, tmp_path / "there", map=counted) == here
    assert [len(batch) for batch in sent] == [32, 32, 32, 4], "the 100 calibration images"


def test_what_takes_long_is_measured_of_some_candidates_and_interpolated(
    prepared: tuple[Network, Bench], tmp_path: Path
) -> None:
    def table(price: str, points: int | None) -> PriceTable:
        strategy = {"name": "auto", "price": price, "price_points": points}
        space = parse_space(SPACE | {"ranks": {"ratios": [0.1, 0.2, 0.3, 0.4, 0.6, 0.8]}, "strategy": strategy})
        network = replace(prepared[0], space=space)
        factors, failed = factorise(network, tmp_path / "cache")
        return settle(network, factors, failed, tmp_path / "cache").table

    whole, some = table("drop", None), table("drop", 3)
    assert some == with_prices(whole, interpolated(whole, 3, prices_of(sampled(whole, 3))))
    assert some != whole
    assert sampled(some, 3) == sampled(whole, 3)
    assert table("output", 3) == table("output", None)


def prices_of(table: PriceTable) -> dict[str, list[dict[str, float]]]:
    return {layer.name: [dict(c.prices) for c in layer.candidates] for layer in table.layers}


def test_a_study_goes_on_with_its_own_images_only(prepared: tuple[Network, Bench], tmp_path: Path) -> None:
    network, _ = prepared
    factors, failed = factorise(network, tmp_path / "cache")
    setting = settle(network, factors, failed, tmp_path / "cache")
    labels = network.data.report.labels.copy()
    labels[0] = (labels[0] + 1) % 10
    report = replace(network.data.report, labels=labels)
    changed = replace(network, data=without_duplicates(replace(network.data, report=report)))
    with pytest.raises(StudyError, match="data must be those of the study"):
        make_bench(changed, factors, setting, tmp_path, tmp_path / "cache", silent)


def test_damaged_statistics_of_the_shared_cache_are_replaced(
    prepared: tuple[Network, Bench], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANKSEARCH_CACHE", str(tmp_path / "shared"))
    network, _ = prepared
    convs = network.selection.convs()
    statistics_of(network, convs, tmp_path / "one", silent)
    (damaged,) = (tmp_path / "shared" / "statistics").iterdir()
    whole = damaged.read_bytes()
    damaged.write_bytes(whole[:20])
    statistics_of(network, convs, tmp_path / "two", silent)
    assert damaged.read_bytes() == whole


def test_statistics_of_another_forward_pass_are_collected_afresh(
    prepared: tuple[Network, Bench], tmp_path: Path
) -> None:
    network, _ = prepared
    convs = network.selection.convs()
    first = statistics_of(network, convs, tmp_path, silent)
    again = statistics_of(network, convs, tmp_path, silent)
    assert len(list((tmp_path / "statistics").iterdir())) == 1
    name = next(iter(convs))
    assert torch.equal(first[name].output_mean, again[name].output_mean)
    other = build_copy(network)
    other.register_forward_pre_hook(lambda _, inputs: (2 * inputs[0],))
    moved = statistics_of(replace(network, model=other), convs, tmp_path, silent)
    assert not torch.allclose(first[name].output_mean, moved[name].output_mean)
