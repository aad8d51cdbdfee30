"""Searches over formats, ranks and widths: what is scored is on the grid, costs what it says, and comes back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ranksearch.comparison import compare as compare_strategies
from ranksearch.config import load_space
from ranksearch.errors import SpaceError
from ranksearch.export import rank_map_of
from ranksearch.finetuning import finetune
from ranksearch.handover import compare, export_trial
from ranksearch.launch import search
from ranksearch.rankmap import RankMap
from ranksearch.report import write_report
from ranksearch.retraining import Epoch
from ranksearch.space import FineTuneSpec
from ranksearch.storage import Store
from ranksearch.study import Study
from tests.integration.test_search import QUICKSTART, SMALL, UNTRACKED, found
from tests.unit.test_rounding import on_grid

pytestmark = pytest.mark.xdist_group("quantised_search")  # by one worker: what its tests share is made once

FEW = [
    *(one for one in SMALL if not one.startswith("strategy")),
    UNTRACKED,
    "strategy.name=auto",
    "ranks.ratios=[0.3, 0.6]",
    "quantise={weight_bits: [4, 8]}",
    "objectives=[accuracy, bit-operations]",
    "budget.targets=[0.5]",
    "budget.trials=5",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("studies")


@pytest.fixture(scope="module")
def study(folder: Path) -> Study:
    return search(QUICKSTART, settings=FEW, storage=folder, name="few")


def coarse(state: dict[str, torch.Tensor], rank_map: RankMap) -> bool:
    """Whether all kernels are on the grid of their width: those of chains, and of other layers that of eight bits."""
    kernels = {name: x for name, x in state.items() if x.ndim > 1}
    bits = {
        name: rank_map.layers[owner].bits for name in kernels if (owner := name.rsplit(".", 2)[0]) in rank_map.layers
    }
    assert bits, "no kernel of a chain"
    return all(on_grid(kernel, bits.get(name, 8)) for name, kernel in kernels.items())


def test_trials_compute_in_few_bits_and_cost_what_they_say(study: Study) -> None:
    trials = study.trials()
    assert [trial.state for trial in trials] == ["COMPLETE"] * 5
    widths = set()
    for trial in trials:
        outcome, rank_map = trial.outcome, rank_map_of(study, trial)
        assert outcome is not None
        inside = sum(layer.macs * layer.bits for layer in rank_map.layers.values())
        outside = 8 * (rank_map.macs - sum(layer.macs for layer in rank_map.layers.values()))
        assert outcome.bit_operations == 8 * (inside + outside)
        assert trial.values == (outcome.accuracy_search, outcome.bit_operations)
        assert 0.5 * rank_map.params < outcome.weight_bytes < 1.5 * rank_map.params  # type: ignore[operator]
        widths |= {layer.bits for layer in rank_map.layers.values()}
    assert widths == {4, 8}
    for trial in study.front_trials():
        weights = study.weights_folder / str(trial.outcome.weights)  # type: ignore[union-attr]
        assert coarse(load_file(weights), rank_map_of(study, trial))
    assert 0 < study.hypervolume(trials) <= 1
    assert max(trial.outcome.accuracy_search for trial in trials if trial.outcome) > 0.9


@pytest.mark.slow
def test_the_same_seed_finds_the_same(study: Study, folder: Path) -> None:
    again = search(QUICKSTART, settings=FEW, storage=folder, name="again")
    assert found(again) == found(study)


def test_what_is_exported_scores_as_the_trial_did(study: Study, folder: Path, tmp_path: Path) -> None:
    trial = study.front_trials()[0]
    made = export_trial(study, trial, Store(folder), tmp_path / "m.json", weights=tmp_path / "w.safetensors")
    assert made.widths is not None
    assert (made.widths.other_bits, made.widths.activation_bits) == (8, 8)
    assert made.metrics["bit_operations"] == trial.outcome.bit_operations  # type: ignore[union-attr]
    scored = compare(tmp_path / "m.json", storage=folder)
    assert scored.compressed.accuracy == trial.outcome.accuracy  # type: ignore[union-attr]
    write_report(tmp_path / "m.json", tmp_path / "page.html", storage=folder)
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert f"{trial.outcome.bit_operations:,}" in page  # type: ignore[union-attr]
    assert any(f", {bits} bits" in page for bits in (4, 8))
    plain = made.model_copy(update={"widths": None})
    plain.save(tmp_path / "plain.json")
    without = compare(tmp_path / "plain.json", storage=folder)
    assert without.compressed.loss != scored.compressed.loss, "activations are not rounded where no widths are named"
    afresh = tmp_path / "afresh.json"
    made.model_copy(update={"weights": None}).save(afresh)
    assert compare(afresh, storage=folder).factors == "weight-only"


@pytest.mark.slow
def test_training_keeps_the_grid(study: Study, folder: Path, tmp_path: Path) -> None:
    """Both the brief one of a search and the full one of a rank map."""
    tuned = search(
        QUICKSTART,
        settings=[*FEW, "budget.trials=2", "evaluation.fine_tune.steps=3"],
        storage=folder,
        name="tuned",
    )
    assert [trial.state for trial in tuned.trials()] == ["COMPLETE"] * 2
    first = study.trials()[0]
    same = next(trial for trial in tuned.trials() if trial.proposal.choices == first.proposal.choices)
    assert same.outcome.loss != first.outcome.loss  # type: ignore[union-attr]
    for trial in tuned.front_trials():
        weights = tuned.weights_folder / str(trial.outcome.weights)  # type: ignore[union-attr]
        assert coarse(load_file(weights), rank_map_of(tuned, trial))

    export_trial(study, first, Store(folder), tmp_path / "m.json", weights=tmp_path / "w.safetensors")
    spec = FineTuneSpec(steps=6, batch_images=32, optimiser="sgd", batch_norm="batch", learning_rate=0.01)
    done = finetune(tmp_path / "m.json", tmp_path / "t.json", spec=spec, storage=folder)
    assert coarse(load_file(done.files[1]), RankMap.load(tmp_path / "t.json"))
    assert done.scores["after"].loss != done.scores["before"].loss
    assert compare(tmp_path / "t.json", storage=folder).compressed.accuracy == done.scores["after"].accuracy


class Killed(Exception):
    pass


@pytest.mark.slow
def test_full_training_sees_rounded_activations_through_an_interruption(
    study: Study, folder: Path, tmp_path: Path
) -> None:
    made = export_trial(
        study, study.trials()[0], Store(folder), tmp_path / "m.json", weights=tmp_path / "w.safetensors"
    )
    spec = FineTuneSpec(epochs=3, batch_images=400, optimiser="sgd", batch_norm="batch", learning_rate=0.01)

    def tuned(name: str, rank_map: Path = tmp_path / "m.json", stop: bool = False) -> dict[str, torch.Tensor]:
        def watch(network: str, epoch: Epoch) -> None:
            if stop and epoch.epoch == 2:
                raise Killed

        output = tmp_path / f"{name}.json"
        return load_file(finetune(rank_map, output, spec=spec, storage=folder, watch=watch).files[1])

    whole = tuned("whole")
    with pytest.raises(Killed):
        tuned("parts", stop=True)
    parts = tuned("parts")
    assert all(torch.equal(whole[key], parts[key]) for key in whole)
    curves = [RankMap.load(tmp_path / f"{name}.json").provenance["finetune"]["curves"] for name in ("whole", "parts")]
    assert curves[0] == curves[1]

    assert made.widths is not None
    exact = made.widths.model_copy(update={"activation_bits": 32})
    made.model_copy(update={"widths": exact}).save(tmp_path / "exact.json")
    other = tuned("other", tmp_path / "exact.json")
    assert any(not torch.equal(whole[key], other[key]) for key in whole if key.endswith("weight"))


@pytest.mark.parametrize(
    ("settings", "rule"),
    [
        (["objectives=[accuracy, bit-operations]"], "needs widths to count with: add a section `quantise`"),
        (["quantise={}", "strategy.name=funnel"], "take another strategy"),
        (["quantise={weight_bits: [8, 8]}"], "weight_bits must differ"),
        (["quantise={weight_bits: [3]}"], "weight_bits"),
        (["quantise={}", "evaluation.refit=false"], "needs evaluation.refit"),
    ],
)
def test_what_cannot_be_is_told(settings: list[str], rule: str) -> None:
    with pytest.raises(SpaceError) as raised:
        load_space(QUICKSTART, settings)
    assert rule in str(raised.value)


def test_a_comparison_leaves_funnel_runs_out(folder: Path) -> None:
    settings = [*FEW, "budget.trials=1", "strategy.name=uniform"]
    compared = compare_strategies(
        QUICKSTART, ["funnel", "uniform"], settings=settings, seeds=1, storage=folder, name="c"
    )
    assert [run.strategy for run in compared.runs] == ["uniform"]
    assert "trains in float32" in str(compared.failures["funnel"])
