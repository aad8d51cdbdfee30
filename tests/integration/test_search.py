"""Real searches of a real network on real images: repeatable, resumable, honest about which images they look at."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mlflow import MlflowClient
from optuna.trial import TrialState
from safetensors.torch import load_file, save_file
from torch.utils.flop_counter import FlopCounterMode

from ranksearch.data import load_data
from ranksearch.decompositions import FORMATS
from ranksearch.errors import DataError, EngineError, RanksearchError, SpaceError, StudyError, TrackingError
from ranksearch.evaluation import Evaluator
from ranksearch.export import choose, load_compressed, rank_map_of, read_compressed
from ranksearch.handover import compare, export_trial
from ranksearch.launch import bench_of, inspect, open_study, resume, search
from ranksearch.models import build_model, digits_weights
from ranksearch.space import DataSpec, ModelSpec
from ranksearch.storage import Store
from ranksearch.study import Study
from ranksearch.surgery import skeleton
from ranksearch.trial import Task, Trial
from tests.conftest import REPOSITORY

QUICKSTART = REPOSITORY / "search_spaces" / "quickstart.yaml"
SMALL = [
    "data.train_images=400",
    "data.calibration_images=128",
    "data.search_images=200",
    "data.report_images=300",
    "evaluation.refit_images=128",
    "evaluation.select_images=64",
    "strategy.seed_points=2",
    "strategy.name=optuna",
    "strategy.options={population_size: 4}",
]
UNTRACKED = "tracking.enabled=false"
DATA = DataSpec(train_images=400, calibration_images=128, search_images=200, report_images=300,
                mean=[0.3053], std=[0.3763])  # fmt: skip


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache with the trained network and its decompositions."""
    folder = tmp_path_factory.mktemp("prepared")
    digits_weights(folder / "cache", load_data(DATA, cache=folder / "cache", seed=0))
    searched(folder, trials=1)
    return folder / "cache"


@pytest.fixture
def folder(tmp_path: Path, prepared: Path) -> Path:
    """A folder of studies, with the cache."""
    shutil.copytree(prepared, tmp_path / "studies" / "cache")
    return tmp_path / "studies"


def searched(folder: Path, *settings: str, trials: int = 6, name: str = "one", tracked: bool = False) -> Study:
    tracking = [] if tracked else [UNTRACKED]
    changes = [*SMALL, *tracking, f"budget.trials={trials}", *settings]
    return search(QUICKSTART, settings=changes, storage=folder, name=name)


def found(study: Study) -> list[dict[str, Any]]:
    """What a search found, without times, whatever was interrupted on the way; one entry a proposal."""
    last = {t.index: t for t in study.trials()}
    return [
        {
            "choices": last[i].proposal.choices,
            "origin": last[i].proposal.origin,
            "state": last[i].state,
            "reason": last[i].reason,
            **({} if last[i].outcome is None else last[i].outcome.to_json() | {"seconds": 0.0, "weights": None}),
        }
        for i in sorted(last)
    ]


def weights_of(study: Study) -> dict[int, str]:
    """Proposal to the hash of its weights, of the trials on the front."""
    hashes = {}
    for trial in study.front_trials():
        assert trial.outcome is not None
        assert trial.outcome.weights is not None
        state = load_file(study.weights_folder / trial.outcome.weights)
        content = b"".join(key.encode() + value.numpy().tobytes() for key, value in sorted(state.items()))
        hashes[trial.index] = hashlib.sha256(content).hexdigest()
    return hashes


def dense_network(folder: Path) -> torch.nn.Module:
    weights = digits_weights(folder / "cache", load_data(DATA, cache=folder / "cache", seed=0))
    return build_model(ModelSpec(name="digits-cnn"), weights=weights)


def counted(model: torch.nn.Module, shape: tuple[int, ...]) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, *shape))
    return counter.get_total_flops() // 2


@pytest.mark.slow
def test_the_same_seed_gives_the_same_search_bit_for_bit(folder: Path) -> None:
    tuned = ["evaluation.fine_tune.steps=3", "data.augment.flip=true"]
    one, two = (searched(folder, *tuned, name=name) for name in ("one", "two"))
    assert found(one) == found(two)
    assert weights_of(one) == weights_of(two)
    assert len(weights_of(one)) >= 2


def test_every_trial_counts_as_the_flop_counter_does(folder: Path) -> None:
    study = searched(folder, trials=12)
    dense = dense_network(folder)
    table = study.setting.table
    assert study.setting.dense["macs"] == table.dense_macs == counted(dense, (1, 8, 8))
    assert study.setting.dense["params"] == table.dense_params == sum(p.numel() for p in dense.parameters())
    for trial in study.trials():
        assert trial.outcome is not None
        built = skeleton(rank_map_of(study, trial), dense)
        assert trial.outcome.macs == table.macs(trial.proposal.choices) == counted(built, (1, 8, 8))
        assert trial.outcome.params == sum(p.numel() for p in built.parameters())
    frame = study.front()
    assert list(frame["macs"] / table.dense_macs) == pytest.approx(list(frame["macs_ratio"]))


def test_accuracies_are_those_of_the_stored_weights(folder: Path) -> None:
    study, dense = searched(folder, trials=12), dense_network(folder)
    data = load_data(DATA, cache=folder / "cache", seed=0)
    front = study.front_trials()
    assert len(front) >= 2
    for trial in front:
        outcome = trial.outcome
        assert outcome is not None
        assert outcome.weights is not None
        model = load_compressed(rank_map_of(study, trial), dense, study.weights_folder / outcome.weights)
        for split, accuracy in ((data.search, outcome.accuracy_search), (data.report, outcome.accuracy)):
            images = torch.as_tensor(split.images).permute(0, 3, 1, 2).float() / 255
            with torch.no_grad():
                right = model((images - 0.3053) / 0.3763).argmax(1).numpy() == split.labels
            assert accuracy == pytest.approx(right.mean(), abs=0.5 / len(right)), "but for rounding at a near tie"
        assert outcome.report_images == 300
    kept = {path.name for path in study.weights_folder.iterdir()}
    assert kept == {t.outcome.weights for t in front if t.outcome}


def test_the_dense_network_is_scored_once_for_the_same_images(folder: Path) -> None:
    def dense(*settings: str) -> dict[str, float]:
        return dict(inspect(QUICKSTART, settings=[*SMALL, UNTRACKED, *settings], storage=folder).dense)

    def kept() -> list[Path]:
        return sorted((folder / "cache" / "scores").iterdir())

    first = dense()
    (entry,) = kept()
    written = entry.stat().st_mtime_ns
    assert dense("budget.trials=9") == first
    assert entry.stat().st_mtime_ns == written
    entry.write_bytes(entry.read_bytes()[:-4])
    assert dense() == first, "a broken entry is measured again"
    assert entry.stat().st_mtime_ns > written
    darker = dense("data.mean=[0.6]")
    assert darker["loss"] != first["loss"]
    assert len(kept()) == 2


@pytest.mark.slow
def test_an_export_evaluates_to_the_trial(folder: Path, tmp_path: Path) -> None:
    study = searched(folder, "evaluation.fine_tune.steps=2", trials=8)
    dominated = [t for t in study.trials() if t not in study.front_trials()]
    for trial in (choose(study, knee_point=True), dominated[0]):
        file, weights = tmp_path / f"{trial.number}.json", tmp_path / f"{trial.number}.safetensors"
        exported = export_trial(study, trial, Store(folder), file, weights=weights)
        comparison = compare(file, storage=folder, trust=True)
        assert trial.outcome is not None
        assert comparison.compressed.macs == trial.outcome.macs == exported.macs
        assert comparison.compressed.params == trial.outcome.params
        assert comparison.compressed.accuracy == exported.metrics["accuracy"]
        if trial.outcome.accuracy is not None:
            assert comparison.compressed.accuracy == trial.outcome.accuracy
        assert comparison.dense.accuracy == study.setting.dense["accuracy"]
        assert read_compressed(weights)[0].layers == exported.layers


class Scaled(torch.nn.Module):
    """A user's network, whose forward pass somebody edits."""

    scale = 1.0

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = torch.nn.Conv2d(1, 16, 3, padding=1)
        self.second = torch.nn.Conv2d(16, 16, 3, padding=1)
        self.classifier = torch.nn.Linear(16, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.relu(self.second(torch.relu(self.first(x)))).mean((2, 3))
        logits: torch.Tensor = self.classifier(hidden) * self.scale
        return logits


def test_a_search_does_not_go_on_over_another_forward_pass(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = [f"model.name={__name__}:Scaled", "model.options={num_classes: 10}"]
    searched(folder, *own, trials=2)
    monkeypatch.setattr(Scaled, "scale", 1.5)
    with pytest.raises(StudyError, match=r"found a loss of .* the forward pass of .*:Scaled has changed"):
        resume("one", storage=folder, trials=4)
    monkeypatch.undo()
    assert len(resume("one", storage=folder, trials=4).trials()) == 4


@pytest.mark.slow
def test_report_images_decide_nothing(folder: Path, tmp_path: Path) -> None:
    weights = digits_weights(folder / "cache", load_data(DATA, cache=folder / "cache", seed=0))
    own = [
        "data.source=tests.digits:digits",
        "data.train_images=400",
        "data.search_images=200",
        "data.report_images=300",
        f"model.weights={weights}",
        "budget.max_drop=60",
        "evaluation.fine_tune.steps=2",
    ]
    honest = searched(folder, *own, trials=8)
    spoilt = searched(folder, *own, "data.options={spoilt: true}", trials=8, name="spoilt")
    ours, theirs = found(honest), found(spoilt)
    for one in (*ours, *theirs):
        one.pop("accuracy", None)
        one.pop("report_right", None)
    assert ours == theirs
    assert weights_of(honest) == weights_of(spoilt)
    assert list(honest.front()["trial"]) == list(spoilt.front()["trial"])
    assert honest.front()["accuracy"].max() > 0.8 > 0.3 > spoilt.front()["accuracy"].max()
    for rule in ({"knee_point": True}, {"max_macs_ratio": 0.8}, {"max_drop": 50.0}):
        assert choose(honest, **rule).number == choose(spoilt, **rule).number


@pytest.mark.slow
def test_auto_keeps_to_the_drop_that_is_allowed(folder: Path) -> None:
    auto = ["strategy.name=auto", "strategy.options={first: 4}", "strategy.price_images=32", UNTRACKED]
    limited = searched(folder, *auto, "budget.max_drop=1", trials=16)
    free = searched(folder, *auto, trials=16, name="free")
    least = limited.setting.dense["accuracy_search"] - 0.01
    kept, by_chance = (
        sum(t.outcome is not None and t.outcome.accuracy_search >= least - 1e-9 for t in study.trials()[4:])
        for study in (limited, free)
    )
    assert kept == sum(trial.feasible for trial in limited.trials()[4:])
    assert kept >= 4
    assert kept > by_chance


def test_splits_are_disjoint(folder: Path) -> None:
    data = load_data(DATA, cache=folder / "cache", seed=0)
    sets = [{image.tobytes() for image in split.images} for split in (data.train, data.search, data.report)]
    assert [len(split) for split in (data.search, data.report)] == [200, 300]
    assert not sets[0] & sets[1]
    assert not sets[0] & sets[2]
    assert len(sets[1] & sets[2]) <= 1, "but for a digit that the data set itself has twice"


def test_training_that_diverges_fails_with_its_reason_and_the_search_goes_on(folder: Path) -> None:
    diverging = ["evaluation.fine_tune.steps=30", "evaluation.fine_tune.learning_rate=1e6"]
    study = searched(folder, *diverging, trials=5)
    trials = study.trials()
    assert [t.index for t in trials] == list(range(5)), "a failure of the computation is not tried again"
    failed = [t for t in trials if t.state == "FAIL"]
    assert failed
    assert all("diverged" in (t.reason or "") or "finite" in (t.reason or "") for t in failed)
    assert {t.state for t in trials} <= {"FAIL", "COMPLETE"}
    assert all(np.isfinite(t.outcome.loss) for t in trials if t.outcome)


def test_factors_that_are_not_finite_fail_one_trial_only(folder: Path) -> None:
    study = searched(folder, "evaluation.factors=weight-only", trials=4)
    _, bench = bench_of(study, Store(folder))
    evaluate = Evaluator(bench)
    compressed = next(t for t in study.trials() if t.proposal.choices != study.setting.table.dense)
    task = Task(number=77, choices=compressed.proposal.choices, seed=0)
    healthy = evaluate(task)
    assert compressed.outcome is not None
    assert healthy.accuracy_search == compressed.outcome.accuracy_search
    for key, tensors in evaluate.factors.items():
        evaluate.factors[key] = {name: torch.full_like(value, torch.nan) for name, value in tensors.items()}
    with pytest.raises(
        (FloatingPointError, RanksearchError, torch.linalg.LinAlgError), match=r"(?i)finite|nan|converge"
    ):
        evaluate(task)


def test_seed_maps_are_tried_first(folder: Path, tmp_path: Path) -> None:
    first = searched(folder, trials=6)
    wanted = [first.trials()[i] for i in (4, 1)]
    files = [rank_map_of(first, trial).save(tmp_path / f"{i}.json") for i, trial in enumerate(wanted)]
    seeds = f"strategy.seed_maps=[{files[0]}, {files[1]}]"
    second = searched(folder, seeds, trials=4, name="seeded")
    tried = second.trials()
    assert [t.proposal.choices for t in tried[:2]] == [t.proposal.choices for t in wanted]
    assert [t.proposal.origin for t in tried[:2]] == ["user", "user"]
    for again, trial in zip(tried[:2], wanted, strict=True):
        assert again.outcome is not None
        assert trial.outcome is not None
        assert again.outcome.accuracy_search == trial.outcome.accuracy_search

    text = json.loads(files[0].read_text())
    text["layers"] = {"nowhere": next(iter(text["layers"].values()))}
    files[0].write_text(json.dumps(text))
    with pytest.raises(SpaceError, match=r"seed_maps\[0\].*found nowhere"):
        searched(folder, seeds, name="stranger")
    assert "stranger" not in Store(folder).names()


def test_pinned_layers_keep_their_choice(folder: Path) -> None:
    free = searched(folder, trials=1).setting.table
    names = [layer.name for layer in free.layers]
    ranks = {"format": "tucker2", "ranks": [5, 6]}
    pins = json.dumps({names[0]: ranks, names[1]: "dense"})
    study = searched(folder, f"fix={pins}", trials=5, name="pinned")
    assert [layer.name for layer in study.setting.table.layers] == names[2:]
    assert study.setting.left_dense[names[1]] == "pinned to dense"
    for trial in study.trials():
        rank_map = rank_map_of(study, trial)
        assert rank_map.layers[names[0]].format == "tucker2"
        assert rank_map.layers[names[0]].ranks == (5, 6)
        assert names[1] not in rank_map.layers
        assert trial.outcome is not None
        assert trial.outcome.macs == counted(skeleton(rank_map, dense_network(folder)), (1, 8, 8))


def test_mistakes_leave_no_study(folder: Path) -> None:
    with pytest.raises(TrackingError, match=r"tracking\.uri"):
        searched(folder, "tracking.uri=./mlruns", name="lost", tracked=True)
    few = folder / "few.safetensors"
    save_file(build_model(ModelSpec(name="digits-cnn", options={"num_classes": 5}), weights=None).state_dict(), few)
    with pytest.raises(DataError, match="10 classes"):
        searched(folder, "model.options={num_classes: 5}", f"model.weights={few}", name="lost")
    assert Store(folder).names() == []


def test_a_finished_search_is_left_as_it_is(folder: Path, tmp_path: Path) -> None:
    trials = searched(folder, trials=3, tracked=True).trials()
    shutil.rmtree(folder / "cache")
    prepared: list[str] = []
    for asked in (None, 3, 1):
        study = resume("one", storage=folder, trials=asked, notify=lambda what, done, total: prepared.append(what))
        assert study.trials() == trials
        assert study.space.budget.trials == 3
    assert prepared == []
    assert not (folder / "cache").exists()
    check_mlflow(folder, study)


def test_missing_resources_are_told_before_anything_is_prepared(tmp_path: Path) -> None:
    missing = f"resources.gpus_per_trial={torch.cuda.device_count() + 1}"
    for engine in ("local", "ray"):
        with pytest.raises(EngineError, match=r"--set resources\.gpus_per_trial=0"):
            searched(tmp_path / "fresh", missing, f"resources.engine={engine}")
    assert not (tmp_path / "fresh").exists()


def runs_of(folder: Path) -> tuple[list[Any], list[Any]]:
    """MLflow's runs of searches, and of trials."""
    client = MlflowClient(tracking_uri=f"sqlite:///{folder / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("ranksearch")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id], max_results=1000)
    return (
        [run for run in runs if run.data.tags["ranksearch.kind"] == "search"],
        [run for run in runs if run.data.tags["ranksearch.kind"] == "trial"],
    )


def check_mlflow(folder: Path, study: Study) -> None:
    """One closed run for every trial of the study, under one parent."""
    parents, children = runs_of(folder)
    assert [run.info.status for run in parents] == ["FINISHED"]
    assert {run.data.tags["mlflow.parentRunId"] for run in children} == {parents[0].info.run_id}
    trials = {str(t.number): t for t in study.trials()}
    assert sorted(run.data.tags["ranksearch.trial"] for run in children) == sorted(trials)
    for run in children:
        trial = trials[run.data.tags["ranksearch.trial"]]
        assert run.info.status == ("FINISHED" if trial.state == "COMPLETE" else "FAILED")
        assert run.data.tags["state"] == trial.state
        if trial.outcome is not None:
            assert run.data.metrics["accuracy_search"] == trial.outcome.accuracy_search
            assert run.data.metrics["macs"] == trial.outcome.macs


SCRIPT = """
import sys
from ranksearch.launch import resume, search
if __name__ == "__main__":
    folder, how, space, *settings = sys.argv[1:]
    if how == "search":
        search(space, settings=settings, storage=folder, name="one")
    else:
        resume("one", storage=folder)
"""


def started(folder: Path, how: str, settings: list[str]) -> subprocess.Popen[bytes]:
    script = folder / "driver.py"
    script.write_text(SCRIPT)
    return subprocess.Popen(
        [sys.executable, str(script), str(folder), how, str(QUICKSTART), *settings],
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )


def wait_for(process: subprocess.Popen[bytes], journal: Path, ended: int) -> None:
    """Wait until the journal says that so many trials are complete."""
    deadline, position, complete = time.monotonic() + 300, 0, 0
    while time.monotonic() < deadline:
        if journal.exists():
            with journal.open("rb") as file:
                file.seek(position)
                lines = [line for line in file if line.endswith(b"\n")]
            position += sum(map(len, lines))
            complete += sum(json.loads(line).get("state") == TrialState.COMPLETE for line in lines)
        if complete >= ended:
            return
        if process.poll() is not None:
            assert process.stderr is not None
            raise AssertionError(f"the driver ended by itself: {process.stderr.read().decode()}")
        time.sleep(0.02)
    raise AssertionError("the driver is too slow")


def stopped(folder: Path, how: str, settings: list[str], ended: int, by: signal.Signals) -> list[Trial]:
    """Run a driver until so many trials are complete, stop it, and return the trials complete by then."""
    process = started(folder, how, settings)
    try:
        wait_for(process, folder / "studies" / "one" / "journal.log", ended)
        process.send_signal(by)
        process.wait(timeout=150)
        if by == signal.SIGKILL:
            assert process.returncode == -signal.SIGKILL
    finally:
        process.kill()
        process.communicate()
    return [t for t in open_study("one", storage=folder).trials() if t.state == "COMPLETE"]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_killed_drivers_lose_nothing(folder: Path, tmp_path: Path) -> None:
    settings = [*SMALL, "budget.trials=14"]
    done: list[Trial] = []
    for how, ended in (("search", 1), ("resume", 5), ("resume", 9)):
        before, done = done, stopped(folder, how, settings, ended, signal.SIGKILL)
        assert {t.number for t in before} <= {t.number for t in done}
    study = resume("one", storage=folder)
    trials = {t.number: t for t in study.trials()}
    assert all(trials[t.number] == t for t in done), "no finished trial is lost or run again"
    assert {t.state for t in trials.values()} <= {"COMPLETE", "FAIL"}
    assert {t.index for t in trials.values()} == set(range(14))
    complete = [t.index for t in trials.values() if t.state == "COMPLETE"]
    assert len(complete) == len(set(complete))
    for trial in trials.values():
        assert trial.state == "COMPLETE" or "interrupted" in (trial.reason or "")
    check_mlflow(folder, study)
    if sorted(complete) == list(range(14)):
        shutil.copytree(folder / "cache", tmp_path / "whole" / "cache")
        whole = searched(tmp_path / "whole", trials=14)
        hidden = ("accuracy", "report_images", "report_right")
        assert [{k: v for k, v in one.items() if k not in hidden} for one in found(study)] == [
            {k: v for k, v in one.items() if k not in hidden} for one in found(whole)
        ]
        assert weights_of(study) == weights_of(whole)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_ctrl_c_leaves_good_order(folder: Path) -> None:
    settings = [*SMALL, "budget.trials=40"]
    done = stopped(folder, "search", settings, 3, signal.SIGINT)
    assert 3 <= len(done) < 40
    study = open_study("one", storage=folder)
    rest = [t for t in study.trials() if t.state != "COMPLETE"]
    assert all(t.state == "FAIL" and t.retry and "stopped" in (t.reason or "") for t in rest)
    parents, children = runs_of(folder)
    assert [run.info.status for run in parents] == ["KILLED"]
    assert len(children) == len(study.trials())
    assert {run.info.status for run in children} <= {"FINISHED", "FAILED"}
    study = resume("one", storage=folder, trials=len({t.index for t in study.trials()}) + 2)
    assert {t.state for t in study.trials() if t.attempt} <= {"COMPLETE"}
    check_mlflow(folder, study)


@pytest.mark.slow
@pytest.mark.xdist_group("ray")
def test_ray_finds_what_this_process_finds(folder: Path) -> None:
    tuned = ["evaluation.fine_tune.steps=2"]
    local = searched(folder, *tuned, trials=8)
    for workers in (1, 2):
        ray = ["resources.engine=ray", f"resources.workers={workers}"]
        other = searched(folder, *tuned, *ray, trials=8, name=f"ray-{workers}")
        assert found(other) == found(local)
        assert weights_of(other) == weights_of(local)


@pytest.mark.slow
def test_all_formats_share_one_space(folder: Path) -> None:
    study = searched(folder, f"formats=[{','.join(FORMATS)}]", "evaluation.refit=false", trials=6)
    assert {trial.state for trial in study.trials()} == {"COMPLETE"}
    offered = {c.format for layer in study.setting.table.layers for c in layer.candidates}
    assert len(offered - {"dense"}) >= 5
    dense = dense_network(folder)
    for trial in study.trials():
        assert trial.outcome is not None
        chosen = rank_map_of(study, trial)
        fitted = {name for name, layer in chosen.layers.items() if not FORMATS[layer.format].nested}
        told = trial.outcome.details.get("fitted", {})
        assert told.keys() == fitted
        assert all(0 <= one["relative_error"] <= 1 and one["sensitivity"] > 0 for one in told.values())
        assert counted(skeleton(chosen, dense), (1, 8, 8)) == trial.outcome.macs
        assert all((layer.stabilise is not None) == (name in fitted) for name, layer in chosen.layers.items())
    first = study.trials()[0]
    entries = sorted((folder / "cache" / "fits").rglob("*.safetensors"))
    assert entries
    again = searched(folder, f"formats=[{','.join(FORMATS)}]", "evaluation.refit=false", trials=6, name="again")
    assert found(again) == found(study)
    assert sorted((folder / "cache" / "fits").rglob("*.safetensors")) == entries
    export_trial(study, first, Store(folder), folder / "map.json", weights=folder / "compressed.safetensors")
    rank_map, weights = read_compressed(folder / "map.json")
    assert weights is not None
    built = load_compressed(rank_map, dense, weights)
    assert counted(built, (1, 8, 8)) == first.outcome.macs  # type: ignore[union-attr]
    afresh = rank_map.apply(dense)
    images = torch.randn(4, 1, 8, 8)
    assert torch.isfinite(afresh(images)).all()
    assert torch.equal(rank_map.apply(dense)(images), afresh(images))
